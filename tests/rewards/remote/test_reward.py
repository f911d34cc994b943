"""Rewards on an inference server: real servers on the loopback, and whatever may go wrong there."""

import contextlib
import dataclasses
from http import server
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from remote_cases import (
  dribbling,
  dribbling_and_closing,
  dribbling_headers,
  dropped,
  fine,
  hanging,
  scored,
  status,
  truncated,
)
import train_cases as cases

from rlft import catalog
from rlft.report.metrics import MetricsWriter
from rlft.rewards.remote import client as http_client
from rlft.rewards.remote import protocol as open_inference
from rlft.rewards.remote import server as remote_model
from rlft.rewards.scoring import host
from rlft.rewards.scoring.errors import RewardError
from rlft.types import HostReward, Prompt, Reward, UserError

EXAMPLE = pathlib.Path(__file__).parents[3] / "experiments" / "rewards" / "remote_server.py"
# Models, as a user has them. `score` depends on everything that is sent, and answers in any order.
# `green` is the reward of that name of `train_cases`; it ends its own server where a file says so.
MODELS = """
import os, pathlib, signal, time
import numpy as np

def score(images, prompts, metadata):
  time.sleep(0.03 * np.random.default_rng().random())
  bonus = [len(p) + m["bonus"] for p, m in zip(prompts, metadata, strict=True)]
  return images[:, 0, 0, 0] + 10 * np.array(bonus)

def green(images, prompts, metadata):
  marker = pathlib.Path(__file__).with_name("die")
  if marker.exists():
    marker.unlink()
    os.kill(os.getpid(), signal.SIGKILL)
  return images[..., 1].mean((1, 2))
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """Waits in the place of seconds, so that the tests take few."""
  monkeypatch.setattr(http_client, "_FIRST_WAIT_S", 0.01)
  monkeypatch.setattr(http_client, "_LONGEST_WAIT_S", 0.1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  path = tmp_path_factory.mktemp("models") / "models.py"
  path.write_text(MODELS)
  return path


@contextlib.contextmanager
def process(models, function, port=0):
  """The example's server in a process of its own: (address of the model, process)."""
  with subprocess.Popen(
    [sys.executable, EXAMPLE, f"--model={models}:{function}", f"--port={port}"],
    stdout=subprocess.PIPE,
    text=True,
  ) as running:
    try:
      yield running.stdout.readline().split()[1], running
    finally:
      running.kill()


def port_of(address):
  return int(address.split("/")[2].rpartition(":")[2])


def batch(size):
  """Images that differ, prompts and the scores of `score`."""
  images = np.random.default_rng(0).random((size, 4, 4, 3), np.float32)
  prompts = [Prompt("x" * (i % 7), {"bonus": i, "more": np.arange(2)}) for i in range(size)]
  expected = [image[0, 0, 0] + 10 * (i % 7 + i) for i, image in enumerate(images)]
  return images, prompts, np.array(expected, np.float32)


# A real server.


@pytest.mark.parametrize("how", ["json", "binary", "auto"])
def test_scores_belong_to_their_images(models, how):
  with process(models, "score") as (address, _):
    reward = catalog.make_reward(f"{address}?format={how}&batch_size=3&in_flight=8")
    assert reward.threads == 8
    images, prompts, expected = batch(50)
    # One image is not finite: it is not sent, and has no score.
    images[7, 1, 1, 1] = np.inf
    expected[7] = np.nan
    for _ in range(3):
      np.testing.assert_array_equal(scored(reward, images, prompts), expected)


def test_a_server_that_is_killed_and_started_again(models):
  images, prompts, expected = batch(64)
  with contextlib.ExitStack() as stack:
    address, running = stack.enter_context(process(models, "score"))
    reward = catalog.make_reward(f"{address}?batch_size=2&in_flight=4&retries=1000")
    found = []
    scoring = threading.Thread(
      target=lambda: found.extend(scored(reward, images, prompts) for _ in range(6))
    )
    scoring.start()
    for _ in range(2):
      time.sleep(0.15)
      running.kill()
      running.wait()
      time.sleep(0.15)
      _, running = stack.enter_context(process(models, "score", port_of(address)))
    scoring.join(60)
    assert not scoring.is_alive()
  assert len(found) == 6
  np.testing.assert_array_equal(found, [expected] * 6)


def test_a_server_that_is_gone(models):
  images, prompts, expected = batch(16)
  with process(models, "score") as (address, running):
    reward = catalog.make_reward(f"{address}?in_flight=4&deadline_s=2&retries=1000")
    running.kill()
    running.wait()
    start = time.monotonic()
    with pytest.raises(RewardError) as error:
      scored(reward, images, prompts)
    assert 0.3 < time.monotonic() - start < 10  # Seconds, on a machine that is busy.
  assert "failed" in str(error.value) and "\n" not in str(error.value)
  assert "(last: Connection refused): restart the server, then run the same command" in str(
    error.value
  )
  # The same reward goes on once the server is back.
  with process(models, "score", port_of(address)):
    np.testing.assert_array_equal(scored(reward, images, prompts), expected)


def test_the_runs_own_deadline_holds(models, monkeypatch):
  images, prompts, _ = batch(2)
  with process(models, "score") as (address, running):
    reward = catalog.make_reward(f"{address}?retries=1000")
    os.kill(running.pid, signal.SIGSTOP)  # It accepts connections, and never answers.
    start = time.monotonic()
    monkeypatch.setattr(host, "batch_times", lambda: (start, start + 0.5))
    with pytest.raises(RewardError, match="no whole answer in .* s.: restart the server"):
      reward.score(images, [prompt.text for prompt in prompts], [{}] * 2)
    assert 0.3 < time.monotonic() - start < 10


def test_a_reward_is_told_the_times_of_its_batch():
  found = []

  def score(images, prompts, metadata):
    found.append(host.batch_times())
    time.sleep(0.01)
    return np.zeros(len(images))

  before = time.monotonic()
  scored(HostReward("r", score, threads=2), *batch(4)[:2], timeout_s=100)
  # The same for all parts, whenever they were begun.
  assert found[0] == found[1]
  started, deadline = found[0]
  assert before <= started <= time.monotonic() and deadline == started + 100
  assert host.batch_times()[1] == float("inf")


# A whole run.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return cases.folder(tmp_path_factory)


def settings(folder, workdir, address):
  """A run whose reward `green` is on a server."""
  green = dataclasses.replace(cases.task(folder, name="green"), reward=address)
  return cases.config(folder, workdir, task=(cases.task(folder), green), iterations=3)


def die_at_the_next_batch(models):
  models.with_name("die").touch()


def test_a_run_goes_on_when_its_server_does(folder, tmp_path, models, monkeypatch):
  finished = threading.Event()
  with process(models, "green") as (address, running):

    def restart():
      running.wait()
      if not finished.is_set():
        with process(models, "green", port_of(address)):
          finished.wait()

    watcher = threading.Thread(target=restart)
    watcher.start()
    try:
      with monkeypatch.context() as during:
        after_iteration(during, 0, lambda: die_at_the_next_batch(models))
        cases.run(settings(folder, tmp_path, f"{address}?in_flight=2&retries=1000"))
    finally:
      finished.set()
  watcher.join()
  assert running.returncode == -signal.SIGKILL
  cases.assert_same_run(tmp_path, cases.uninterrupted(folder))


def test_a_run_stops_when_its_server_is_gone(folder, tmp_path, models, monkeypatch):
  with process(models, "green") as (address, _):
    config = settings(folder, tmp_path, f"{address}?in_flight=2&retries=3")
    with monkeypatch.context() as during:
      after_iteration(during, 0, lambda: die_at_the_next_batch(models))
      with pytest.raises(RewardError) as error:
        cases.run(config)
  assert "restart the server, then run the same command again to go on" in str(error.value)
  assert "\n" not in str(error.value)
  assert [line["iteration"] for line in cases.metrics(tmp_path)] == [0]
  # One task of the second iteration: what was done before is kept.
  assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iteration_1_task_1"]
  with process(models, "green", port_of(address)):
    cases.run(config)
  cases.assert_same_run(tmp_path, cases.uninterrupted(folder))


def after_iteration(monkeypatch, number, action):
  """Does something when the metrics of an iteration are written."""
  write = MetricsWriter.write

  def written(self, iteration, metrics):
    write(self, iteration, metrics)
    if iteration == number:
      action()

  monkeypatch.setattr(MetricsWriter, "write", written)


# A server with faults, in this process.


def example():
  found = importlib.util.spec_from_file_location("remote_server", EXAMPLE)
  module = importlib.util.module_from_spec(found)
  found.loader.exec_module(module)
  return module


class Faulty:
  """The example's server, which does to its answers what `script` says, one entry an inference.

  Attributes:
    script: functions of the handler and the answer (a dict), each for one inference; the last one
      stays. Such a function returns True if it has answered itself.
    requests: how many inferences were asked for.
    authorizations: the headers of that name.
    about: what is declared.
  """

  def __init__(self):
    module = example()
    self.script = [lambda handler, answer: None]
    self.requests = 0
    self.ready = True
    self.authorizations = []
    self.about = {"inputs": module.INPUTS, "outputs": module.OUTPUTS}
    faulty, lock = self, threading.Lock()

    class Handler(module.Handler):
      name = "m"
      score = staticmethod(lambda images, prompts, metadata: images[:, 0, 0, 0])

      def do_GET(self):
        faulty.authorizations.append(self.headers.get("Authorization"))
        if self.path == "/v2/models/m":
          self.answer(200, json.dumps(faulty.about).encode())
        elif self.path == "/v2/models/m/ready" and not faulty.ready:
          faulty.ready = True
          self.fail(400, "loading")
        else:
          super().do_GET()

      def do_POST(self):
        with lock:
          faulty.requests += 1
          act = faulty.script.pop(0) if len(faulty.script) > 1 else faulty.script[0]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        data, _ = module.infer(type(self).score, body, self.headers.get(module.LENGTH))
        answer = json.loads(data)
        if not act(self, answer):
          self.answer(200, json.dumps(answer).encode())

    self.running = server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.running.daemon_threads = True
    self.address = f"http://127.0.0.1:{self.running.server_port}/v2/models/m"
    threading.Thread(target=self.running.serve_forever, args=(0.01,), daemon=True).start()

  def close(self):
    self.running.shutdown()
    self.running.server_close()


@pytest.fixture
def faulty():
  running = Faulty()
  yield running
  running.close()


def change(**values):
  """Of the answer's only output."""

  def act(handler, answer):
    answer["outputs"][0].update(values)

  return act


ONE = "?in_flight=1&format=json&timeout_s=1.5"


def ask(faulty, options=ONE, size=4):
  images, prompts, _ = batch(size)
  return images, scored(catalog.make_reward(faulty.address + options), images, prompts)


@pytest.mark.parametrize(
  "faults",
  [
    [status(503)],
    [status(500), status(502), status(429, Retry_After="0")],
    [truncated],
    [dropped, dropped],
    [hanging],
    [dribbling],
    [dribbling_and_closing],
    [dribbling_headers],
  ],
  ids=["503", "5xx 429", "truncated", "dropped", "hanging", "dribbling", "closing", "headers"],
)
def test_what_may_pass_is_tried_again(faulty, faults):
  faulty.script = [*faults, fine]
  start = time.monotonic()
  images, scores = ask(faulty)
  assert time.monotonic() - start < 10  # Faults take longer that are not cut short.
  np.testing.assert_array_equal(scores, images[:, 0, 0, 0])
  assert faulty.requests == len(faults) + 1


def test_a_restarted_server_may_still_load_its_model(faulty):
  faulty.script, faulty.ready = [status(404, "no model m"), fine], False
  images, scores = ask(faulty)
  np.testing.assert_array_equal(scores, images[:, 0, 0, 0])


@pytest.mark.parametrize(
  ("act", "message"),
  [
    (status(400, "x" * 999), r"refused a batch \(HTTP 400: x{117}\.\.\.\)"),
    (status(422, {"detail": "too big"}), r'refused a batch \(HTTP 422: \{"detail": "too big"\}'),
    (status(302, "elsewhere"), r"refused a batch \(HTTP 302: elsewhere\)"),
    (lambda _, answer: answer.update(id="x"), "expected the request's id '[0-9a-f]{32}', got 'x'"),
    (lambda _, answer: answer.pop("id") and None, "expected the request's id .* got None"),
    (lambda _, answer: answer.pop("outputs") and None, "object with a list of 'outputs'"),
    (lambda _, answer: answer["outputs"].append(3), "an output is no JSON object"),
    (change(name="scores"), r"expected one output 'score', got \['scores'\]"),
    (change(shape=[2, 2]), r"'score' has the shape \[2, 2\], expected \[4\]"),
    (change(shape=[3], data=[1, 2, 3]), r"'score' has the shape \[3\], expected \[4\]"),
    (change(data=[1, 2, 3]), "'score' has 3 numbers, expected 4"),
    (lambda _, answer: answer["outputs"][0].pop("data") and None, "its data is no list"),
    (change(data=True), "'score' does not hold FP32 numbers .its data is no list"),
    (change(data=["a", "b", "c", "d"]), "'score' does not hold FP32 numbers"),
    (change(data=[[1], [2, 3], [4]]), "'score' does not hold FP32 numbers"),
    (change(data=[10**400, 2, 3, 4]), "'score' does not hold FP32 numbers"),
    (change(datatype=["FP32"]), r"has the datatype \['FP32'\], expected e.g. 'FP32'"),
    (change(parameters=[16]), "'parameters' are no JSON object"),
    (change(datatype="BYTES"), "has the datatype 'BYTES', expected e.g. 'FP32'"),
    (change(parameters={"binary_data_size": 16}), "binary_data_size is 16, but 0 bytes are left"),
    (
      lambda handler, _: handler.answer(200, b"<html>") or True,
      "expected JSON, got b'<html>'; correct the server",
    ),
    (
      lambda handler, answer: (
        handler.answer(
          200, json.dumps(answer).encode() + b"1234", {open_inference.JSON_LENGTH: "9999"}
        )
        or True
      ),
      "Inference-Header-Content-Length is '9999', of",
    ),
  ],
)
def test_what_is_wrong_stops_at_once_in_one_line(faulty, act, message):
  faulty.script = [act]
  with pytest.raises(RewardError, match=message) as error:
    ask(faulty)
  assert "\n" not in str(error.value)
  assert faulty.requests == 1


def test_null_and_a_column_are_scores(faulty):
  faulty.script = [change(shape=[4, 1], data=[[1], [None], [2.5], [float("nan")]])]
  np.testing.assert_array_equal(ask(faulty)[1], np.array([1, np.nan, 2.5, np.nan], np.float32))


def test_retries_are_bounded_and_one_thread_speaks_for_all(faulty):
  faulty.script = [status(500, "out of memory")]
  with pytest.raises(RewardError, match=r"failed 4 time\(s\) .*\(last: HTTP 500: out of memory\)"):
    ask(faulty, "?in_flight=4&format=json&batch_size=1&retries=3", size=32)
  # Four threads, each with four tries at its first request of eight at most.
  time.sleep(0.3)
  assert 4 <= faulty.requests <= 16


def test_a_token_is_sent_and_never_shown(faulty, monkeypatch):
  monkeypatch.setenv("SCORER_TOKEN", "s3cret")
  faulty.script = [status(401, "bad token s3cret")]
  with pytest.raises(RewardError, match=r"HTTP 401: bad token \*\*\*") as error:
    ask(faulty, f"{ONE}&token_env=SCORER_TOKEN")
  assert "s3cret" not in str(error.value)
  assert set(faulty.authorizations) == {"Bearer s3cret"}
  monkeypatch.delenv("SCORER_TOKEN")
  with pytest.raises(UserError, match="set the environment variable SCORER_TOKEN to the server's"):
    ask(faulty, f"{ONE}&token_env=SCORER_TOKEN")
  faulty.authorizations.clear()
  faulty.script = [fine]
  ask(faulty)
  assert set(faulty.authorizations) == {None}


def test_pixels_as_bytes(faulty):
  images, text = {"name": "images", "datatype": "UINT8", "shape": [-1, 4, 4, 3]}, {}
  faulty.about = {"inputs": [images], "outputs": []}
  reward = catalog.make_reward(f"{faulty.address}?output=score")
  pixels, prompts, _ = batch(2)
  found = reward.score.__self__._tensors(pixels, prompts, [text, text])
  assert [tensor.name for tensor in found] == ["images"]
  np.testing.assert_array_equal(found[0].values, np.round(pixels * 255).astype(np.uint8))
  with pytest.raises(RewardError, match="takes images of 4 x 4, but these are 2 x 4: let the"):
    scored(reward, pixels[:, :2], prompts)


# What is refused at the start.


def tensor(name, datatype, *shape):
  return {"name": name, "datatype": datatype, "shape": list(shape)}


IMAGES = tensor("images", "FP32", -1, -1, -1, 3)


@pytest.mark.parametrize(
  ("inputs", "options", "message"),
  [
    ([tensor("image", "FP32", -1, -1, -1, 3)], "", "no input 'images': give images=..., did you"),
    ([IMAGES, tensor("mask", "FP32", -1)], "", "has an input 'mask', which a reward cannot fill"),
    ([tensor("images", "FP32", -1, 3, 64, 64)], "", r"shape \[-1, 3, 64, 64\], expected \[-1, H"),
    ([tensor("images", "FP32", 8, 64, 64, 3)], "", r"shape \[8, 64, 64, 3\], expected \[-1, H"),
    ([tensor("images", "FP64", -1, 64, 64, 3)], "", "'images' is FP64: let it be FP32 in"),
    ([IMAGES], "&datatype=UINT8", "'images' is FP32: leave out datatype=UINT8"),
    ([IMAGES], "&prompts=texts", "no input 'texts': give prompts=..., use one of images"),
    ([IMAGES, tensor("prompts", "FP32", -1)], "", r"is FP32\[-1\], expected BYTES\[-1\]"),
    ([IMAGES], "&prompts=images", "two inputs have the same name"),
    ([IMAGES], "&output=scores", "no output 'scores': give output=..., did you mean score"),
    ([IMAGES], "&output=boxes", r"'boxes' is FP32\[-1, 4\]: let it be one number for each image"),
  ],
)
def test_models_that_do_not_fit(faulty, inputs, options, message):
  outputs = [tensor("score", "FP32", -1), tensor("boxes", "FP32", -1, 4)]
  faulty.about = {"inputs": inputs, "outputs": outputs}
  with pytest.raises(UserError, match=message) as error:
    catalog.make_reward(f"{faulty.address}?start_s=0{options}")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("inputs", "texts"),
  [
    ([], [("prompts", "prompts", ())]),
    ([IMAGES], []),
    ([IMAGES, tensor("prompts", "BYTES", -1)], [("prompts", "prompts", ())]),
    ([IMAGES, tensor("metadata", "BYTES", -1, 1)], [("metadata", "metadata", (1,))]),
  ],
)
def test_texts_are_sent_where_they_are_declared(faulty, inputs, texts):
  faulty.about = {"inputs": inputs, "outputs": None}
  reward = catalog.make_reward(faulty.address)
  assert reward.score.__self__.inputs == remote_model.Inputs("images", "FP32", (-1, -1), texts)


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("http://h/v1/models/m", "is no address of a model: write http://host:port/v2/models/NAME"),
    ("http://h:x/v2/models/m", "is no address of a model"),
    ("http:///v2/models/m", "is no address of a model"),
    ("http://h/v2/models/m/infer", "is no address of a model"),
    ("http://me:pw@h/v2/models/m", "reward to h: an address is shown and stored, so give no passw"),
    ("http://h/v2/models/m?batch_size=0", "batch_size must be 1 or more"),
    ("http://h/v2/models/m?timeout_s=0", "timeout_s must be greater than 0"),
    ("http://h/v2/models/m?formt=json", "unknown option 'formt', did you mean format?"),
  ],
)
def test_addresses_that_are_refused(spec, message):
  with pytest.raises(UserError, match=message) as error:
    catalog.make_reward(spec)
  assert "pw" not in str(error.value).replace("passw", "")


def test_servers_that_are_no_inference_servers(faulty, tmp_path):
  with pytest.raises(UserError, match=r"no such model \(HTTP 404: there is no /v2/models/n here"):
    catalog.make_reward(faulty.address[:-1] + "n")
  with pytest.raises(UserError, match=r"no /v2/health/ready \(HTTP 404: .*give the address of a"):
    catalog.make_reward(faulty.address.replace("/v2", "/prefix/v2"))
  faulty.about = ["m"]
  with pytest.raises(UserError, match="does not describe a model"):
    catalog.make_reward(faulty.address)
  faulty.close()
  with pytest.raises(UserError, match="Connection refused.: start the server, or correct the"):
    catalog.make_reward(f"{faulty.address}?start_s=0")


def test_the_start_waits_for_the_server(models):
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  made = []
  address = f"http://127.0.0.1:{port}/v2/models/score"
  waiting = threading.Thread(target=lambda: made.append(catalog.make_reward(address)))
  waiting.start()
  time.sleep(0.1)
  with process(models, "score", port):
    waiting.join(20)
  assert isinstance(made[0], Reward)


# The messages, byte by byte.


def test_a_request():
  inputs = [
    open_inference.Tensor("x", "FP32", (2,), np.array([0.1, 2], np.float32)),
    open_inference.Tensor("s", "BYTES", (2,), ["é", ""]),
  ]
  body, headers = open_inference.encode("7", inputs, "y", binary=False)
  assert headers == {"Content-Type": "application/json"}
  assert json.loads(body) == {
    "id": "7",
    "inputs": [
      {"name": "x", "datatype": "FP32", "shape": [2], "data": [float(np.float32(0.1)), 2.0]},
      {"name": "s", "datatype": "BYTES", "shape": [2], "data": ["é", ""]},
    ],
    "outputs": [{"name": "y"}],
  }
  body, headers = open_inference.encode("7", inputs, "y", binary=True)
  length = int(headers["Inference-Header-Content-Length"])
  assert json.loads(body[:length]) == {
    "id": "7",
    "inputs": [
      {"name": "x", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}},
      {"name": "s", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": 10}},
    ],
    "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
  }
  # 0.1 and 2 in IEEE 754, little-endian; the two bytes of 'é' behind their number; no bytes.
  assert body[length:].hex() == "cdcccc3d" + "00000040" + "02000000" + "c3a9" + "00000000"


def test_a_binary_answer():
  output = {"name": "y", "datatype": "FP16", "shape": [2], "parameters": {"binary_data_size": 4}}
  other = {"name": "z", "datatype": "INT8", "shape": [3], "parameters": {"binary_data_size": 3}}
  text = json.dumps({"id": "7", "outputs": [other, output]}).encode()
  # 1.5 and -2 in half precision.
  data = text + bytes([1, 2, 3]) + bytes.fromhex("003e" + "00c0")
  headers = {"Inference-Header-Content-Length": str(len(text))}
  found = open_inference.decode(data, headers, request_id="7", output="y", count=2)
  np.testing.assert_array_equal(found, [1.5, -2])
  for wrong, message in (
    (data + b"1", "1 bytes are left over"),
    (data[:-1], "binary_data_size is 4, but 3 bytes are left"),
  ):
    with pytest.raises(ValueError, match=message):
      open_inference.decode(wrong, headers, request_id="7", output="y", count=2)


# Another server.

MLSERVER_MODEL = """
import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import InferenceResponse

class Scorer(MLModel):
  async def load(self):
    return True

  async def predict(self, payload):
    inputs = {tensor.name: tensor for tensor in payload.inputs}
    images = NumpyCodec.decode_input(inputs["images"])
    prompts = StringCodec.decode_input(inputs["prompts"])
    scores = images[:, 0, 0, 0] + 10 * np.array([len(text) for text in prompts], np.float32)
    outputs = [NumpyCodec.encode_output("score", scores.astype(np.float32))]
    return InferenceResponse(id=payload.id, model_name=self.name, outputs=outputs)
"""


@pytest.mark.skipif(not shutil.which("mlserver"), reason="mlserver is not installed")
def test_mlserver(tmp_path, monkeypatch):
  monkeypatch.setattr(http_client, "_LONGEST_WAIT_S", 0.5)
  (tmp_path / "model.py").write_text(MLSERVER_MODEL)
  text = {"name": "prompts", "datatype": "BYTES", "shape": [-1]}
  settings = {"name": "scorer", "implementation": "model.Scorer", "inputs": [IMAGES, text]}
  settings["outputs"] = [tensor("score", "FP32", -1)]
  (tmp_path / "model-settings.json").write_text(json.dumps(settings))
  with contextlib.ExitStack() as stack:
    sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
    ports = [each.getsockname()[1] for each in sockets]
  ports = dict(zip(("http_port", "grpc_port", "metrics_port"), ports, strict=True))
  (tmp_path / "settings.json").write_text(
    json.dumps({"host": "127.0.0.1", "parallel_workers": 0, "debug": False, **ports})
  )

  def start():
    running = subprocess.Popen(
      ["mlserver", "start", "."], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    try:
      yield running
    finally:
      running.kill()
      running.wait()

  server_process = contextlib.contextmanager(start)
  address = f"http://127.0.0.1:{ports['http_port']}/v2/models/scorer"
  images, prompts, _ = batch(32)
  expected = images[:, 0, 0, 0] + 10 * np.array([len(prompt.text) for prompt in prompts], "f4")
  with contextlib.ExitStack() as stack:
    running = stack.enter_context(server_process())
    reward = catalog.make_reward(f"{address}?batch_size=2&start_s=60&retries=1000")
    np.testing.assert_array_equal(scored(reward, images, prompts, 60), expected)
    running.kill()
    running.wait()
    stack.enter_context(server_process())
    np.testing.assert_array_equal(scored(reward, images, prompts, 60), expected)
  with pytest.raises(UserError, match="Connection refused"):
    catalog.make_reward(f"{address}?start_s=0")
