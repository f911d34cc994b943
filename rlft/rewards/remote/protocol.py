"""Messages of the Open Inference Protocol v2 (KServe, Triton, MLServer, Ray Serve) over HTTP.

A request is a JSON object with named tensors. Their numbers are in it as lists or, with the
protocol's binary extension, behind it as little-endian bytes, its own length being in a header.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
from typing import Any

import numpy as np

JSON_LENGTH = "Inference-Header-Content-Length"
# Of the tensors that can be numbers for each image.
_DTYPES = {
  "BOOL": "?",
  **{f"UINT{8 * size}": f"<u{size}" for size in (1, 2, 4, 8)},
  **{f"INT{8 * size}": f"<i{size}" for size in (1, 2, 4, 8)},
  **{f"FP{8 * size}": f"<f{size}" for size in (2, 4, 8)},
}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """An input of a model.

  Attributes:
    name: as the model has it.
    datatype: 'FP32', 'UINT8' or 'BYTES'.
    shape: its sizes.
    values: an array of this shape or, for 'BYTES', the strings, row by row.
  """

  name: str
  datatype: str
  shape: tuple[int, ...]
  values: np.ndarray | Sequence[str]

  def numbers(self) -> list:
    """For JSON: a flat list. A float32 is written so that it is read as the same float32."""
    if self.datatype == "BYTES":
      return list(self.values)
    return np.asarray(self.values).ravel().tolist()

  def bytes(self) -> bytes:
    """For the binary extension: little-endian numbers; each string behind its length in 4 bytes."""
    if self.datatype == "BYTES":
      texts = [text.encode() for text in self.values]
      return b"".join(len(text).to_bytes(4, "little") + text for text in texts)
    return np.ascontiguousarray(self.values, _DTYPES[self.datatype]).tobytes()


def encode(
  request_id: str, inputs: Sequence[Tensor], output: str, *, binary: bool
) -> tuple[bytes, dict[str, str]]:
  """An inference request.

  Args:
    request_id: comes back in the answer.
    inputs: the tensors.
    output: name of the tensor that is wanted.
    binary: whether to use the binary extension, also for the answer.

  Returns:
    The body and its headers.
  """
  parts = [tensor.bytes() for tensor in inputs] if binary else []
  described: list[dict[str, Any]] = [
    {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape} for tensor in inputs
  ]
  wanted: dict[str, Any] = {"name": output}
  if binary:
    wanted["parameters"] = {"binary_data": True}
    for tensor, part in zip(described, parts, strict=True):
      tensor["parameters"] = {"binary_data_size": len(part)}
  else:
    for tensor, given in zip(described, inputs, strict=True):
      tensor["data"] = given.numbers()
  request = {"id": request_id, "inputs": described, "outputs": [wanted]}
  text = json.dumps(request, separators=(",", ":")).encode()
  if not binary:
    return text, {"Content-Type": "application/json"}
  headers = {"Content-Type": "application/octet-stream", JSON_LENGTH: str(len(text))}
  return b"".join([text, *parts]), headers


def decode(
  data: bytes, headers: Mapping[str, str], *, request_id: str, output: str, count: int
) -> np.ndarray:
  """The scores in an answer.

  Args:
    data: the body.
    headers: with names in any case.
    request_id: of the request that it must belong to.
    output: name of the tensor with the scores.
    count: B, images of the request.

  Returns:
    `[B]` float64; NaN where the server wrote NaN or null.

  Raises:
    ValueError: it is no such answer; the message says what was expected and what came.
  """
  length = _json_length(headers, len(data))
  try:
    answer = json.loads(data[:length])
  except (ValueError, RecursionError) as error:
    raise ValueError(f"expected JSON, got {data[:40]!r}") from error
  if not isinstance(answer, dict) or not isinstance(answer.get("outputs"), list):
    raise ValueError("expected a JSON object with a list of 'outputs'")
  if answer.get("id") != request_id:
    raise ValueError(f"expected the request's id {request_id!r}, got {answer.get('id')!r}")
  found, rest = [], data[length:]
  for tensor in answer["outputs"]:
    if not isinstance(tensor, dict):
      raise ValueError("an output is no JSON object")
    parameters, part = tensor.get("parameters") or {}, None
    if not isinstance(parameters, dict):
      raise ValueError("an output's 'parameters' are no JSON object")
    size = parameters.get("binary_data_size")
    if size is not None:
      if not isinstance(size, int) or not 0 <= size <= len(rest):
        raise ValueError(f"binary_data_size is {size!r}, but {len(rest)} bytes are left")
      part, rest = rest[:size], rest[size:]
    if tensor.get("name") == output:
      found.append((tensor, part))
  if rest:
    raise ValueError(f"{len(rest)} bytes are left over")
  if len(found) != 1:
    names = [tensor.get("name") for tensor in answer["outputs"]]
    raise ValueError(f"expected one output {output!r}, got {names}")
  return _scores(*found[0], count)


def _json_length(headers: Mapping[str, str], size: int) -> int:
  text = headers.get(JSON_LENGTH)
  if text is None:
    return size
  if not text.isdecimal() or int(text) > size:
    raise ValueError(f"{JSON_LENGTH} is {text!r}, of {size} bytes")
  return int(text)


def _scores(tensor: Mapping[str, Any], part: bytes | None, count: int) -> np.ndarray:
  """The numbers of one output, from the bytes that belong to it or from its JSON."""
  name, datatype, shape = (tensor.get(key) for key in ("name", "datatype", "shape"))
  if not isinstance(datatype, str) or datatype not in _DTYPES:
    raise ValueError(f"output {name!r} has the datatype {datatype!r}, expected e.g. 'FP32'")
  if shape not in ([count], [count, 1]):
    raise ValueError(f"output {name!r} has the shape {shape}, expected [{count}]")
  try:
    if part is not None:
      values = np.frombuffer(part, _DTYPES[datatype]).astype(np.float64)
    else:
      data = tensor.get("data")
      if not isinstance(data, list):
        raise TypeError("its data is no list")
      values = np.array(data, np.float64).ravel()  # null becomes NaN.
  except (ValueError, TypeError, OverflowError) as error:
    raise ValueError(f"output {name!r} does not hold {datatype} numbers ({error})") from error
  if len(values) != math.prod(shape):
    raise ValueError(f"output {name!r} has {len(values)} numbers, expected {count}")
  return values
