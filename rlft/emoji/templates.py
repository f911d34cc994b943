"""Template matching: how well does some place of a picture look like a sprite, washed or not?

A generalised normalised cross-correlation with the sprite's alpha as the mask. Over the sprite and
a thin ring around it (weights D), the picture is explained by a linear model of the renderer:

    luma - 1/2  =  g * alpha * (T_luma - 1/2)     + b_luma * (1 - alpha)     + residual
    chroma      =  g * s * alpha * T_chroma       + b_chroma * (1 - alpha)   + residual

with a free background colour b, a gain g >= 0 (loss of contrast) and a saturation factor s within
`SATURATION_RANGE`. The score is one minus the residual's energy over

    min(energy about the D-weighted mean, energy left by the background alone),

so a plain area explains nothing, and neither does a silhouette of the wrong colour. It is 1 for a
perfect match and invariant to the gain and to the background.

Fidelity asks for more: the sprite as the artist drew it, g = s = 1. It is one minus the relative
distance, |picture - sprite| / |sprite| about the background, and 0 where the sprite is further away
than a plain area would be: a washed-out, a burnt and a blurred picture all lose.

All sums are cross-correlations, taken for every position by FFT; the best of all positions and
scales counts.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlft.emoji import art
from rlft.emoji.world import IMAGE_SIZE, PORTRAIT_SIZES

# The sizes that are drawn (15-16, 26-29), and steps for what a model may put between: a dog that is
# one pixel off still scores 0.8.
SCALES = (15, 16, 18, 20, 23, 26, 27, 28, 29)
PORTRAIT_SCALES = PORTRAIT_SIZES
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
  """M sprites at S scales, ready for matching on a grid of N x N = 36 x 36.

  Attributes:
    spectra: `[S, M, 5, N, N // 2 + 1]` complex64: conjugate spectra of the kernels background
      (unit energy), weight D, sprite luma (unit energy), sprite chroma (two axes, unit energy).
    norms: `[S, M, 2]` float32: energies**0.5 of the sprite's luma and chroma before scaling.
    mass: `[S, M]` float32: sum of the weights D.
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
  return _build(art.OBJECTS, SCALES)


@functools.cache
def load_portraits() -> Templates:
  """Those of all portraits in the order of `portrait_ids`, built in about two seconds."""
  return _build(_PORTRAITS, PORTRAIT_SCALES)


_PORTRAITS = tuple(
  art.portrait_name(occupation, gender, tone)
  for occupation in art.OCCUPATIONS
  for gender in art.GENDERS
  for tone in range(len(art.TONES))
)


def portrait_ids(occupation: jax.Array) -> jax.Array:
  """`[B]` int, indices into `art.OCCUPATIONS` -> `[B, 15]`, the sprites of each in all tones."""
  count = len(art.GENDERS) * len(art.TONES)
  return occupation[:, None] * count + jnp.arange(count)


def _build(names: Sequence[str], scales: Sequence[int]) -> Templates:
  spectra, norms, mass = [], [], []
  for size in scales:
    built = [_kernels(name, size) for name in names]
    spectra.append(np.conj(np.fft.rfft2(np.stack([k for k, _, _ in built]))).astype(np.complex64))
    norms.append([n for _, n, _ in built])
    mass.append([m for _, _, m in built])
  valid = np.zeros((len(scales), _GRID, _GRID), bool)
  for mask, size in zip(valid, scales, strict=True):
    mask[: IMAGE_SIZE - size + 1, : IMAGE_SIZE - size + 1] = True
  return Templates(
    spectra=np.stack(spectra),
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


def match(templates: Templates, images: jax.Array, sprites: jax.Array) -> jax.Array:
  """Best score of each sprite over positions and scales.

  Args:
    templates: from `load_templates` or `load_portraits`.
    images: `[B, 32, 32, 3]` in [0, 1].
    sprites: `[B, M]` int, indices into the templates.

  Returns:
    `[B, M]` float32, at most 1.
  """

  def score(maps: _Maps):
    floor = _NOISE * maps.mass
    about_mean = jnp.maximum(maps.energy - maps.mean, 0)
    # The best direction in the (luma, chroma) plane among the allowed saturations.
    low, high = (jnp.arctan2(s * maps.norms[1], maps.norms[0]) for s in SATURATION_RANGE)
    angle = jnp.clip(jnp.arctan2(maps.chroma, maps.luma), low, high)
    explained = jnp.maximum(maps.luma * jnp.cos(angle) + maps.chroma * jnp.sin(angle), 0) ** 2
    residual = jnp.maximum(maps.about_background - explained, 0)
    return 1 - (residual + floor) / (jnp.minimum(maps.about_background, about_mean) + floor)

  return _best(score, templates, images, sprites)


def fidelity(templates: Templates, images: jax.Array, sprites: jax.Array) -> jax.Array:
  """How near each sprite comes to the artist's at its best place and scale.

  Args:
    templates: from `load_templates` or `load_portraits`.
    images: `[B, 32, 32, 3]` in [0, 1].
    sprites: `[B, M]` int, indices into the templates.

  Returns:
    `[B, M]` float32 in [0, 1]: one minus the distance in units of the sprite's own contrast.
  """

  def nearness(maps: _Maps):
    luma, chroma = maps.norms
    whole = luma**2 + chroma**2
    distance = maps.about_background - 2 * (luma * maps.luma + chroma * maps.chroma) + whole
    # At 0 the root's slope is infinite, and NaN where it is multiplied by 0.
    squared = distance / whole
    return 1 - jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)

  return jnp.maximum(_best(nearness, templates, images, sprites), 0)


@dataclasses.dataclass(frozen=True)
class _Maps:
  """Sums over a sprite's support, weighted by D, at every position: `[B, M, N, N]`.

  Attributes:
    mass: the sum of D.
    norms: luma's and chroma's in the sprite itself.
    energy: of the picture.
    mean: the energy of the picture's mean.
    about_background: what the background does not explain.
    luma: projection of the picture on the sprite's luma, of unit energy.
    chroma: likewise.
  """

  mass: jax.Array
  norms: Sequence[jax.Array]
  energy: jax.Array
  mean: jax.Array
  about_background: jax.Array
  luma: jax.Array
  chroma: jax.Array


def _best(
  score: Callable[[_Maps], jax.Array],
  templates: Templates,
  images: jax.Array,
  sprites: jax.Array,
) -> jax.Array:
  """The largest `score(maps)` over positions and scales, `[B, M]`."""
  channels = images.astype(jnp.float32) @ _OPPONENT.T - jnp.array([0.5, 0, 0])
  channels = jnp.pad(channels, ((0, 0), (_PAD, _PAD), (_PAD, _PAD), (0, 0)), mode="edge")
  energy = jnp.sum(channels**2, axis=-1, keepdims=True)
  planes = jnp.moveaxis(jnp.concatenate([channels, energy], axis=-1), -1, 1)
  planes = jnp.fft.rfft2(planes)[:, None]  # [B, 1, 4, N, N // 2 + 1]

  def correlate(products):
    return jnp.fft.irfft2(products, s=(_GRID, _GRID))

  def best_of_scale(best, scale: Templates):
    kernels = scale.spectra[sprites]  # [B, M, 5, N, N // 2 + 1]
    mass = scale.mass[sprites][..., None, None]
    norms = scale.norms[sprites][..., None, None]
    background = correlate(planes[:, :, :3] * kernels[:, :, :1])
    totals = correlate(planes[:, :, :3] * kernels[:, :, 1:2])  # for the mean; not all scores ask
    rest = correlate(
      jnp.concatenate(
        [
          planes[:, :, 3:] * kernels[:, :, 1:2],  # energy
          planes[:, :, :1] * kernels[:, :, 2:3],  # sprite luma
          jnp.sum(planes[:, :, 1:3] * kernels[:, :, 3:5], axis=2, keepdims=True),  # sprite chroma
        ],
        axis=2,
      )
    )
    energy, luma, chroma = jnp.moveaxis(rest, 2, 0)
    found = score(
      _Maps(
        mass=mass,
        norms=(norms[:, :, 0], norms[:, :, 1]),
        energy=energy,
        mean=jnp.sum(totals**2, axis=2) / mass,
        about_background=jnp.maximum(energy - jnp.sum(background**2, axis=2), 0),
        luma=luma,
        chroma=chroma,
      )
    )
    found = jnp.max(jnp.where(scale.valid, found, -jnp.inf), axis=(-2, -1))
    return jnp.maximum(best, found), None

  best, _ = jax.lax.scan(best_of_scale, jnp.full(sprites.shape, -jnp.inf), templates)
  return best
