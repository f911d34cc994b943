"""YOLOv3 and YOLOv3-tiny (https://arxiv.org/abs/1804.02767) as pure functions of Darknet's files.

The same numbers as Darknet and OpenCV's `cv2.dnn`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rlft.models import layers
from rlft.models.files import darknet

_SLOPE = 0.1  # of the leaky ReLU below 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Detections:
  """What the heads see, one row for each of the N anchors of all cells of all heads; float32.

  Attributes:
    boxes: `[B, N, 4]` centre x, centre y, width and height, as shares of the picture.
    objectness: `[B, N]` in [0, 1], whether an object is centred there.
    classes: `[B, N, A]` in [0, 1], the probability of each class if there is an object.
  """

  boxes: jax.Array
  objectness: jax.Array
  classes: jax.Array


def detect(
  network: darknet.Network,
  params: darknet.Params,
  images: jax.Array,
  *,
  dtype: jnp.dtype = jnp.float32,
) -> Detections:
  """Runs the network and decodes all its heads; no threshold and no suppression of doubles.

  Args:
    network: as `darknet.read_network` reads it.
    params: as `darknet.read_weights` reads it.
    images: `[B, H, W, 3]` RGB in [0, 1], of the network's height and width.
    dtype: type of the convolutions; the decoding is float32.

  Returns:
    Rows in Darknet's order: head, row of cells, column, anchor.
  """
  if images.shape[1:] != (network.height, network.width, 3):
    raise ValueError(
      f"images are {images.shape[1:]}, but the network takes {(network.height, network.width, 3)}"
    )
  outputs: list[jax.Array] = []
  found: list[Detections] = []
  x = images.astype(dtype)
  for i, layer in enumerate(network.layers):
    match layer:
      case darknet.Conv():
        x = _conv(layer, params[str(i)], x)
      case darknet.MaxPool():
        x = _max_pool(layer, x)
      case darknet.Upsample():
        x = x.repeat(layer.stride, axis=1).repeat(layer.stride, axis=2)
      case darknet.Route():
        x = jnp.concatenate([outputs[j] for j in layer.layers], axis=-1)
      case darknet.Shortcut():
        x = x + outputs[layer.layer]
      case darknet.Yolo():
        found.append(_decode(layer, x.astype(jnp.float32), network))
    outputs.append(x)
  return jax.tree.map(lambda *heads: jnp.concatenate(heads, axis=1), *found)


def resize(network: darknet.Network, images: jax.Array) -> jax.Array:
  """`[B, H, W, 3]` of any size -> the network's input size, as `cv2.dnn.blobFromImage` does.

  Stretched, not padded; linear interpolation between the four nearest pixels (no antialiasing).
  """
  shape = (images.shape[0], network.height, network.width, 3)
  return jax.image.resize(images, shape, "linear", antialias=False)


def letterbox(network: darknet.Network, images: jax.Array) -> jax.Array:
  """Resizes with the proportions kept and grey (0.5) at both sides, as Darknet does."""
  height, width = images.shape[1:3]
  if network.width * height < network.height * width:
    inner = (height * network.width // width, network.width)
  else:
    inner = (network.height, width * network.height // height)
  images = jax.image.resize(images, (len(images), *inner, 3), "linear", antialias=False)
  rows, columns = network.height - inner[0], network.width - inner[1]
  padding = ((0, 0), (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2), (0, 0))
  return jnp.pad(images, padding, constant_values=0.5)


def _conv(layer: darknet.Conv, params, x: jax.Array) -> jax.Array:
  """`[B, H, W, I]` -> `[B, H', W', O]`."""
  kernel, bias = (jnp.asarray(params[name], x.dtype) for name in ("kernel", "bias"))
  padding = ((layer.padding, layer.padding),) * 2
  x = layers.conv2d(x, kernel, stride=layer.stride, padding=padding) + bias
  return jnp.maximum(x, _SLOPE * x) if layer.leaky else x


def _max_pool(layer: darknet.MaxPool, x: jax.Array) -> jax.Array:
  """`[B, H, W, C]` -> `[B, H', W', C]`."""
  before = layer.padding // 2
  padding = ((0, 0), *((before, layer.padding - before),) * 2, (0, 0))
  window, strides = (1, layer.size, layer.size, 1), (1, layer.stride, layer.stride, 1)
  return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, padding)


def _decode(layer: darknet.Yolo, x: jax.Array, network: darknet.Network) -> Detections:
  """`[B, H, W, anchors * (5 + A)]` -> the detections of one head.

  x = (column + sigmoid(t_x)) / W,  y likewise,  width = anchor_w exp(t_w) / input_w, ...
  """
  batch, rows, columns, _ = x.shape
  x = x.reshape(batch, rows, columns, len(layer.anchors), 5 + layer.classes)
  grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1)[:, :, None]  # x, y
  centre = (jax.nn.sigmoid(x[..., :2]) + grid) / np.array([columns, rows], np.float32)
  anchors = np.array(layer.anchors, np.float32) / (network.width, network.height)
  size = jnp.exp(x[..., 2:4]) * anchors
  boxes = jnp.concatenate([centre, size], axis=-1).astype(jnp.float32)
  probs = jax.nn.sigmoid(x[..., 4:])
  return Detections(
    boxes=boxes.reshape(batch, -1, 4),
    objectness=probs[..., 0].reshape(batch, -1),
    classes=probs[..., 1:].reshape(batch, -1, layer.classes),
  )


def _blocks() -> tuple[darknet.Layer, ...]:
  def conv(features: int, size: int = 3) -> darknet.Conv:
    return darknet.Conv(features, size, 1, size // 2, leaky=True, batch_norm=True)

  head = darknet.Conv(255, 1, 1, 0, leaky=False, batch_norm=False)
  half = darknet.MaxPool(2, 2, 1)
  shallow = [layer for i in range(5) for layer in (conv(16 << i), half)]
  large = darknet.Yolo(((81.0, 82.0), (135.0, 169.0), (344.0, 319.0)), 80)
  small = darknet.Yolo(((10.0, 14.0), (23.0, 27.0), (37.0, 58.0)), 80)
  deep = [conv(512), darknet.MaxPool(2, 1, 1), conv(1024), conv(256, 1), conv(512), head, large]
  fine = [darknet.Route((13,)), conv(128, 1), darknet.Upsample(2), darknet.Route((19, 8))]
  return (*shallow, *deep, *fine, conv(256), head, small)


# What the published yolov3-tiny.cfg says.
YOLOV3_TINY = darknet.Network(416, 416, _blocks())
