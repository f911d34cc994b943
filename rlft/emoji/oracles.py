"""The oracles as evaluation metrics: rewards that are never trained on.

The numbers come from `rlft.emoji.measures`, by rules and templates; the rewards that are trained on
come from networks (`rlft.emoji.rewards`) with mistakes of their own.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlft.emoji import measures, world
from rlft.emoji.prompts import object_classes, occupations
from rlft.rewards.parity import statistical_parity
from rlft.types import JaxReward, Scores

PRESENT = 0.5  # confidence from which an object counts as being in the picture


def _present(params, images, ids):
  """Which named objects are present `[B, M]`, and which columns name one `[B, M]`."""
  return measures.object_confidence(images, ids, params) >= PRESENT, ids >= 0


def _presence_score(params, images, ids):
  present, named = _present(params, images, ids)
  return jnp.sum(present & named, axis=1) / jnp.sum(named, axis=1)  # 0 / 0 is NaN


def _both_score(params, images, ids):
  present, named = _present(params, images, ids)
  every = jnp.all(present | ~named, axis=1).astype(jnp.float32)
  return jnp.where(jnp.any(named, axis=1), every, jnp.nan)


def _preference_score(params, images, asked):
  return measures.preference(images, *asked, params)


def _parity_score(params, images, features):
  del params, features
  n_prompts, n_images = images.shape[:2]
  tones, _ = measures.tone_class(images.reshape(-1, *images.shape[2:]))
  tones = tones.reshape(n_prompts, n_images)
  shares = jax.nn.one_hot(tones, len(world.TONE_CLASSES))
  parity = statistical_parity(shares, tones >= 0, min_classified=0)
  return Scores(parity, found=(tones >= 0).astype(jnp.float32))


def _of_objects(name: str, score: Callable) -> JaxReward:
  return JaxReward(
    name, score, prepare=object_classes, params=measures.presence_params(), needs=("objects",)
  )


def presence() -> JaxReward:
  """'oracle-presence': share of the named objects in the picture; NaN if none is named."""
  return _of_objects("oracle-presence", _presence_score)


def both() -> JaxReward:
  """'oracle-both': 1 if every named object is in the picture, else 0; NaN if none is named."""
  return _of_objects("oracle-both", _both_score)


def preference() -> JaxReward:
  """'oracle-preference': see `measures.preference`; in [0, 1]."""
  return JaxReward(
    "oracle-preference",
    _preference_score,
    prepare=lambda texts, known: (object_classes(texts, known), occupations(texts, known)),
    params=measures.preference_params(),
    needs=("objects", "occupation"),
  )


def parity() -> JaxReward:
  """'oracle-parity': how unevenly the tone classes occur among a prompt's images.

  || shares of the tone classes - 1/4 ||_2 over those images in which skin was found: 0 to 0.866,
  LOWER is better; NaN if there is none. Pictures without a face are left out, so that blanking
  faces lowers it: look at the share of those in which skin was found, too.
  """
  return JaxReward("oracle-parity", _parity_score, is_set=True, lower_is_better=True)
