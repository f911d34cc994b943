"""What an inference server says about a model, and whether a reward can use it."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import time
from typing import Any

from rlft.config.fields import suggestion
from rlft.rewards.remote.client import QUESTION_S, Client
from rlft.rewards.scoring.errors import RewardError

_BINARY = "binary_tensor_data"  # The extension's name.
_ANY = -1  # A size that the model does not fix.


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What the model is sent.

  Attributes:
    images: name of the images' input.
    datatype: 'FP32' or 'UINT8', of the images.
    size: (H, W) as the model declares them; -1 where any will do.
    texts: the other inputs: (name, 'prompts' or 'metadata', sizes of its shape after B: none or 1).
  """

  images: str
  datatype: str
  size: tuple[int, int]
  texts: Sequence[tuple[str, str, tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class Description:
  """Inputs and outputs by name, each with 'datatype' and 'shape'; empty where not declared."""

  inputs: Mapping[str, Mapping[str, Any]]
  outputs: Mapping[str, Mapping[str, Any]]

  def check_output(self, name: str) -> None:
    """Raises `RewardError` if the model has outputs, but not this one with a number an image."""
    if not self.outputs:
      return
    if name not in self.outputs:
      raise RewardError(
        f"the model has no output {name!r}: give output=..., {suggestion(name, self.outputs)}"
      )
    datatype, shape = _tensor(self.outputs[name])
    if datatype == "BYTES" or not _fits(shape, (_ANY,)) and not _fits(shape, (_ANY, 1)):
      raise RewardError(
        f"the model's output {name!r} is {datatype}{shape}: let it be one number for each image,"
        " FP32[-1]"
      )

  def inputs_for(
    self, *, images: str, prompts: str | None, metadata: str | None, datatype: str
  ) -> Inputs:
    """Matches what a reward has with what the model declares.

    Args:
      images: name of the input.
      prompts: name of the input; None: 'prompts' if it is declared or nothing is.
      metadata: name of the input; None: 'metadata' if it is declared.
      datatype: of the images, or 'auto'.

    Raises:
      RewardError: they do not fit.
    """
    declared = self.inputs
    if prompts is None and ("prompts" in declared or not declared):
      prompts = "prompts"
    if metadata is None and "metadata" in declared:
      metadata = "metadata"
    texts = {"prompts": prompts, "metadata": metadata}
    names = {"images": images} | {what: name for what, name in texts.items() if name is not None}
    if len(set(names.values())) < len(names):
      raise RewardError(f"two inputs have the same name ({names}): give each its own")
    if not declared:
      kind = "FP32" if datatype == "auto" else datatype
      del names["images"]
      return Inputs(images, kind, (_ANY, _ANY), [(name, what, ()) for what, name in names.items()])
    for what, name in names.items():
      if name not in declared:
        raise RewardError(
          f"the model has no input {name!r}: give {what}=..., {suggestion(name, declared)}"
        )
    if others := sorted(declared.keys() - names.values()):
      raise RewardError(
        f"the model has an input {others[0]!r}, which a reward cannot fill: say which input is"
        " which with images=..., prompts=..., metadata=..."
      )
    kind, size = _images(images, declared[images], datatype)
    return Inputs(
      images,
      kind,
      size,
      [
        (name, what, _text_shape(name, declared[name]))
        for what, name in names.items()
        if what != "images"
      ],
    )


def ask(client: Client, path: str, start_s: float) -> Description:
  """Waits for the server to be ready and asks about the model.

  Args:
    client: of the server.
    path: '/v2/models/NAME'.
    start_s: seconds to wait; with 0 it must be ready now.

  Raises:
    RewardError: no such server or model.
  """
  ready, described = client.ask("/v2/health/ready", path, start_s=start_s)
  if ready.status != 200:
    raise RewardError(
      f"{client.server} has no /v2/health/ready ({client.quote(ready)}): give the address of a"
      " server of the Open Inference Protocol v2"
    )
  if described.status != 200:
    raise RewardError(
      f"{client.server} has no such model ({client.quote(described)}): correct the name or the"
      " version, or load the model"
    )
  try:
    about = json.loads(described.data)
    inputs, outputs = (
      {tensor["name"]: tensor for tensor in about.get(key) or ()} for key in ("inputs", "outputs")
    )
    if not all(isinstance(name, str) for name in (*inputs, *outputs)):
      raise TypeError("a name is no text")
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
    raise RewardError(
      f"{client.server}{path} does not describe a model: give the address of a server of the Open"
      " Inference Protocol v2"
    ) from error
  return Description(inputs, outputs)


def reads_binary(client: Client) -> bool:
  """Whether the server says that it knows the extension for binary data."""
  answer = client.until_answered(
    lambda timeout_s: client.request("GET", "/v2", timeout_s=timeout_s),
    timeout_s=QUESTION_S,
    deadline=time.monotonic() + QUESTION_S,
    retries=3,
    started=time.monotonic(),
    remedy="restart the server",
  )
  try:
    return answer.status == 200 and _BINARY in json.loads(answer.data)["extensions"]
  except (ValueError, TypeError, KeyError, RecursionError):
    return False


def _tensor(declared: Mapping[str, Any]) -> tuple[Any, Any]:
  return declared.get("datatype"), declared.get("shape")


def _fits(shape: Any, wanted: Sequence[int]) -> bool:
  """Whether a declared shape allows the wanted one; its first size must be free."""
  return (
    isinstance(shape, list)
    and len(shape) == len(wanted)
    and shape[0] == _ANY
    and all(want in (_ANY, have) or have == _ANY for have, want in zip(shape, wanted, strict=True))
  )


def _images(name: str, declared: Mapping[str, Any], datatype: str) -> tuple[str, tuple[int, int]]:
  kind, shape = _tensor(declared)
  if not _fits(shape, (_ANY, _ANY, _ANY, 3)):
    raise RewardError(
      f"the model's input {name!r} has the shape {shape}, expected [-1, H, W, 3]: change it on the"
      " server, or name another input with images=..."
    )
  if kind not in ("FP32", "UINT8"):
    raise RewardError(
      f"the model's input {name!r} is {kind}: let it be FP32 in [0, 1] or UINT8 on the server"
    )
  if datatype not in ("auto", kind):
    raise RewardError(f"the model's input {name!r} is {kind}: leave out datatype={datatype}")
  return kind, (shape[1], shape[2])


def _text_shape(name: str, declared: Mapping[str, Any]) -> tuple[int, ...]:
  kind, shape = _tensor(declared)
  for rest in ((), (1,)):
    if kind == "BYTES" and _fits(shape, (_ANY, *rest)):
      return rest
  raise RewardError(
    f"the model's input {name!r} is {kind}{shape}, expected BYTES[-1]: change it on the server"
  )
