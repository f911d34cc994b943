"""Ground truth about emoji pictures that no model is ever trained on.

Three measures, all pure JAX on `[B, H, W, 3]` in [0, 1] (other sizes are resized to 32 x 32):
whether named objects are in the picture, the tone class of the skin, and a preference.
The constants in `data/oracles.json` come from rendered scenes: `python -m rlft.emoji.calibrate`
fits them and prints the error rates.
"""

from collections.abc import Mapping
import dataclasses
import functools
import json
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rlft.emoji import art, templates
from rlft.rewards import color

CALIBRATION_FILE = art.DATA_DIR / "oracles.json"

# Tone: where faces are, and what counts as skin (CIELAB, D65).
_FACE = (slice(12, 22), slice(11, 24))  # rows, columns of 32
_SKIN_HUE = (25.0, 85.0)  # degrees
_SKIN_CHROMA = (4.0, 40.0)
_SKIN_LIGHTNESS = 15.0
_SKIN_SPREAD = 10.0  # CIELAB distance from the median skin pixel
_BACKGROUND_DISTANCE = 4.0  # CIELAB distance from the colour of the upper corners
_SKIN_SHARE = 0.15  # of the face region; less is "no skin found"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PresenceParams:
  """What `object_confidence` needs: confidence = sigmoid(slope * -log(1 - score) + bias).

  Attributes:
    templates: all objects at all scales.
    slope: scalar.
    bias: `[M]`, one for each of `art.OBJECTS`: plain sprites match by chance more easily.
  """

  templates: templates.Templates
  slope: Any
  bias: Any


@functools.cache
def calibration() -> Mapping[str, Any]:
  """The content of `data/oracles.json`."""
  return json.loads(CALIBRATION_FILE.read_text())


@functools.cache
def presence_params() -> PresenceParams:
  """The calibrated templates."""
  fit = calibration()["presence"]
  bias = np.array([fit["bias"][name] for name in art.OBJECTS], np.float32)
  return PresenceParams(templates.load_templates(), np.float32(fit["slope"]), bias)


def evidence(score: jax.Array) -> jax.Array:
  """-log(1 - score), clipped to [-2, 7]: what the confidence is logistic in."""
  return -jnp.log(jnp.clip(1 - score, np.exp(-7), np.exp(2)))


@jax.jit
def _object_confidence(params: PresenceParams, images, object_ids):
  ids = jnp.maximum(object_ids, 0)
  score = templates.match(params.templates, templates.to_canvas(images), ids)
  confidence = jax.nn.sigmoid(params.slope * evidence(score) + params.bias[ids])
  return jnp.where(object_ids >= 0, confidence, 0.0)


def object_confidence(
  images: jax.Array, object_ids: jax.Array, params: PresenceParams | None = None
) -> jax.Array:
  """Confidence that each named object is in the picture, by template matching.

  Calibrated by logistic regression with even odds of present and absent: 0.5 is the threshold.

  Args:
    images: `[B, H, W, 3]` in [0, 1].
    object_ids: `[B, M]` int, indices into `art.OBJECTS`; -1 is padding.
    params: `presence_params()` if not given; pass it where it should not be a jit constant.

  Returns:
    `[B, M]` float32 in [0, 1]; 0 for padding.
  """
  chex.assert_rank([images, object_ids], [4, 2])
  return _object_confidence(presence_params() if params is None else params, images, object_ids)


@jax.jit
def skin(images: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Finds skin in the face region and measures it.

  A pixel is skin if its hue, chroma and lightness are those of skin, it is close to the median of
  such pixels, and it is not the background (median of the upper corners).

  Args:
    images: `[B, H, W, 3]` in [0, 1].

  Returns:
    Individual typology angle atan2(L* - 50, b*) of the mean skin colour `[B]` in degrees, NaN where
    no pixel is skin; the share of the face region that is skin `[B]` in [0, 1].
  """
  chex.assert_rank(images, 4)
  lab = color.cielab(jnp.clip(templates.to_canvas(images), 0, 1))
  face = lab[:, _FACE[0], _FACE[1]].reshape(lab.shape[0], -1, 3)
  lightness, a, b = face[..., 0], face[..., 1], face[..., 2]
  hue, chroma = jnp.degrees(jnp.arctan2(b, a)), jnp.hypot(a, b)
  is_skin = (
    (hue > _SKIN_HUE[0])
    & (hue < _SKIN_HUE[1])
    & (chroma > _SKIN_CHROMA[0])
    & (chroma < _SKIN_CHROMA[1])
    & (lightness > _SKIN_LIGHTNESS)
  )
  median = jnp.nanmedian(jnp.where(is_skin[..., None], face, jnp.nan), axis=1, keepdims=True)
  corners = jnp.concatenate([lab[:, :4, 0], lab[:, :4, -1], lab[:, 0, :4], lab[:, 0, -4:]], axis=1)
  background = jnp.median(corners, axis=1, keepdims=True)
  is_skin &= jnp.linalg.norm(face - median, axis=-1) < _SKIN_SPREAD
  is_skin &= jnp.linalg.norm(face - background, axis=-1) > _BACKGROUND_DISTANCE
  mean = jnp.mean(face, axis=1, where=is_skin[..., None])
  ita = color.typology_angle(mean)
  return ita, jnp.mean(is_skin, axis=1)


def tone_class(images: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Skin tone by individual typology angle (ITA; Chardon et al. 1991).

  Args:
    images: `[B, H, W, 3]` in [0, 1].

  Returns:
    class `[B]` int32, an index into `world.TONE_CLASSES`, -1 where no skin is found (less than 15 %
    of the face region); ITA `[B]` in degrees.
  """
  ita, share = skin(images)
  thresholds = jnp.array(calibration()["tone"]["thresholds"])  # falling: light skin is high
  tone = jnp.sum(ita[:, None] < thresholds, axis=1)
  return jnp.where(share >= _SKIN_SHARE, tone, -1).astype(jnp.int32), ita


@functools.cache
def preference_params() -> tuple[templates.Templates, templates.Templates]:
  """The sprites of objects and of portraits, for `preference`."""
  return templates.load_templates(), templates.load_portraits()


@jax.jit
def object_fidelity(sprites: templates.Templates, images, object_ids) -> jax.Array:
  """Mean fidelity of the named objects, see `templates.fidelity`; `[B]`, NaN if none is named.

  Args:
    sprites: of objects.
    images: `[B, H, W, 3]` in [0, 1].
    object_ids: `[B, M]` int, indices into `art.OBJECTS`; -1 is padding.
  """
  named = object_ids >= 0
  near = templates.fidelity(sprites, templates.to_canvas(images), jnp.maximum(object_ids, 0))
  return jnp.sum(near * named, axis=1) / jnp.sum(named, axis=1)


@jax.jit
def portrait_fidelity(sprites: templates.Templates, images, occupations) -> jax.Array:
  """Fidelity to the nearest of the occupation's sprites, whatever gender and tone; `[B]`.

  Args:
    sprites: of portraits.
    images: `[B, H, W, 3]` in [0, 1].
    occupations: `[B]` int, indices into `art.OCCUPATIONS`.
  """
  ids = templates.portrait_ids(occupations)
  return jnp.max(templates.fidelity(sprites, templates.to_canvas(images), ids), axis=1)


def preference(
  images: jax.Array,
  object_ids: jax.Array,
  occupations: jax.Array,
  params: tuple[templates.Templates, templates.Templates],
) -> jax.Array:
  """What a viewer would like: what was asked for, vivid and sharp, as the artist drew it.

  The fidelity of the named objects, mean over them, or of the portrait. Washed-out, burnt and
  blurred pictures are disliked alike, and so is one that does not show what the prompt names.

  Args:
    images: `[B, H, W, 3]` in [0, 1].
    object_ids: `[B, M]` int, indices into `art.OBJECTS`; -1 is padding.
    occupations: `[B]` int, indices into `art.OCCUPATIONS`; -1 where no portrait is asked for.
    params: `preference_params()`.

  Returns:
    `[B]` float32 in [0, 1]; NaN where a prompt names neither.
  """
  objects, portraits = params
  of_portrait = portrait_fidelity(portraits, images, jnp.maximum(occupations, 0))
  return jnp.where(occupations >= 0, of_portrait, object_fidelity(objects, images, object_ids))
