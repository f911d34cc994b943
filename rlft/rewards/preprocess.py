"""From pictures to what a scorer's network takes: resizing, cropping, padding, normalising.

Everything takes `[B, H, W, 3]` float32 images in [0, 1] of any height and width, is pure JAX, and
has finite gradients with respect to the images. The resampling is that of the libraries with which
the scorers were trained, without their rounding to 8 bits: PIL's (which torchvision and
transformers call), torch's antialiased one, and `scipy.ndimage`'s for OWLv2.
"""

from collections.abc import Sequence
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rlft.models import clip

# What OWLv2 puts beside an image that is not square.
_GREY = 0.5
# `scipy.ndimage` cuts its Gaussian off at so many standard deviations.
_TRUNCATE = 4.0


def resize(
  images: jax.Array,
  shape: tuple[int, int],
  method: Literal["linear", "cubic", "lanczos3"] = "cubic",
) -> jax.Array:
  """Resamples as PIL does: antialiased, Keys' cubic with a = -0.5, clipped to [0, 1].

  Args:
    images: `[B, H, W, 3]` float32 in [0, 1].
    shape: height and width of the result.
    method: the kernel; PIL's BILINEAR, BICUBIC or LANCZOS.

  Returns:
    `[B, *shape, 3]` float32 in [0, 1].
  """
  # Only the cubic and the Lanczos kernels have negative lobes.
  return jnp.clip(_resample(images, shape, method), 0.0, 1.0)


def short_side_crop(
  images: jax.Array, size: int, *, centre: Literal["floor", "round"] = "floor"
) -> jax.Array:
  """Resizes the short side to `size` (bicubic, same aspect) and crops the centre.

  Args:
    images: `[B, H, W, 3]` float32 in [0, 1].
    size: of the square result.
    centre: where the crop begins if an odd number of rows or columns is left over: 'floor' as in
      transformers' image processors, 'round' (half to even) as in torchvision.

  Returns:
    `[B, size, size, 3]` float32 in [0, 1].
  """
  height, width = images.shape[1:3]
  short = min(height, width)
  # The long side is rounded down, in both libraries.
  height, width = size * height // short, size * width // short
  images = resize(images, (height, width))
  if centre == "round":
    top, left = round((height - size) / 2), round((width - size) / 2)
  else:
    top, left = (height - size) // 2, (width - size) // 2
  return images[:, top : top + size, left : left + size]


def long_side_pad(images: jax.Array, size: int) -> jax.Array:
  """Resizes the long side to `size` (bicubic, same aspect) and puts black around: HPSv2's way.

  The original resizes a float tensor, so that values beyond [0, 1] next to sharp edges stay; this
  is its result with antialiasing, torchvision's default since 0.17.

  Args:
    images: `[B, H, W, 3]` float32 in [0, 1].
    size: of the square result.

  Returns:
    `[B, size, size, 3]` float32; slightly beyond [0, 1] where the cubic overshoots.
  """
  height, width = images.shape[1:3]
  scale = size / max(height, width)
  height, width = max(1, round(height * scale)), max(1, round(width * scale))
  images = _resample(images, (height, width), "cubic")
  rows, columns = size - height, size - width
  # The odd row goes below, the odd column to the right.
  rows, columns = (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2)
  return jnp.pad(images, ((0, 0), rows, columns, (0, 0)))


def square(images: jax.Array, size: int) -> jax.Array:
  """Resizes to a square whatever the aspect (bicubic): OWL-ViT's way.

  Args:
    images: `[B, H, W, 3]` float32 in [0, 1].
    size: of the result.

  Returns:
    `[B, size, size, 3]` float32 in [0, 1].
  """
  return resize(images, (size, size))


def owlv2(images: jax.Array, size: int) -> jax.Array:
  """Pads to a square with grey at the bottom and the right, blurs and zooms: OWLv2's way.

  As the original does with `scipy.ndimage`: if the side is f > 1 times `size`, a Gaussian with
  standard deviation (f - 1) / 2; then linear interpolation; the image mirrored beyond its borders;
  clipped to the range of each padded image.

  Args:
    images: `[B, H, W, 3]` float32 in [0, 1].
    size: of the result.

  Returns:
    `[B, size, size, 3]` float32 in [0, 1].
  """
  chex.assert_shape(images, (None, None, None, 3))
  height, width = images.shape[1:3]
  side = max(height, width)
  padding = ((0, 0), (0, side - height), (0, side - width), (0, 0))
  images = jnp.pad(images, padding, constant_values=_GREY)
  # Both steps are linear and act on rows and columns alone: one matrix for each axis.
  matrix = jnp.asarray(_zoom_matrix(side, size) @ _blur_matrix(side, size), jnp.float32)
  zoomed = jnp.einsum(
    "ih,jw,bhwc->bijc", matrix, matrix, images, precision=jax.lax.Precision.HIGHEST
  )
  low, high = (f(images, axis=(1, 2, 3), keepdims=True) for f in (jnp.min, jnp.max))
  return jnp.clip(zoomed, jax.lax.stop_gradient(low), jax.lax.stop_gradient(high))


def normalise(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
  """(x - mean) / std, channel by channel; `[B, H, W, 3]` -> the same shape."""
  return (images - jnp.array(mean)) / jnp.array(std)


def clip_normalise(images: jax.Array) -> jax.Array:
  """`normalise` with the means and deviations of OpenAI's CLIP."""
  return normalise(images, clip.IMAGE_MEAN, clip.IMAGE_STD)


def _resample(images: jax.Array, shape: tuple[int, int], method: str) -> jax.Array:
  """`[B, H, W, 3]` -> `[B, *shape, 3]`, not clipped; an axis that keeps its size is left alone."""
  chex.assert_shape(images, (None, None, None, 3))
  batch, _, _, channels = images.shape
  return jax.image.resize(images, (batch, *shape, channels), method, antialias=True)


def _blur_matrix(side: int, size: int) -> np.ndarray:
  """`[side, side]` float64: the Gaussian before a reduction from `side` to `size`."""
  sigma = max(0.0, (side / size - 1) / 2)
  matrix = np.eye(side)
  if sigma > 0:
    radius = int(_TRUNCATE * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    matrix = _gather(np.arange(side)[:, None] + offsets, weights / weights.sum(), side)
  return matrix


def _zoom_matrix(side: int, size: int) -> np.ndarray:
  """`[size, side]` float64: linear interpolation at the centres of `size` equal cells."""
  position = (np.arange(size) + 0.5) * side / size - 0.5
  before = np.floor(position).astype(int)
  after_weight = position - before
  weights = np.stack([1 - after_weight, after_weight], axis=1)
  return _gather(before[:, None] + np.array([0, 1]), weights, side)


def _gather(columns: np.ndarray, weights: np.ndarray, side: int) -> np.ndarray:
  """`[N, side]` with `weights` at `columns` (`[N, K]`, mirrored into [0, side)), added up."""
  # Mirrored about the centre of the outermost pixel: ... 2 1 | 0 1 2 ... n-1 | n-2 ...
  period = max(2 * (side - 1), 1)
  columns = np.abs((columns + side - 1) % period - (side - 1)) if side > 1 else 0 * columns
  matrix = np.zeros((len(columns), side))
  rows = np.broadcast_to(np.arange(len(columns))[:, None], columns.shape)
  np.add.at(matrix, (rows, columns), np.broadcast_to(weights, columns.shape))
  return matrix
