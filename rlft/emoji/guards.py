"""What training by reward may lose in the emoji world: skin, diversity, closeness to renderings.

The feature of pictures is `rlft.evaluation.guards.cells`, centred and scaled by clean renderings of
the world. "Clean" is vivid and whole; portraits have all tones alike.
"""

from collections.abc import Mapping, Sequence
import functools
import itertools
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from rlft.emoji import measures, world
from rlft.evaluation import guards
from rlft.rewards import diversity as diversity_lib
from rlft.rewards import named
from rlft.types import JaxReward

_RENDERINGS = 32  # of each prompt
_WORLD = 512  # scenes by which the feature is centred and scaled
CLEAN = {"saturation": 1.0, "contrast": 1.0, "crowded": False}  # of `world.render_scene`
_NEEDS = ("objects", "occupation")

_NOTHING = np.full((_RENDERINGS, world.IMAGE_SIZE, world.IMAGE_SIZE, 3), np.nan, np.float32)

_cells = jax.jit(guards.cells)


@functools.cache
def _normal() -> tuple[np.ndarray, np.ndarray]:
  """Mean `[4, 64]` and scale `[4, 1]` of the cells of clean renderings; colours have one scale."""
  rng = np.random.default_rng(0)
  kinds = itertools.islice(itertools.cycle(world.MIXTURE), _WORLD)
  scenes = [world.render_scene(rng, kind, **CLEAN).image for kind in kinds]
  found = np.asarray(_cells(np.stack(scenes) / np.float32(255)))
  mean = found.mean(0)
  colours, texture = np.std((found - mean)[:, :3]), np.std((found - mean)[:, 3:])
  return mean, np.float32([[colours]] * 3 + [[texture]])


def _features(params: Any, images: jax.Array) -> jax.Array:
  """`[B, F]` from `[B, H, W, 3]`; `params` as of `_normal`."""
  mean, scale = params
  return ((guards.cells(images) - mean) / scale).reshape(len(images), -1)


_apply = jax.jit(_features)


def render(
  known: Mapping[str, Any], rng: np.random.Generator, count: int, **how: Any
) -> np.ndarray:
  """`[count, H, W, 3]` uint8: renderings of what a prompt's metadata name, with all tones alike.

  Args:
    known: with 'objects' or 'occupation'.
    rng: consumed.
    count: how many.
    **how: for `world.render_scene`, e.g. `CLEAN`.
  """
  if not (objects := named.names(known, "objects")):
    tones = (i % len(world.TONE_CLASSES) for i in range(count))
    asked = [("portrait", {"occupation": known["occupation"], "tone": tone}) for tone in tones]
  else:
    kind = "object" if len(objects) == 1 else "pair"
    asked = [(kind, {"objects": objects})] * count
  return np.stack([world.render_scene(rng, kind, **what, **how).image for kind, what in asked])


def _rendered(prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> np.ndarray:
  """`[B, 32, F]`: features of clean renderings of each prompt, the same whenever they are made.

  NaN where a prompt's metadata name nothing.
  """
  real = {}
  for text, known in dict(zip(prompts, metadata, strict=True)).items():
    asks = any(named.has(known, key) for key in _NEEDS)
    rng = np.random.default_rng(zlib.crc32(text.encode()))
    images = render(known, rng, _RENDERINGS, **CLEAN) / np.float32(255) if asks else _NOTHING
    real[text] = np.asarray(_apply(_normal(), images))
  return np.stack([real[text] for text in prompts])


def _of_sets(params: Any, images: jax.Array) -> jax.Array:
  """`[P, G, F]` from `[P, G, H, W, 3]`."""
  found = _features(params, images.reshape(-1, *images.shape[2:]))
  return found.reshape(*images.shape[:2], -1)


def skin() -> JaxReward:
  """'oracle-skin': 1 where skin is found (see `measures.tone_class`), else 0."""

  def score(params, images, features):
    return (measures.tone_class(images)[0] >= 0).astype(jnp.float32)

  return JaxReward("oracle-skin", score)


def diversity() -> JaxReward:
  """'oracle-diversity': Vendi score of the images of a prompt, in [1, G]."""

  def score(params, images, features):
    found = _of_sets(params, images)
    return jax.vmap(diversity_lib.vendi)(found, jnp.ones(images.shape[:2], bool))

  return JaxReward("oracle-diversity", score, params=_normal(), is_set=True)


def distance() -> JaxReward:
  """'oracle-distance': of the images of a prompt to clean renderings of it; LOWER is better.

  `guards.kernel_distance`, unbiased, so that its mean over prompts says how far the pictures are.
  """

  def score(params, images, real):
    return jax.vmap(guards.kernel_distance)(_of_sets(params, images), real[:, 0])

  return JaxReward(
    "oracle-distance",
    score,
    prepare=_rendered,
    params=_normal(),
    is_set=True,
    lower_is_better=True,
    needs=_NEEDS,
  )


def likeness() -> JaxReward:
  """'oracle-likeness': cosine to the most similar clean rendering of the prompt, in [-1, 1]."""

  def score(params, images, real):
    return guards.likeness(_features(params, images), real)

  return JaxReward("oracle-likeness", score, prepare=_rendered, params=_normal(), needs=_NEEDS)
