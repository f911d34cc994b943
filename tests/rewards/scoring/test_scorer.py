"""Batches on a mesh: the right score to the right image, deadlines, and rewards that fail."""

import dataclasses
import os
import re
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from rlft import catalog
from rlft.parallel import processes
from rlft.rewards import parity
from rlft.rewards.scoring import scorer as scoring
from rlft.types import HostReward, JaxReward, Prompt, Scores, UserError

B, G = 48, 4


def batch_sharding(devices, axes=("data", "fsdp")):
  shape = (devices // 2, 2) if devices > 1 else (1, 1)
  mesh = jax.make_mesh(
    shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:devices]
  )
  return NamedSharding(mesh, PartitionSpec(axes))


def batch(sharding, size=B, group=1):
  """Images whose pixels are their row number / size, and prompts with the number of their set."""
  rows = np.arange(size, dtype=np.float32)[:, None, None, None] / size
  images = jax.device_put(np.broadcast_to(rows, (size, 4, 4, 3)), sharding)
  return images, [Prompt(f"set {i // group}", {"set": i // group}) for i in range(size)]


def run(reward, devices=8, size=B, group=1, threads=3, timeout_s=30.0, axes=("data", "fsdp")):
  sharding = batch_sharding(devices, axes)
  with scoring.Scorer(
    reward,
    batch_size=size,
    images_per_prompt=group,
    batch_sharding=sharding,
    timeout_s=timeout_s,
    threads=threads,
  ) as scorer:
    scores = scorer.score(*batch(sharding, size, group)).values
  assert scores.shape == (size,) and scores.dtype == jnp.float32
  assert scores.sharding.is_equivalent_to(sharding, 1)
  return np.asarray(scores)


def host_reward(images, prompts, metadata):
  """row / B + 100 * set, from three sources that must agree."""
  assert isinstance(images, np.ndarray) and images.dtype == np.float32
  assert prompts == [f"set {known['set']}" for known in metadata]
  images += 0  # Its own copy, so it may be written to.
  sets = np.array([int(prompt.split()[1]) for prompt in prompts])
  return images.reshape(len(prompts), -1).mean(axis=1) + 100 * sets


def jax_reward(params, images, features):
  brightness = images.reshape(len(images), -1).mean(axis=1)
  return brightness + params * features.reshape(len(images), -1).mean(axis=1)


def prepare(prompts, metadata):
  return np.array([known["set"] for known in metadata], np.float32)


def make(kind, is_set):
  if kind == "host":
    return HostReward("h", host_reward, is_set=is_set)
  return JaxReward("j", jax_reward, is_set=is_set, prepare=prepare, params=jnp.float32(100))


@pytest.mark.parametrize("kind", ["host", "jax"])
@pytest.mark.parametrize("axes", [("data", "fsdp"), "data"])  # "data": each row has two replicas.
def test_each_image_gets_its_own_score(kind, axes):
  expected = np.arange(B) / B + 100 * (np.arange(B) // G)
  scores = run(make(kind, is_set=False), group=G, axes=axes)
  np.testing.assert_allclose(scores, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["host", "jax"])
@pytest.mark.parametrize("size", [B, 24])  # 12 and 6 sets: neither is a multiple of 8 devices.
def test_each_image_of_a_set_gets_the_score_of_the_set(kind, size):
  sets = np.arange(size).reshape(-1, G)
  expected = sets.mean(axis=1) / size + 100 * np.arange(size // G)
  scores = run(make(kind, is_set=True), size=size, group=G)
  np.testing.assert_allclose(scores, np.repeat(expected, G), rtol=1e-6)


@pytest.mark.parametrize("kind", ["host", "jax"])
@pytest.mark.parametrize("is_set", [False, True])
def test_one_device_and_eight_agree(kind, is_set):
  one, eight = (run(make(kind, is_set), devices, group=G) for devices in (1, 8))
  np.testing.assert_allclose(one, eight, rtol=1e-6)


def test_parity_on_eight_devices_moves_no_images():
  """5 sets of 8 images on 8 devices, so sets and devices do not match."""

  def classify(params, images):
    return images.mean(axis=(1, 2)) @ params

  sharding = batch_sharding(8)
  images = np.random.default_rng(0).random((40, 16, 16, 3), np.float32)
  weights = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
  scorer = scoring.Scorer(
    parity.parity_reward(classify, "p", weights),
    batch_size=40,
    images_per_prompt=8,
    batch_sharding=sharding,
    timeout_s=1,
    threads=1,
  )
  images = jax.device_put(images, sharding)
  scores = scorer.score(images, [Prompt("p")] * 40).values
  program = scorer._scorer._apply.lower(scorer._scorer._params, images, None).compile().as_text()
  moved = re.findall(r"= (\S+) (?:all-gather|all-to-all|collective-permute)\(", program)
  assert all(shape.startswith("f32[40,4]") for shape in moved), moved  # Probabilities at most.
  probs = (images.mean(axis=(1, 2)) @ weights).reshape(5, 8, 4)
  np.testing.assert_allclose(scores[::8], -parity.statistical_parity(probs), atol=1e-6)


def test_a_jax_reward_is_compiled_once():
  traces = []

  def score(*arrays):
    traces.append(1)
    return jax_reward(*arrays)

  sharding = batch_sharding(8)
  scorer = scoring.Scorer(
    dataclasses.replace(make("jax", True), score=score),
    batch_size=B,
    images_per_prompt=G,
    batch_sharding=sharding,
    timeout_s=1,
    threads=1,
  )
  for _ in range(3):
    scorer.score(*batch(sharding, group=G))
  assert len(traces) == 1


def test_sets_are_never_cut_and_threads_share_the_work():
  calls, both = [], threading.Barrier(2, timeout=20)

  def score(images, prompts, metadata):
    both.wait()  # Returns only if two calls run at once.
    calls.append((images.shape, threading.current_thread().name))
    return np.zeros(len(prompts))

  run(HostReward("h", score, is_set=True), size=40, group=8, threads=2)
  assert sorted(shape for shape, _ in calls) == [(2, 8, 4, 4, 3), (3, 8, 4, 4, 3)]
  assert len({name for _, name in calls}) == 2


def test_starting_returns_before_the_scores_are_there():
  go = threading.Event()

  def score(images, prompts, metadata):
    assert go.wait(20)
    return np.zeros(len(prompts))

  sharding = batch_sharding(8)
  with scoring.Scorer(
    HostReward("h", score),
    batch_size=B,
    images_per_prompt=1,
    batch_sharding=sharding,
    timeout_s=20,
    threads=2,
  ) as scorer:
    finish = scorer.start(*batch(sharding))
    go.set()
    np.testing.assert_array_equal(finish().values, np.zeros(B))


@pytest.mark.parametrize("kind", ["host", "jax"])
def test_what_cannot_be_scored_is_nan_and_counted(kind):
  values = np.array([1, np.nan, np.inf, -np.inf, 5, 6, 7, 8], np.float32)
  if kind == "host":
    reward = HostReward("h", lambda images, *_: values[np.int32(images[:, 0, 0, 0] * 8)])
  else:
    reward = JaxReward("j", lambda params, images, features: jnp.asarray(values))
  scores = run(reward, size=8)
  np.testing.assert_array_equal(scores, [1, np.nan, np.nan, np.nan, 5, 6, 7, 8])


def test_the_deadline_stops_a_reward_that_hangs():
  def score(images, prompts, metadata):
    if images[0, 0, 0, 0] >= 0.5:
      time.sleep(60)
    return np.zeros(len(prompts))

  start = time.monotonic()
  with pytest.raises(scoring.RewardError, match=r"'slow' scored 1 of the 2 parts .* in 1.5 s: see"):
    run(HostReward("slow", score), threads=2, timeout_s=1.5)
  assert time.monotonic() - start < 10


def test_a_hanging_reward_does_not_keep_the_process_alive(tmp_path):
  code = """
import time
import numpy as np
from rlft.rewards.scoring import host
from rlft.types import HostReward, Prompt
reward = HostReward("h", lambda *_: time.sleep(600))
caller = host.HostCaller(reward, timeout_s=0.1, threads=2)
try:
  caller.finish(caller.start(np.zeros((2, 1, 1, 3)), [Prompt("a"), Prompt("b")]))
except host.errors.RewardError as error:
  print(error)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
  assert done.returncode == 0 and "0 of the 2 parts" in done.stdout, done.stderr


@pytest.mark.parametrize("kind", ["host", "jax"])
def test_a_reward_that_raises_is_named_with_the_line(tmp_path, kind):
  path = tmp_path / "bad.py"
  arguments = "images, prompts, metadata" if kind == "host" else "images"
  path.write_text(f"import json\n\ndef f({arguments}):\n  return json.loads('{{')\n")
  with pytest.raises(scoring.RewardError) as error:
    run(catalog.make_reward(f"{kind}:{path}:f"))
  assert f"reward '{kind}:{path}:f' raised JSONDecodeError: Expecting" in str(error.value)
  assert f"({path}:4); correct that" in str(error.value) and "\n" not in str(error.value)


class Tensor:
  """As PyTorch's that has a gradient, is on an accelerator and of a type that numpy lacks."""

  def __init__(self, values, *done):
    self._values, self._done = values, done

  def __array__(self, *_, **__):
    raise TypeError("can't convert cuda:0 device type tensor to numpy")

  def __getattr__(self, name):
    if name not in ("detach", "cpu", "float"):
      raise AttributeError(name)
    return lambda: Tensor(self._values, *self._done, name)

  def numpy(self):
    if "float" not in self._done:
      raise TypeError("Got unsupported ScalarType BFloat16")
    assert {"detach", "cpu"} < set(self._done)
    return np.asarray(self._values, np.float32)


@pytest.mark.parametrize("several", [False, True])
def test_a_host_reward_may_return_a_tensor(several):
  def score(images, *_):
    values = images[:, 0, 0, 0]
    return [Tensor(value) for value in values] if several else Tensor(values)

  np.testing.assert_allclose(run(HostReward("h", score)), np.arange(B) / B)


def test_a_host_reward_may_return_more_than_scores():
  def score(images, prompts, metadata):
    rows = images[..., 0, 0, 0]
    return Scores(rows, whole=rows.mean(1).tolist(), found=rows < 0.5)

  sharding = batch_sharding(8)
  with scoring.Scorer(
    HostReward("h", score, is_set=True),
    batch_size=B,
    images_per_prompt=G,
    batch_sharding=sharding,
    timeout_s=30,
    threads=3,
  ) as scorer:
    found = scorer.score(*batch(sharding, group=G))
  rows = np.arange(B) / B
  np.testing.assert_allclose(found.values, rows)
  np.testing.assert_allclose(found.whole, rows.reshape(-1, G).mean(1).repeat(G), rtol=1e-6)
  np.testing.assert_array_equal(found.found, rows < 0.5)


def test_what_only_some_parts_of_a_batch_say_is_left_out():
  def score(images, prompts, metadata):
    values = images[:, 0, 0, 0]
    return Scores(values, found=values > 0) if values.min() > 0.5 else values

  scores = run(HostReward("h", score), threads=4)
  np.testing.assert_allclose(scores, np.arange(B) / B)


@pytest.mark.parametrize(
  ("score", "found"),
  [
    (lambda images, *_: images.mean(axis=(1, 2)), "float32[16, 3]"),
    (lambda images, *_: images.mean(), "float32[]"),
    (lambda images, *_: np.zeros(len(images) + 1), "float64[17]"),
    (lambda images, *_: ["good"] * len(images), "<U4[16]"),
    (lambda images, *_: None, "object[]"),
  ],
)
def test_a_host_reward_that_returns_something_else(score, found):
  with pytest.raises(scoring.RewardError) as error:
    run(HostReward("h", score), threads=3)
  assert f"'h' returned {found}, expected float32[16]: return one number" in str(error.value)


@pytest.mark.parametrize(
  ("score", "found"),
  [
    (lambda params, images, features: images.mean(), "float32[]"),
    (lambda params, images, features: 1.0, "float"),
  ],
)
def test_a_jax_reward_that_returns_something_else(score, found):
  with pytest.raises(scoring.RewardError, match=f"'j' returned {found}".replace("[", r"\[")):
    run(JaxReward("j", score))


def test_prompts_that_another_process_cannot_use(monkeypatch):
  """All stop before any begins what only all can do."""

  def raise_together(failed, kind=UserError):
    assert failed is None
    raise kind("on process 1: reward 'j' cannot use its prompts")

  monkeypatch.setattr(processes, "raise_together", raise_together)
  with pytest.raises(scoring.RewardError, match="on process 1: reward 'j'"):
    run(make("jax", is_set=False))


def test_prompts_that_a_jax_reward_cannot_use():
  def refuse(prompts, metadata):
    raise UserError("the prompt 'x' names no objects: give it some")

  def short(prompts, metadata):
    return np.zeros(3)

  with pytest.raises(scoring.RewardError, match="^reward 'j': the prompt 'x' names no objects"):
    run(JaxReward("j", jax_reward, prepare=refuse))
  with pytest.raises(scoring.RewardError, match=r"prepare returned .* shape \[3\] for 48 prompts"):
    run(JaxReward("j", jax_reward, prepare=short))


def test_a_batch_that_is_not_made_of_whole_sets():
  with pytest.raises(UserError, match="sets of 7 images, but the batch has 48: make the batch"):
    run(make("host", True), group=7)


# Two processes with two devices each. The first argument is the process, the second the port.
TWO_PROCESSES = """
import sys
import jax
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[1]))
from jax.experimental import multihost_utils
import numpy as np
from rlft.rewards.scoring import scorer as scoring
from rlft.types import HostReward, JaxReward, Prompt, UserError

mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
sharding = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
rows = np.arange(16, dtype=np.float32)
images = jax.make_array_from_callback(
  (16, 2, 2, 3), sharding, lambda i: np.broadcast_to(rows[i[0], None, None, None], (4, 2, 2, 3)))
prompts = [Prompt(str(i // 4), {"set": i // 4}) for i in range(16)]

def scorer(reward, group=4):
  return scoring.Scorer(reward, batch_size=16, images_per_prompt=group, batch_sharding=sharding,
                        timeout_s=20, threads=2)

def host(images, prompts, metadata):
  return images.mean(axis=(1, 2, 3, 4)) + 100 * np.array([int(p) for p in prompts])

def in_jax(params, images, sets):
  return images.mean(axis=(1, 2, 3, 4)) + params * sets.mean(axis=1)

def prepare(prompts, metadata):
  return np.float32([m["set"] for m in metadata])

for reward in (HostReward("h", host, is_set=True),
               JaxReward("j", in_jax, is_set=True, prepare=prepare, params=np.float32(100))):
  scores = scorer(reward).score(images, prompts).values
  scores = multihost_utils.process_allgather(scores, tiled=True)
  np.testing.assert_allclose(scores, np.repeat([1.5, 105.5, 209.5, 313.5], 4))

def fails_on_process_1(images, prompts, metadata):
  assert images[0, 0, 0, 0] < 8, "too bright"
  return np.zeros(len(prompts))

try:
  scorer(HostReward("f", fails_on_process_1)).score(images, prompts)
except scoring.RewardError as error:
  assert "reward 'f' raised AssertionError: too bright" in str(error), error
  assert str(error).startswith("on process 1: ") == (jax.process_index() == 0), error
else:
  raise AssertionError("no error")

try:
  scorer(HostReward("h", host, is_set=True), group=16)
except UserError as error:
  assert "spread over two processes: make the batch size a multiple of 64" in str(error), error
else:
  raise AssertionError("no error")
print("all passed")
"""


def test_two_processes(tmp_path):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
  env = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", TWO_PROCESSES, str(i), port],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env=env,
    )
    for i in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=60)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert all("all passed" in output for output in outputs), "\n".join(outputs)
