"""Template matching: how well does some place of a picture look like a sprite, washed or not?

A generalised normalised cross-correlation with the sprite's alpha as the mask. Over the sprite and
a thin ring around it (weights D), the picture is explained by a linear model of the renderer:

    luma - 1/2  =  g * alpha * (T_luma - 1/2)     + b_luma * (1 - alpha)     + residual
    chroma      =  g * s * alpha * T_chroma       + b_chroma * (1 - alpha)   + residual

with a free background colour b, a gain g >= 0 (loss of contrast) and a saturation factor s within
`SATURATION_RANGE`. The score is one minus the residual's energy over

    min(energy about the D-weighted mean, energy left by the background alone),

so a plain area explains nothing, and neither does a silhouette of the wrong colour. It is 1 for a
perfect match and invariant to the gain and to the background. All sums are cross-correlations,
taken for every position by FFT; the best score over positions and scales counts.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlft.emoji import art
from rlft.emoji.world import IMAGE_SIZE

# The sizes that are drawn (15-16, 26-29), and steps for what a model may put between: a dog that is
# one pixel off still scores 0.8.
SCALES = (15, 16, 18, 20, 23, 26, 27, 28, 29)
SATURATION_RANGE = (0.3, 1.3)
_PAD = 2  # pixels: room for the ring around a sprite that touches the border
_GRID = IMAGE_SIZE + 2 * _PAD
_NOISE = 4e-4  # variance (in units of [0, 1]^2) below which differences do not count

# Luma and two opponent axes of chroma; the last two are orthogonal to grey, so that a loss of
# saturation multiplies them by a factor.
_OPPONENT = np.array(
  [
    [0.299, 0.587, 0.114],
    [1 / np.sqrt(2), 0.0, -1 / np.sqrt(2)],
    [1 / np.sqrt(6), -2 / np.sqrt(6), 1 / np.sqrt(6)],
  ],
  np.float32,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Templates:
  """All objects at S scales, ready for matching on a grid of N x N = 36 x 36.

  Attributes:
    spectra: `[S, 60, 5, N, N // 2 + 1]` complex64: conjugate spectra of the kernels background
      (unit energy), weight D, sprite luma (unit energy), sprite chroma (two axes, unit energy).
    norms: `[S, 60, 2]` float32: energies**0.5 of the sprite's luma and chroma before scaling.
    mass: `[S, 60]` float32: sum of the weights D.
    valid: `[S, N, N]` bool: positions at which the sprite is inside the canvas.
  """

  spectra: jax.Array | np.ndarray
  norms: jax.Array | np.ndarray
  mass: jax.Array | np.ndarray
  valid: jax.Array | np.ndarray


def gaussian_weights(n: int, sigma: float) -> np.ndarray:
  """`[n, n]` blur matrix (rows sum to 1) of standard deviation `sigma` pixels."""
  if sigma < 1e-3:
    return np.eye(n)
  distance = np.arange(n)[:, None] - np.arange(n)
  weights = np.exp(-0.5 * (distance / sigma) ** 2)
  return weights / weights.sum(axis=1, keepdims=True)


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
  weights = gaussian_weights(image.shape[0], sigma)
  return np.einsum("yi,xj,ij...->yx...", weights, weights, image, optimize=True)


def _kernels(name: str, size: int) -> tuple[np.ndarray, np.ndarray, float]:
  """Kernels `[5, N, N]`, norms `[2]` and mass of one sprite, see `Templates`."""
  placed = np.zeros((_GRID, _GRID, 4))
  colour, alpha = art.resized(name, size)
  inside = slice(_PAD, _PAD + size)
  placed[inside, inside] = np.concatenate([colour, alpha], axis=-1)
  placed = _blur(placed, 0.5)  # drawn sprites may be blurred; half a pixel is the middle way
  alpha = placed[..., 3]
  sprite = placed[..., :3] @ _OPPONENT.T  # premultiplied: alpha * T
  sprite[..., 0] -= 0.5 * alpha
  ring = np.clip(3 * _blur(alpha, (size / 16) ** 0.5), 0, 1)
  weight = np.maximum(alpha, ring)
  background = 1 - alpha
  background /= np.sqrt(np.sum(weight * background**2))
  # Orthogonal to the background in the D-weighted inner product: coefficients are then sums.
  sprite -= background[..., None] * np.einsum("yx,yxc->c", weight * background, sprite)
  energy = np.einsum("yx,yxc->c", weight, sprite**2)
  norms = np.sqrt([energy[0], energy[1] + energy[2]])
  scaled = weight[..., None] * sprite / np.maximum(norms[[0, 1, 1]], 1e-6)
  kernels = np.stack([weight * background, weight, *np.moveaxis(scaled, -1, 0)])
  return kernels, norms, weight.sum()


@functools.cache
def load_templates() -> Templates:
  """The templates of all `art.OBJECTS`, built from the shipped sprites in about a second."""
  spectra, norms, mass = [], [], []
  for size in SCALES:
    built = [_kernels(name, size) for name in art.OBJECTS]
    spectra.append(np.conj(np.fft.rfft2(np.stack([k for k, _, _ in built]))))
    norms.append([n for _, n, _ in built])
    mass.append([m for _, _, m in built])
  valid = np.zeros((len(SCALES), _GRID, _GRID), bool)
  for mask, size in zip(valid, SCALES, strict=True):
    mask[: IMAGE_SIZE - size + 1, : IMAGE_SIZE - size + 1] = True
  return Templates(
    spectra=np.stack(spectra).astype(np.complex64),
    norms=np.array(norms, np.float32),
    mass=np.array(mass, np.float32),
    valid=valid,
  )


def to_canvas(images: jax.Array) -> jax.Array:
  """Resizes `[..., H, W, 3]` to `[..., 32, 32, 3]` (antialiased); leaves 32 x 32 alone."""
  shape = (*images.shape[:-3], IMAGE_SIZE, IMAGE_SIZE, 3)
  if images.shape == shape:
    return images
  return jax.image.resize(images, shape, "linear", antialias=True)


def match(templates: Templates, images: jax.Array, object_ids: jax.Array) -> jax.Array:
  """Best score of each object over positions and scales.

  Args:
    templates: from `load_templates`.
    images: `[B, 32, 32, 3]` in [0, 1].
    object_ids: `[B, M]` int, indices into `art.OBJECTS`.

  Returns:
    `[B, M]` float32, at most 1.
  """
  channels = images.astype(jnp.float32) @ _OPPONENT.T - jnp.array([0.5, 0, 0])
  channels = jnp.pad(channels, ((0, 0), (_PAD, _PAD), (_PAD, _PAD), (0, 0)), mode="edge")
  energy = jnp.sum(channels**2, axis=-1, keepdims=True)
  planes = jnp.moveaxis(jnp.concatenate([channels, energy], axis=-1), -1, 1)
  planes = jnp.fft.rfft2(planes)[:, None]  # [B, 1, 4, N, N // 2 + 1]

  def best_of_scale(best, scale: Templates):
    kernels = scale.spectra[object_ids]  # [B, M, 5, N, N // 2 + 1]
    products = jnp.concatenate(
      [
        planes[:, :, :3] * kernels[:, :, :1],  # background: three channels
        planes[:, :, :3] * kernels[:, :, 1:2],  # D-weighted sums: three channels
        planes[:, :, 3:] * kernels[:, :, 1:2],  # D-weighted energy
        planes[:, :, :1] * kernels[:, :, 2:3],  # sprite luma
        jnp.sum(planes[:, :, 1:3] * kernels[:, :, 3:5], axis=2, keepdims=True),  # sprite chroma
      ],
      axis=2,
    )
    maps = jnp.fft.irfft2(products, s=(_GRID, _GRID))  # [B, M, 9, N, N]
    mass = scale.mass[object_ids][..., None, None]
    floor = _NOISE * mass
    total, luma, chroma = maps[:, :, 6], maps[:, :, 7], maps[:, :, 8]
    about_background = jnp.maximum(total - jnp.sum(maps[:, :, :3] ** 2, axis=2), 0)
    about_mean = jnp.maximum(total - jnp.sum(maps[:, :, 3:6] ** 2, axis=2) / mass, 0)
    # The best direction in the (luma, chroma) plane among the allowed saturations.
    norms = scale.norms[object_ids][..., None, None]
    low, high = (jnp.arctan2(s * norms[:, :, 1], norms[:, :, 0]) for s in SATURATION_RANGE)
    angle = jnp.clip(jnp.arctan2(chroma, luma), low, high)
    explained = jnp.maximum(luma * jnp.cos(angle) + chroma * jnp.sin(angle), 0) ** 2
    residual = jnp.maximum(about_background - explained, 0)
    score = 1 - (residual + floor) / (jnp.minimum(about_background, about_mean) + floor)
    score = jnp.max(jnp.where(scale.valid, score, -jnp.inf), axis=(-2, -1))
    return jnp.maximum(best, score), None

  best, _ = jax.lax.scan(best_of_scale, jnp.full(object_ids.shape, -jnp.inf), templates)
  return best
