"""Vision-language models on OpenAI-compatible servers: one on the loopback, and its faults."""

import base64
from http import server
import io
import json
import math
import threading
import time

import numpy as np
import PIL.Image
import pytest
from remote_cases import dribbling, dropped, fine, hanging, scored, status, truncated

from rlft import catalog
from rlft.rewards.remote import client as http_client
from rlft.rewards.remote import vlm
from rlft.rewards.scoring import trial
from rlft.rewards.scoring.errors import RewardError
from rlft.types import Prompt, UserError

MODEL = "org/judge"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """Waits in the place of seconds, so that the tests take few."""
  monkeypatch.setattr(http_client, "_FIRST_WAIT_S", 0.01)
  monkeypatch.setattr(http_client, "_LONGEST_WAIT_S", 0.1)


class Judge:
  """A server that says 'Yes' as probably as an image is red, where the question names its prompt.

  Attributes:
    script: faults, one for each completion; the last one stays.
    asked: (question, the image's mean red) of each completion.
    authorizations: the headers of that name.
  """

  def __init__(self, port=0):
    self.script, self.asked, self.authorizations = [fine], [], []
    self.dead = False
    judge, lock = self, threading.Lock()

    class Handler(server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def log_message(self, *_):
        pass

      def answer(self, code, data, headers=None):
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
          self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

      def do_GET(self):
        judge.authorizations.append(self.headers.get("Authorization"))
        if self.path == "/v1/models":
          self.answer(200, json.dumps({"object": "list", "data": [{"id": MODEL}]}).encode())
        else:
          self.answer(404, b'{"error": {"message": "Not Found"}}')

      def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        image, text = asked["messages"][0]["content"]
        data = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
        red = np.asarray(PIL.Image.open(io.BytesIO(data)))[..., 0].mean() / 255
        assert self.path == "/v1/chat/completions" and asked["model"] == MODEL
        assert asked["max_tokens"] == 1 and asked["logprobs"] and asked["temperature"] == 0
        if judge.dead:  # The threads of open connections outlive a server.
          dropped(self, {})
          return
        with lock:
          judge.asked.append((text["text"], red))
          act = judge.script.pop(0) if len(judge.script) > 1 else judge.script[0]
        answer = completion({"Yes": 0.75 * red, " yes": 0.25 * red, "No": 1 - red})
        if not act(self, answer):
          self.answer(200, json.dumps(answer).encode())

    self.running = server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    self.running.daemon_threads = True
    self.port = self.running.server_port
    self.address = f"vlm://127.0.0.1:{self.port}/{MODEL}"
    threading.Thread(target=self.running.serve_forever, args=(0.01,), daemon=True).start()

  def close(self):
    self.dead = True
    self.running.shutdown()
    self.running.server_close()


def completion(probabilities):
  """A chat completion of one token, with those of the most probable ones."""
  listed = [
    {"token": token, "logprob": math.log(max(p, 1e-30)), "bytes": list(token.encode())}
    for token, p in probabilities.items()
  ]
  content = [{**listed[0], "top_logprobs": listed}]
  message = {"role": "assistant", "content": listed[0]["token"]}
  return {"choices": [{"index": 0, "message": message, "logprobs": {"content": content}}]}


@pytest.fixture
def judge():
  running = Judge()
  yield running
  running.close()


def red(size):
  """Images as red as their place says, and their prompts."""
  levels = np.round(np.linspace(0, 1, size) * 255) / 255
  images = np.zeros((size, 4, 4, 3), np.float32)
  images[..., 0] = levels[:, None, None]
  return images, [Prompt(f"prompt {i}", {"objects": ["dog", f"car {i}"]}) for i in range(size)]


ONE = "?in_flight=1&timeout_s=1.5"


def test_the_score_is_the_probability_of_the_answer(judge):
  images, prompts = red(12)
  images[3, 0, 0, 0] = np.nan
  found = scored(catalog.make_reward(f"{judge.address}?in_flight=4"), images, prompts)
  # 'Yes' and ' yes' are the same word; of what is not finite nothing is asked.
  expected = np.where(np.arange(12) == 3, np.nan, images[:, 1, 1, 0])
  np.testing.assert_allclose(found, expected, atol=1e-6)
  asked = sorted(judge.asked, key=lambda one: one[1])
  questions = [f'Does this image show "prompt {i}"? Answer with yes or no.' for i in range(12)]
  assert [text for text, _ in asked] == questions[:3] + questions[4:]


def test_a_question_of_ones_own(judge):
  images, prompts = red(2)
  asked = "&question=Is there a {objects} in {prompt}%3F&answer=no"
  found = scored(catalog.make_reward(judge.address + ONE + asked), images, prompts)
  np.testing.assert_allclose(found, [1, 0], atol=1e-6)
  assert judge.asked[1][0] == "Is there a dog, car 1 in prompt 1?"
  with pytest.raises(RewardError, match="'prompt 0' has no 'colour' in its metadata, which quest"):
    scored(catalog.make_reward(f"{judge.address}?question={{colour}}"), images, prompts)


@pytest.mark.parametrize(
  ("mean", "expected"), [("arithmetic", 0.5), ("geometric", 0.4**0.5 * 0.6**0.5)]
)
def test_questions_from_the_metadata(judge, mean, expected):
  image = np.zeros((1, 2, 2, 3), np.float32)
  image[..., 0] = 0.4  # 102 of 255
  prompts = [Prompt("p", {"vqa_list": [["Is it red?", "Yes"], ["Is it blue?", "no"]]})]
  reward = catalog.make_reward(f"{judge.address}{ONE}&questions=vqa_list&mean={mean}")
  np.testing.assert_allclose(scored(reward, image, prompts), [expected], rtol=1e-5)
  assert [text for text, _ in judge.asked] == ["Is it red?", "Is it blue?"]
  # Nothing to ask is nothing to score; a run without any questions is refused.
  assert np.isnan(scored(reward, image, [Prompt("p")])).all()
  uses = [trial.Use("--eval", reward, [Prompt("p")], 1)]
  with pytest.raises(UserError, match="needs 'vqa_list' in the prompts' metadata"):
    trial.try_each(uses, image_shape=(2, 2, 3), timeout_s=9)
  with pytest.raises(RewardError, match=r"has 'Is it' among its vqa_list: write pairs of texts"):
    scored(reward, image, [Prompt("p", {"vqa_list": ["Is it"]})])


@pytest.mark.parametrize(
  "faults",
  [[status(503)], [status(429, Retry_After="0"), truncated], [dropped], [hanging], [dribbling]],
  ids=["503", "429 truncated", "dropped", "hanging", "dribbling"],
)
def test_what_may_pass_is_tried_again(judge, faults):
  images, prompts = red(2)
  judge.script = [*faults, fine]
  found = scored(catalog.make_reward(judge.address + ONE), images, prompts)
  np.testing.assert_allclose(found, [0, 1], atol=1e-6)
  assert len(judge.asked) == len(faults) + 2


def first(answer):
  return answer["choices"][0]["logprobs"]["content"][0]


@pytest.mark.parametrize(
  ("act", "message"),
  [
    (status(400, "no images"), r"refused a question \(HTTP 400: no images\): correct that"),
    (lambda handler, _: handler.answer(200, b"<html>") or True, "expected JSON, got b'<html>'; co"),
    (lambda _, answer: answer.update(choices=[]), "expected a JSON object with 'choices'"),
    (
      lambda _, answer: answer["choices"][0].update(logprobs=None),
      r"got logprobs=null: let the server send 20 \(of vLLM --max-logprobs=20\)",
    ),
    (lambda _, answer: first(answer).update(top_logprobs=None), "expected top_logprobs of a token"),
    (lambda _, answer: first(answer).update(top_logprobs=[]), "top_logprobs is empty"),
    (lambda _, answer: first(answer)["top_logprobs"][2].update(logprob="0"), "got 'No': '0'"),
    (
      lambda _, answer: first(answer)["top_logprobs"][2].update(logprob=0.5),
      "'No' has the log-prob",
    ),
    (
      lambda _, answer: first(answer)["top_logprobs"][2].update(logprob=10**400),
      "'No' has the log",
    ),
    (
      lambda _, answer: [one.update(logprob=0) for one in first(answer)["top_logprobs"]] and None,
      "the tokens of 'yes' have a probability of 2, more than 1",
    ),
  ],
)
def test_what_is_wrong_stops_at_once_in_one_line(judge, act, message):
  judge.script = [act]
  images, prompts = red(2)
  with pytest.raises(RewardError, match=message) as error:
    scored(catalog.make_reward(judge.address + ONE), images, prompts)
  assert "\n" not in str(error.value) and "then run the same command again" in str(error.value)
  assert len(judge.asked) == 1


def test_nan_is_not_scored_and_what_is_not_listed_is_0(judge):
  judge.script = [
    lambda _, answer: first(answer)["top_logprobs"][2].update(logprob=float("nan")),
    lambda _, answer: first(answer).update(top_logprobs=[{"token": "Maybe", "logprob": -0.1}]),
    lambda _, answer: first(answer)["top_logprobs"][0].update(logprob=-math.inf),
    lambda _, answer: first(answer)["top_logprobs"][0].update(logprob=-(10**400)),
  ]
  images, prompts = red(4)
  images[...] = 1
  found = scored(catalog.make_reward(judge.address + ONE), images, prompts)
  np.testing.assert_allclose(found, [np.nan, 0, 0.25, 0.25], rtol=1e-6)


def test_a_server_that_dies_and_comes_back(judge):
  images, prompts = red(4)
  reward = catalog.make_reward(f"{judge.address}?in_flight=2&retries=1000&deadline_s=2")
  judge.close()
  start = time.monotonic()
  with pytest.raises(RewardError, match=r"\(last: .*\): restart the server, then run the same"):
    scored(reward, images, prompts)
  assert time.monotonic() - start < 10  # Seconds, on a machine that is busy.
  again = Judge(judge.port)
  try:
    np.testing.assert_allclose(scored(reward, images, prompts), images[:, 0, 0, 0], atol=1e-6)
  finally:
    again.close()


def test_a_token_is_sent(judge, monkeypatch):
  monkeypatch.setenv("JUDGE_TOKEN", "s3cret")
  catalog.make_reward(f"{judge.address}?token_env=JUDGE_TOKEN")
  assert judge.authorizations == ["Bearer s3cret"]


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("vlm://h", "is no address of a model: write vlm://host:port/MODEL"),
    ("vlm://h:x/m", "is no address of a model"),
    ("vlm://me:pw@h/m", "reward to h: an address is shown and stored, so give no password"),
    ("vlm://h/m?in_flight=0", "in_flight must be 1 or more"),
    ("vlm://h/m?answer= ", "answer=  is not one word: write answer=yes"),
    ("vlm://h/m?answer=of course", "answer=of course is not one word"),
    ("vlm://h/m?api=v1", "api=v1 is no path: write api=/v1"),
    ("vlm://h/m?questions=q&answer=no", "takes questions and answers from the metadata"),
    ("vlm://h/m?mean=mean", "mean=mean is not known"),
  ],
)
def test_what_is_refused_at_the_start(spec, message):
  with pytest.raises(UserError, match=message) as error:
    catalog.make_reward(spec)
  assert "\n" not in str(error.value)


def test_a_server_without_the_model(judge):
  with pytest.raises(UserError, match=r"has no model 'other' \(it has org/judge\): give one that"):
    catalog.make_reward(judge.address.replace(MODEL, "other"))
  with pytest.raises(UserError, match=r"/v2/models lists no models \(HTTP 404: .*Not Found.*api="):
    catalog.make_reward(f"{judge.address}?api=/v2")
  judge.close()
  with pytest.raises(UserError, match="start the server, or correct the address"):
    catalog.make_reward(f"{judge.address}?start_s=0")


def test_probability():
  body = json.dumps(completion({"four": 0.5, "4": 0.25, " Four": 0.125})).encode()
  assert vlm.probability(body, "Four ") == pytest.approx(0.625)
