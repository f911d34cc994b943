"""A vision-language model on an OpenAI-compatible server as a reward: vlm://host:port/MODEL?key=...

The server (vLLM, SGLang, llama.cpp, LMDeploy, a vendor's) is shown an image with a question, and
says how probable each next word is. The score is the probability of the expected answer as the
first token, whatever its case and the spaces around it: VQAScore (arXiv 2404.01291) is the question
whether the image shows its prompt. With several questions for each prompt, in its metadata, it is
Soft-TIFA (arXiv 2512.16853): their mean.

An answer is one token of the model. What is not among the tokens that the server lists counts as 0.
"""

import base64
from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
import re
from typing import Any, Literal
import urllib.parse

import numpy as np

from rlft.rewards import named
from rlft.rewards.remote import limits as limits_lib
from rlft.rewards.remote.client import Answer, Client
from rlft.rewards.remote.limits import Limits
from rlft.rewards.scoring.errors import RewardError
from rlft.storage import images as images_lib
from rlft.types import HostReward, UserError

QUESTION = 'Does this image show "{prompt}"? Answer with yes or no.'
ANSWER = "yes"
SCHEMES: Mapping[str, str] = {"vlm": "http", "vlms": "https"}
Mean = Literal["arithmetic", "geometric"]

_LISTED = 20  # Tokens with their log-probabilities: the most that OpenAI's protocol has.
_ROUNDING = 1e-2  # By which probabilities may exceed 1.
_FIELD = re.compile(r"\{(\w+)\}")
_GO_ON = "then run the same command again to go on"


def vlm_reward(
  spec: str,
  *,
  question: str = QUESTION,
  answer: str = ANSWER,
  questions: str = "",
  mean: Mean = "arithmetic",
  api: str = "/v1",
  in_flight: int = 16,
  timeout_s: float = 60.0,
  deadline_s: float | None = None,
  retries: int = 12,
  start_s: float = 20.0,
  token_env: str | None = None,
) -> HostReward:
  """Asks the server whether it has the model, and makes it a reward with scores in [0, 1].

  Args:
    spec: 'vlm://host:port/MODEL' (over https 'vlms://...'), then the options. MODEL is the name
      under which the server has it, and may hold slashes.
    question: asked about each image; {prompt} stands for its prompt, {KEY} for what its metadata
      has under KEY.
    answer: the word whose probability is the score, one token of the model.
    questions: the metadata's key of a list of pairs [question, answer], asked one by one in the
      place of `question`.
    mean: of the probabilities of several questions: 'arithmetic' counts what is right, 'geometric'
      is low as soon as one thing is wrong.
    api: what stands before '/chat/completions' in the server's addresses.
    in_flight: requests at once, from each process; the server batches them.
    timeout_s, deadline_s, retries, start_s, token_env: as of `reward.remote_reward`.

  Raises:
    UserError: a wrong address or option, or no such server or model.
  """
  limits = Limits(in_flight, timeout_s, deadline_s, retries, start_s)
  limits.check(spec)
  server, model = _split(spec)
  if len(answer.split()) != 1:
    raise UserError(f"reward {spec!r}: answer={answer} is not one word: write answer=yes")
  if api and not re.fullmatch(r"(/[^/?#\s]+)+", api):
    raise UserError(f"reward {spec!r}: api={api} is no path: write api=/v1")
  if questions and (question, answer) != (QUESTION, ANSWER):
    raise UserError(
      f"reward {spec!r}: questions={questions} takes questions and answers from the metadata: leave"
      " question and answer out"
    )
  client = Client(server + api, connections=in_flight, token=limits_lib.token(spec, token_env))
  judge = _Judge(client, model, question, answer, questions, mean, limits)
  try:
    judge.check()
  except RewardError as error:
    raise UserError(f"reward {spec!r}: {error}") from error
  return HostReward(spec, judge.score, threads=in_flight, needs=(questions,) if questions else ())


@dataclasses.dataclass(frozen=True)
class _Judge:
  """A model on a server, and what it is asked; see `vlm_reward`."""

  client: Client
  model: str
  question: str
  answer: str
  questions: str
  mean: Mean
  limits: Limits

  def check(self) -> None:
    """Raises `RewardError` if the server does not answer, or has not the model."""
    (found,) = self.client.ask("/models", start_s=self.limits.start_s)
    try:
      names = [one["id"] for one in json.loads(found.data)["data"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
      raise RewardError(
        f"{self.client.server}/models lists no models ({self.client.quote(found)}): give the"
        " address of an OpenAI-compatible server, and what stands before /models with api=..."
      ) from error
    if self.model not in names:
      raise RewardError(
        f"{self.client.server} has no model {self.model!r} (it has {', '.join(map(str, names[:5]))}"
        "): give one that it has"
      )

  def score(
    self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
  ) -> np.ndarray:
    """`[B, H, W, 3]` float32 in [0, 1] -> `[B]` float32; an image that is not finite is NaN."""
    started, deadline = self.limits.times()
    scores = np.full(len(images), np.nan, np.float32)
    for row in np.flatnonzero(np.isfinite(images).all(axis=(1, 2, 3))):
      asked = self._asked(prompts[row], metadata[row])
      if not asked:
        continue
      url = base64.b64encode(images_lib.encode_png(images[row])).decode()
      found = [
        self._ask(f"data:image/png;base64,{url}", *each, started, deadline) for each in asked
      ]
      scores[row] = _MEANS[self.mean](found)
    return scores

  def _asked(self, prompt: str, known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The questions about an image of this prompt, with their answers."""
    if not self.questions:
      return [(_filled(self.question, prompt, known), self.answer)]
    pairs = known.get(self.questions)
    pairs = [] if pairs is None else list(pairs)
    for pair in pairs:
      if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(x, str) for x in pair):
        raise RewardError(
          f"the prompt {prompt!r} has {pair!r} among its {self.questions}: write pairs of texts,"
          " [question, answer]"
        )
    return [(question, answer) for question, answer in pairs]

  def _ask(self, image: str, question: str, answer: str, started: float, deadline: float) -> float:
    """The probability of the answer."""
    content = [
      {"type": "image_url", "image_url": {"url": image}},
      {"type": "text", "text": question},
    ]
    request = {
      "model": self.model,
      "messages": [{"role": "user", "content": content}],
      "max_tokens": 1,
      "temperature": 0,
      "logprobs": True,
      "top_logprobs": _LISTED,
    }
    body = json.dumps(request).encode()

    def attempt(timeout_s: float) -> Answer:
      return self.client.request(
        "POST",
        "/chat/completions",
        body=body,
        headers={"Content-Type": "application/json"},
        timeout_s=timeout_s,
      )

    found = self.client.until_answered(
      attempt,
      timeout_s=self.limits.timeout_s,
      deadline=deadline,
      retries=self.limits.retries,
      started=started,
      remedy=f"restart the server, {_GO_ON}",
    )
    if found.status != 200:
      self.client.give_up(
        f"{self.client.server} refused a question ({self.client.quote(found)}): correct that,"
        f" {_GO_ON}"
      )
    try:
      return probability(found.data, answer)
    except ValueError as error:
      self.client.give_up(
        f"the answer of {self.client.server} is wrong: {str(error)[:150]}; correct the server,"
        f" {_GO_ON}"
      )


def probability(data: bytes, answer: str) -> float:
  """How probable an answer is, by the body of a chat completion.

  The sum over those listed tokens that are the answer but for case and spaces (' Yes', 'yes').

  Args:
    data: the body.
    answer: one word.

  Returns:
    A probability in [0, 1]; NaN where a log-probability is NaN.

  Raises:
    ValueError: it is no such body, or has no log-probabilities; the message says what came.
  """
  try:
    body = json.loads(data)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"expected JSON, got {data[:40]!r}") from error
  try:
    logprobs = body["choices"][0].get("logprobs")
  except (KeyError, IndexError, TypeError, AttributeError) as error:
    raise ValueError("expected a JSON object with 'choices'") from error
  try:
    listed = [(one["token"], one["logprob"]) for one in logprobs["content"][0]["top_logprobs"]]
  except (KeyError, IndexError, TypeError) as error:
    raise ValueError(
      f"expected top_logprobs of a token, got logprobs={json.dumps(logprobs)[:60]}: let the server"
      f" send {_LISTED} (of vLLM --max-logprobs={_LISTED})"
    ) from error
  if not listed:
    raise ValueError("top_logprobs is empty")
  for token, logprob in listed:
    numbers = isinstance(logprob, int | float) and not isinstance(logprob, bool)
    if not isinstance(token, str) or not numbers:
      raise ValueError(f"expected a token and its log-probability, got {token!r}: {logprob!r}")
    if logprob > _ROUNDING:
      raise ValueError(f"the token {token!r} has the log-probability {logprob}, which is above 0")
  listed = [(token, _float(logprob)) for token, logprob in listed]
  if any(math.isnan(logprob) for _, logprob in listed):
    return math.nan
  word = answer.strip().casefold()
  total = sum(math.exp(logprob) for token, logprob in listed if token.strip().casefold() == word)
  if total > 1 + _ROUNDING:
    raise ValueError(f"the tokens of {answer!r} have a probability of {total:g}, more than 1")
  return min(total, 1.0)


def _float(number: float) -> float:
  """A number <= 0 of JSON, which may be an integer below all floats."""
  try:
    return float(number)
  except OverflowError:
    return -math.inf


def _geometric(found: Sequence[float]) -> float:
  return float(np.prod(found) ** (1 / len(found)))


_MEANS = {"arithmetic": np.mean, "geometric": _geometric}


def _filled(template: str, prompt: str, known: Mapping[str, Any]) -> str:
  """A question with what the prompt has for its fields."""

  def value(match: re.Match[str]) -> str:
    if match[1] == "prompt":
      return prompt
    found = [str(one) for one in named.names(known, match[1])]
    if not found:
      raise RewardError(
        f"the prompt {prompt!r} has no {match[1]!r} in its metadata, which question= names: use"
        " prompts that have it, or another question"
      )
    return ", ".join(found)

  return _FIELD.sub(value, template)


def _split(spec: str) -> tuple[str, str]:
  """'http://host:port' and the model's name."""
  try:
    parts = urllib.parse.urlsplit(spec.partition("?")[0])
    valid = bool(parts.hostname) and parts.port != 0
  except ValueError:
    valid = False
  model = urllib.parse.unquote(parts.path.strip("/")) if valid else ""
  if not model or parts.fragment:
    raise UserError(f"reward {spec!r} is no address of a model: write vlm://host:port/MODEL")
  limits_lib.without_password(parts.netloc, parts.hostname)
  return f"{SCHEMES[parts.scheme]}://{parts.netloc}", model
