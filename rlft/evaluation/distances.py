"""How far the distribution of all drawn pictures is from that of real ones: CMMD and KID on CLIP.

    cmmd?weights=...&real=FOLDER    arXiv 2401.09603: Gaussian kernel of width 10, times 1000
    kid?weights=...&real=FOLDER     arXiv 1801.01401's kernel (cosine + 1)^3, times 1000

Both are the squared maximum mean discrepancy of CLIP's image features, estimated without bias, so
that it is 0 on average for two sets of one distribution, and below 0 now and then. The figures of
CMMD's authors have the biased estimate and images resized to squares of 336 pixels; KID's have
Inception's features: compare models with each other, not with published figures.
"""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np
import PIL.Image

from rlft.models.files import clip_weights
from rlft.rewards import clip
from rlft.storage import files
from rlft.storage import images as images_lib
from rlft.types import UserError

# (x [n, F], y [m, F]) of unit norm -> [n, m].
Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]

_SCALE = 1000.0
_SIGMA = 10.0
_FEWEST = 3  # images of which the mean over pairs has a spread
_BLOCK = 1024  # rows of a kernel matrix held at once
_BATCH = 64  # real pictures at once


@dataclasses.dataclass(frozen=True)
class Distance:
  """A metric of all images of an evaluation together; it is no reward.

  Attributes:
    name: what the user wrote.
    embed: `(params, images [B, H, W, 3] in [0, 1]) -> features [B, F]`.
    params: weights, given to `embed` as its first argument.
    real: `[m, F]`, features of real pictures.
    kernel: of the discrepancy.
    scale: factor of the discrepancy.
  """

  name: str
  embed: Callable[[Any, jax.Array], jax.Array]
  params: Any
  real: np.ndarray
  kernel: Kernel
  scale: float = _SCALE

  is_set = False
  is_measure = True
  lower_is_better = True

  def scores(self, features: np.ndarray) -> np.ndarray:
    """`[n]` of all drawn features `[n, F]`; their mean is the distance.

    Raises:
      UserError: n is less than 3.
    """
    if len(features) < _FEWEST:
      raise UserError(
        f"metric {self.name} compares distributions, of which {len(features)} images show nothing:"
        " draw thousands"
      )
    return self.scale * contributions(features, self.real, self.kernel)


def cmmd(spec: str, *, weights: str, real: str) -> Distance:
  """'cmmd': the squared discrepancy with a Gaussian kernel.

  Args:
    spec: what the user wrote.
    weights: a CLIP model as for 'clip-score'; its authors use ViT-L/14 of 336 pixels.
    real: a folder of real pictures, also in folders below it.

  Raises:
    UserError: the files are no CLIP model, or there are too few pictures.
  """
  return _on_clip(spec, gaussian, weights, real)


def kid(spec: str, *, weights: str, real: str) -> Distance:
  """'kid': the squared discrepancy with KID's kernel, on CLIP features; else as `cmmd`."""
  return _on_clip(spec, cubic, weights, real)


def gaussian(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """exp(-|x - y|^2 / (2 * 10^2)): `[n, F]`, `[m, F]` -> `[n, m]`."""
  squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
  return np.exp(-squares / (2 * _SIGMA**2))


def cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """(<x, y> + 1)^3: `[n, F]`, `[m, F]` -> `[n, m]`."""
  return (x @ y.T + 1) ** 3


def contributions(drawn: np.ndarray, real: np.ndarray, kernel: Kernel) -> np.ndarray:
  """What each drawn image adds to the squared discrepancy: the jackknife's pseudo-values.

      D = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)
      c_i = n D - (n - 1) D without x_i

  Their mean is D itself, as D has no bias, and their spread is how uncertain it is by the drawn
  images: so intervals and paired differences are made of them as of any metric's scores. The real
  pictures are taken as given.
  Sources: Gretton et al., "A Kernel Two-Sample Test" (2012), equation 3; J. Tukey (1958).

  Args:
    drawn: `[n, F]` features, n >= 3.
    real: `[m, F]`, m >= 2.
    kernel: of the discrepancy.

  Returns:
    `[n]` float64.
  """
  drawn, real = np.asarray(drawn, np.float64), np.asarray(real, np.float64)
  count = len(drawn)
  sums = _row_sums(drawn, drawn, kernel) - _diagonal(drawn, kernel)
  total = sums.sum()
  of_drawn = total / (count - 1) - (total - 2 * sums) / (count - 2)
  of_real = _row_sums(real, real, kernel) - _diagonal(real, kernel)
  across = _row_sums(drawn, real, kernel) / len(real)
  return of_drawn + of_real.sum() / (len(real) * (len(real) - 1)) - 2 * across


def _row_sums(x: np.ndarray, y: np.ndarray, kernel: Kernel) -> np.ndarray:
  """`[n]`, the sums of the kernel over `y`."""
  parts = [kernel(x[start : start + _BLOCK], y).sum(1) for start in range(0, len(x), _BLOCK)]
  return np.concatenate(parts)


def _diagonal(x: np.ndarray, kernel: Kernel) -> np.ndarray:
  """`[n]`, the kernel of each row with itself."""
  return np.concatenate([kernel(row[None], row[None])[0] for row in x])


def _on_clip(spec: str, kernel: Kernel, weights: str, real: str) -> Distance:
  embed, params, features = _features(weights, real)
  return Distance(spec, embed, params, features, kernel)


@functools.lru_cache(maxsize=1)  # Both kernels are asked for one after the other.
def _features(weights: str, real: str) -> tuple[Callable[..., jax.Array], Any, np.ndarray]:
  """An image tower as `Distance` has it, and the features of a folder's pictures."""
  paths = _pictures(real)
  module, params = clip_weights.load(weights)
  params = {name: tree for name, tree in params.items() if not name.startswith("text_")}

  def embed(params, images):
    return clip.image_features(module, params, images, clip.torchvision_crop)

  compiled, size = jax.jit(embed), module.config.vision_config.image_size
  found = []
  for start in range(0, len(paths), _BATCH):
    images = np.stack([_read(path, size) for path in paths[start : start + _BATCH]])
    padded = np.pad(images, ((0, _BATCH - len(images)), (0, 0), (0, 0), (0, 0)), mode="edge")
    found.append(np.asarray(compiled(params, padded))[: len(images)])
  return embed, params, np.concatenate(found)


def _pictures(folder: str) -> list[pathlib.Path]:
  directory = files.local_path(folder)
  if not directory.is_dir():
    raise UserError(f"real={folder} is no folder: give one of real pictures")
  found = sorted(
    path for path in directory.rglob("*") if path.suffix.lower() in images_lib.SUFFIXES
  )
  if len(found) < _FEWEST:
    raise UserError(
      f"real={folder} has {len(found)} pictures: give a folder of at least {_FEWEST}, better of"
      f" thousands ({', '.join(images_lib.SUFFIXES)})"
    )
  return found


def _read(path: pathlib.Path, size: int) -> np.ndarray:
  """A picture as CLIP's own processing has it: `[size, size, 3]` float32 in [0, 1]."""
  try:
    image = images_lib.upright(path)
  except Exception as error:  # Decoders of two dozen formats raise what they like.
    raise UserError(f"picture {path} cannot be decoded ({error}): replace or remove it") from error
  width, height = (max(size * side // min(image.size), size) for side in image.size)
  image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
  left, top = round((width - size) / 2), round((height - size) / 2)
  image = image.crop((left, top, left + size, top + size))
  return np.asarray(image, np.float32) / 255
