"""Darknet's files: the network (.cfg) and its numbers (.weights), https://pjreddie.com/darknet.

A .cfg file is a list of sections. `[net]` gives the input size; each later section is one layer,
counted from 0, which takes the output of the layer before it. A .weights file is a header (major,
minor, revision: int32; images seen: int64 since version 0.2, else int32) and then float32 numbers,
little-endian: for each convolution bias `[O]`, with batch norm also scale, mean and variance `[O]`,
then the kernel `[O, I, h, w]`.

Read are the layers of YOLOv3 and YOLOv3-tiny; what would compute something else is refused.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

import numpy as np

from rlft.types import UserError

Params = Mapping[str, Mapping[str, Any]]

# Darknet divides by sqrt(variance) + this.
_EPSILON = 1e-6
# Options that change the computation, with the only value that is implemented (also the default).
_FIXED = {
  "net": {"channels": "3"},
  "convolutional": {"groups": "1", "dilation": "1", "binary": "0", "xnor": "0"},
  "maxpool": {"maxpool_depth": "0"},
  "route": {"groups": "1"},
  "shortcut": {"activation": "linear"},
  "upsample": {"scale": "1"},
  "yolo": {"scale_x_y": "1", "new_coords": "0"},
}
_ACTIVATIONS = ("leaky", "linear")


@dataclasses.dataclass(frozen=True)
class Conv:
  """`[convolutional]`: `features` channels out; batch norm, if any, is folded into the kernel."""

  features: int
  size: int
  stride: int
  padding: int
  leaky: bool
  batch_norm: bool


@dataclasses.dataclass(frozen=True)
class MaxPool:
  """`[maxpool]`: `padding` is how much is added in all, the smaller half before."""

  size: int
  stride: int
  padding: int


@dataclasses.dataclass(frozen=True)
class Upsample:
  """`[upsample]`: repeats each pixel `stride` times in both directions."""

  stride: int


@dataclasses.dataclass(frozen=True)
class Route:
  """`[route]`: the outputs of `layers` (absolute numbers) side by side in the channels."""

  layers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Shortcut:
  """`[shortcut]`: the output of the layer before plus that of `layer` (an absolute number)."""

  layer: int


@dataclasses.dataclass(frozen=True)
class Yolo:
  """`[yolo]`: a head; each of its anchors (width, height in input pixels) predicts a box a cell."""

  anchors: tuple[tuple[float, float], ...]
  classes: int


Layer = Conv | MaxPool | Upsample | Route | Shortcut | Yolo


@dataclasses.dataclass(frozen=True)
class Network:
  """What a .cfg file says.

  Attributes:
    height: of the input, in pixels.
    width: of the input, in pixels.
    layers: in the order in which they are computed.
  """

  height: int
  width: int
  layers: tuple[Layer, ...]

  def channels(self) -> tuple[int, ...]:
    """Channels of each layer's output."""
    found: list[int] = []
    for layer in self.layers:
      match layer:
        case Conv():
          found.append(layer.features)
        case Route():
          found.append(sum(found[i] for i in layer.layers))
        case _:
          found.append(found[-1] if found else 3)
    return tuple(found)


def read_network(path: str | pathlib.Path) -> Network:
  """Reads a .cfg file.

  Raises:
    UserError: the file cannot be read, or has a layer or an option that is not implemented.
  """
  sections = _sections(path)
  if not sections or sections[0].kind not in ("net", "network"):
    raise UserError(f"{path} does not begin with [net]: give the .cfg file of a Darknet network")
  net = sections[0]
  layers = tuple(_layer(section, i) for i, section in enumerate(sections[1:]))
  network = Network(net.number("height"), net.number("width"), layers)
  for i, (layer, channels) in enumerate(zip(layers, (3, *network.channels()), strict=False)):
    if isinstance(layer, Yolo):
      expected = len(layer.anchors) * (5 + layer.classes)
      if channels != expected:
        raise UserError(
          f"{path}: [yolo] (layer {i}) has {len(layer.anchors)} anchors and {layer.classes}"
          f" classes, so the layer before it must have {expected} filters, not {channels}: correct"
          " mask, classes or filters"
        )
  if not any(isinstance(layer, Yolo) for layer in layers):
    raise UserError(f"{path} has no [yolo] layer: give the .cfg file of a YOLOv3 detector")
  return network


def param_shapes(network: Network) -> dict[str, dict[str, tuple[int, ...]]]:
  """`{number of the layer: {'kernel': (h, w, I, O), 'bias': (O,)}}` for the convolutions."""
  shapes, inputs = {}, 3
  for i, (layer, outputs) in enumerate(zip(network.layers, network.channels(), strict=True)):
    if isinstance(layer, Conv):
      kernel = (layer.size, layer.size, inputs, layer.features)
      shapes[str(i)] = {"kernel": kernel, "bias": (layer.features,)}
    inputs = outputs
  return shapes


def read_weights(path: str | pathlib.Path, network: Network) -> Params:
  """Reads a .weights file; batch norm is folded into kernels and biases.

  Returns:
    As `param_shapes`; float32 arrays.

  Raises:
    UserError: the file cannot be read, is truncated, or is of another network.
  """
  numbers = _numbers(path)
  params, start = {}, 0
  for name, shapes in param_shapes(network).items():
    layer, kernel_shape = network.layers[int(name)], shapes["kernel"]
    rows = 4 if layer.batch_norm else 1
    size = rows * layer.features + int(np.prod(kernel_shape))
    if start + size > len(numbers):
      raise UserError(
        f"{path}: layer {name} [convolutional] needs the numbers {start} to {start + size}, but the"
        f" file has {len(numbers)}: it is truncated or of another network than the .cfg file"
      )
    vectors, kernel = np.split(numbers[start : start + size], [rows * layer.features])
    bias, *norm = vectors.reshape(rows, -1).astype(np.float64)
    height, width, inputs, outputs = kernel_shape
    kernel = kernel.reshape(outputs, inputs, height, width).transpose(2, 3, 1, 0)
    factor = np.ones(outputs)
    if norm:
      scale, mean, variance = norm
      if not (variance >= 0).all():
        raise UserError(
          f"{path}: layer {name} [convolutional] has a variance below 0: the file is damaged or of"
          " another network than the .cfg file"
        )
      factor = scale / (np.sqrt(variance) + _EPSILON)
      bias = bias - mean * factor
    params[name] = {
      "kernel": np.ascontiguousarray(kernel * factor, np.float32),
      "bias": bias.astype(np.float32),
    }
    start += size
  if start < len(numbers):
    raise UserError(
      f"{path}: {len(numbers) - start} numbers are left over after the last layer, expected"
      f" {start} in all: it is of another network than the .cfg file"
    )
  return params


def _numbers(path: str | pathlib.Path) -> np.ndarray:
  """The float32 numbers after the header."""
  try:
    data = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}; correct the path") from error
  header = np.frombuffer(data[:8], "<i4") if len(data) >= 16 else np.array([-1, -1])
  major, minor = header.tolist()
  if not (0 <= major < 1000 and 0 <= minor < 1000):
    raise UserError(f"{path} has no Darknet header: give the .weights file of a Darknet network")
  body = data[20 if 10 * major + minor >= 2 else 16 :]
  if len(body) % 4:
    raise UserError(
      f"{path} ends within a number ({len(data)} bytes): it is truncated, download it again"
    )
  return np.frombuffer(body, "<f4")


@dataclasses.dataclass(frozen=True)
class _Section:
  path: str | pathlib.Path
  kind: str
  line: int
  options: dict[str, str]

  def number(self, key: str, default: int | None = None) -> int:
    """A whole number; required if it has no default."""
    found = self.numbers(key, None if default is None else str(default))
    if len(found) != 1 or found[0] != int(found[0]):
      raise self.error(f"{key}={self.options.get(key)} is not a whole number")
    return int(found[0])

  def numbers(self, key: str, default: str | None = None) -> list[float]:
    text = self.options.get(key, default)
    if text is None:
      raise self.error(f"{key} is missing")
    try:
      return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
      raise self.error(f"{key}={text} is not a list of numbers") from None

  def error(self, message: str) -> UserError:
    return UserError(f"{self.path}, line {self.line}, [{self.kind}]: {message}; correct the file")


def _sections(path: str | pathlib.Path) -> Sequence[_Section]:
  try:
    lines = pathlib.Path(path).read_text().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, "strerror", None) or "it is not text"
    raise UserError(f"cannot read {path}: {reason}; give Darknet's .cfg file") from error
  sections: list[_Section] = []
  for number, line in enumerate(lines, start=1):
    line = line.partition("#")[0].partition(";")[0].strip()
    if not line:
      continue
    if line.startswith("["):
      sections.append(_Section(path, line.strip("[] "), number, {}))
      continue
    key, equals, value = line.partition("=")
    if not equals or not sections:
      raise UserError(f"{path}, line {number}: {line[:40]!r} is no option of a section: remove it")
    sections[-1].options[key.strip()] = value.strip()
  return sections


def _layer(section: _Section, index: int) -> Layer:
  """The layer of number `index` that the section describes."""
  for key, value in _FIXED.get(section.kind, {}).items():
    if (found := section.options.get(key, value)) not in (value, f"{value}.0"):
      raise section.error(f"{key}={found} is not supported, only {value}")
  match section.kind:
    case "convolutional":
      activation = section.options.get("activation", "logistic")
      if activation not in _ACTIVATIONS:
        raise section.error(f"activation={activation} is not supported, only leaky and linear")
      size = section.number("size", 1)
      padding = size // 2 if section.number("pad", 0) else section.number("padding", 0)
      return Conv(
        features=section.number("filters", 1),
        size=size,
        stride=section.number("stride", 1),
        padding=padding,
        leaky=activation == "leaky",
        batch_norm=bool(section.number("batch_normalize", 0)),
      )
    case "maxpool":
      stride = section.number("stride", 1)
      size = section.number("size", stride)
      return MaxPool(size, stride, section.number("padding", size - 1))
    case "upsample":
      return Upsample(section.number("stride", 2))
    case "route":
      return Route(tuple(_absolute(section, n, index) for n in section.numbers("layers")))
    case "shortcut":
      return Shortcut(_absolute(section, section.number("from"), index))
    case "yolo":
      values = section.numbers("anchors")
      anchors = list(zip(values[::2], values[1::2], strict=False))
      mask = section.numbers("mask", ",".join(map(str, range(len(anchors)))))
      if len(values) % 2 or not all(0 <= i < len(anchors) for i in mask):
        raise section.error(f"mask={section.options.get('mask')} names an anchor that is not there")
      return Yolo(tuple(anchors[int(i)] for i in mask), section.number("classes", 20))
  raise section.error(f"layers of the kind [{section.kind}] are not supported")


def _absolute(section: _Section, number: float, index: int) -> int:
  """The number of an earlier layer, which may be given relative to this one."""
  found = int(number) + (index if number < 0 else 0)
  if not 0 <= found < index:
    raise section.error(f"layer {number:g} does not come before layer {index}")
  return found
