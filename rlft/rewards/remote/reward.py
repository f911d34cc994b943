"""A model on an inference server as a reward: http://host:port/v2/models/NAME?key=value&...

The server (MLServer, Triton, KServe, Ray Serve, experiments/rewards/remote_server.py) speaks the
Open Inference Protocol v2. It gets, for B images,
    images    `[B, H, W, 3]`, FP32 in [0, 1] or UINT8
    prompts   `[B]` BYTES; where the model declares it
    metadata  `[B]` BYTES, each a JSON object; where the model declares it
and answers with
    score     `[B]` or `[B, 1]` numbers, higher is better; NaN (in JSON also null) for an image that
              could not be scored.
`remote_reward` states the options, among them other names for these four.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import re
from typing import Any, Literal
import urllib.parse
import uuid

import numpy as np

from rlft.rewards.remote import limits as limits_lib
from rlft.rewards.remote import protocol as open_inference
from rlft.rewards.remote import server as remote_model
from rlft.rewards.remote.client import QUESTION_S, Answer, Client, TryAgain
from rlft.rewards.remote.limits import Limits
from rlft.rewards.remote.protocol import Tensor
from rlft.rewards.scoring.errors import RewardError
from rlft.storage import images as images_lib
from rlft.types import HostReward, UserError

_MODEL = re.compile(r"(?P<prefix>.*)(?P<path>/v2/models/[^/]+(/versions/[^/]+)?)/?")


def remote_reward(
  spec: str,
  *,
  output: str = "score",
  images: str = "images",
  prompts: str | None = None,
  metadata: str | None = None,
  datatype: Literal["auto", "FP32", "UINT8"] = "auto",
  format: Literal["auto", "json", "binary"] = "auto",
  batch_size: int = 32,
  in_flight: int = 4,
  timeout_s: float = 60.0,
  deadline_s: float | None = None,
  retries: int = 12,
  start_s: float = 20.0,
  token_env: str | None = None,
) -> HostReward:
  """Asks the server about the model, and makes it a reward.

  Args:
    spec: 'http[s]://host:port[/prefix]/v2/models/NAME[/versions/V]', then the options.
    output: name of the output with the scores.
    images: name of the input for the images.
    prompts: name of the input for the prompts. Default: 'prompts', if the model declares it or
      declares no inputs at all.
    metadata: name of the input for the metadata. Default: 'metadata', if the model declares it.
    datatype: of the images. 'auto': as the model declares, else FP32. UINT8 has a quarter of the
      bytes.
    format: 'binary': numbers travel as bytes, by the protocol's extension; 'json': as text, about
      five times as long. 'auto': binary where the server names the extension, else json.
    batch_size: images in a request, at most.
    in_flight: requests at once, from each process. The batch is cut into so many parts.
    timeout_s: seconds for a request.
    deadline_s: seconds for a batch with all its tries. Default: --reward_timeout_s, also a bound.
    retries: how often a request is sent again before the run stops. Waits double from a quarter of
      a second to 15 s, with jitter: 12 retries bridge about 80 s.
    start_s: seconds to wait at the start for a server that is not ready.
    token_env: environment variable with a token, which is sent as `Authorization: Bearer ...`.

  Returns:
    The reward, of kind 'host'.

  Raises:
    UserError: a wrong address or option, no such server or model, or a model with other inputs or
      outputs.
  """
  address = spec.partition("?")[0]
  if batch_size < 1:
    raise UserError(f"reward {spec!r}: batch_size must be 1 or more")
  limits = Limits(in_flight, timeout_s, deadline_s, retries, start_s)
  limits.check(spec)
  server, path = _split(spec, address)
  client = Client(server, connections=in_flight, token=limits_lib.token(spec, token_env))
  try:
    about = remote_model.ask(client, path, start_s)
    about.check_output(output)
    inputs = about.inputs_for(images=images, prompts=prompts, metadata=metadata, datatype=datatype)
    binary = format == "binary" or format == "auto" and remote_model.reads_binary(client)
  except RewardError as error:
    raise UserError(f"reward {spec!r}: {error}") from error
  remote = _Remote(
    client,
    path,
    inputs,
    output,
    binary=binary,
    batch_size=batch_size,
    limits=limits,
  )
  return HostReward(spec, remote.score, threads=in_flight)


@dataclasses.dataclass(frozen=True)
class _Remote:
  """A model on a server; see `remote_reward`."""

  client: Client
  path: str
  inputs: remote_model.Inputs
  output: str
  binary: bool
  batch_size: int
  limits: Limits

  def score(
    self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
  ) -> np.ndarray:
    """`[B, H, W, 3]` float32 in [0, 1] -> `[B]` float32; an image that is not finite is NaN."""
    started, deadline = self.limits.times()
    scores = np.full(len(images), np.nan, np.float32)
    rows = np.flatnonzero(np.isfinite(images).all(axis=(1, 2, 3)))
    for first in range(0, len(rows), self.batch_size):
      part = rows[first : first + self.batch_size]
      tensors = self._tensors(images[part], [prompts[i] for i in part], [metadata[i] for i in part])
      with np.errstate(over="ignore"):
        scores[part] = self._infer(tensors, len(part), started, deadline)
    return scores

  def _tensors(
    self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
  ) -> list[Tensor]:
    inputs, size = self.inputs, images.shape[1:3]
    if any(want not in (-1, have) for want, have in zip(inputs.size, size, strict=True)):
      raise RewardError(
        f"the model takes images of {_sizes(inputs.size)}, but these are {_sizes(size)}: let the"
        " server declare -1 for both sizes and resize them"
      )
    if inputs.datatype == "UINT8":
      images = images_lib.to_uint8(images)
    tensors = [Tensor(inputs.images, inputs.datatype, images.shape, images)]
    for name, what, rest in inputs.texts:
      texts = prompts if what == "prompts" else [_json(known) for known in metadata]
      tensors.append(Tensor(name, "BYTES", (len(texts), *rest), texts))
    return tensors

  def _infer(
    self, tensors: Sequence[Tensor], count: int, started: float, deadline: float
  ) -> np.ndarray:
    request_id = uuid.uuid4().hex
    body, headers = open_inference.encode(request_id, tensors, self.output, binary=self.binary)

    def attempt(timeout_s: float) -> Answer:
      answer = self.client.request(
        "POST", f"{self.path}/infer", body=body, headers=headers, timeout_s=timeout_s
      )
      if answer.status == 200:
        return answer
      said = self.client.quote(answer)
      if answer.status in (400, 404):
        # A server that was restarted may answer before it has loaded its models.
        timeout_s = min(timeout_s, QUESTION_S)
        if self.client.request("GET", f"{self.path}/ready", timeout_s=timeout_s).status != 200:
          raise TryAgain(f"the model is not ready ({said})")
      self.client.give_up(
        f"{self.client.server} refused a batch ({said}): correct the server, then run the same"
        " command again to go on"
      )

    answer = self.client.until_answered(
      attempt,
      timeout_s=self.limits.timeout_s,
      deadline=deadline,
      retries=self.limits.retries,
      started=started,
      remedy="restart the server, then run the same command again to go on",
    )
    try:
      return open_inference.decode(
        answer.data, answer.headers, request_id=request_id, output=self.output, count=count
      )
    except ValueError as error:
      self.client.give_up(
        f"the answer of {self.client.server} is wrong: {str(error)[:150]}; correct the"
        " server, then run the same command again to go on"
      )


# What a user wrote.


def _split(spec: str, address: str) -> tuple[str, str]:
  """'http://host:port/prefix' and '/v2/models/NAME'."""
  try:
    parts = urllib.parse.urlsplit(address)
    valid = bool(parts.hostname) and parts.port != 0
  except ValueError:
    valid = False
  match = _MODEL.fullmatch(parts.path) if valid else None
  if match is None or parts.fragment:
    raise UserError(
      f"reward {spec!r} is no address of a model: write http://host:port/v2/models/NAME"
    )
  limits_lib.without_password(parts.netloc, parts.hostname)
  return f"{parts.scheme}://{parts.netloc}{match['prefix']}", match["path"]


def _sizes(size: Sequence[int]) -> str:
  return " x ".join("any" if side == -1 else str(side) for side in size)


def _json(known: Mapping[str, Any]) -> str:
  # A column of a table may hold numpy's arrays and numbers.
  return json.dumps(known, default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x))
