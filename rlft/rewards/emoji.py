"""The rewards of the emoji world, from the small network of `rlft.emoji.scorer`.

They stand in for the paper's skin-tone classifier, object detector and preference model. The
oracles, which measure the same things by other means, are never trained on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlft.rewards import parity
from rlft.types import Reward, UserError

# Prompts name one or two objects. A constant, so that every batch has the same shape.
MAX_OBJECTS = 2
# Below this probability of skin, a picture has no skin tone.
MIN_SKIN = 0.5
# Preference = VIVIDNESS_WEIGHT * vividness + (1 - VIVIDNESS_WEIGHT) * (what was named is there).
# The second part keeps bright pictures of nothing from winning.
VIVIDNESS_WEIGHT = 0.5


def tone_parity() -> Reward:
  """'emoji-tone-parity': minus the statistical parity of four skin tones, on sets of images."""
  from rlft.emoji import scorer

  def classify(params, images):
    scores = scorer.predict(params, images)
    return jnp.where(scores.skin_prob[:, None] >= MIN_SKIN, scores.tone_probs, jnp.nan)

  return parity.parity_reward(classify, "emoji-tone-parity", scorer.load()[1])


def objects() -> Reward:
  """'emoji-objects': mean of the confidences in the objects that the prompt names, in [0, 1].

  Needs `metadata['objects']`. Source: arXiv 2401.12244, section on compositionality.
  """
  from rlft.emoji import scorer

  def prepare(prompts, metadata):
    _require(("objects",), prompts, metadata)
    return object_classes(prompts, metadata)

  def score(params, images, classes):
    return named_confidence(scorer.predict(params, images).object_probs, classes)

  return Reward("emoji-objects", "jax", score, prepare=prepare, params=scorer.load()[1])


def preference() -> Reward:
  """'emoji-preference': vividness, and what the prompt names is in the picture; in [0, 1].

  What is named: `metadata['objects']` (mean confidence) or, if there are none,
  `metadata['occupation']` (probability of skin, as there is a person in every portrait).
  """
  from rlft.emoji import scorer

  def prepare(prompts, metadata):
    _require(("objects", "occupation"), prompts, metadata)
    return object_classes(prompts, metadata)

  def score(params, images, classes):
    scores = scorer.predict(params, images)
    confidence = named_confidence(scores.object_probs, classes)
    named = jnp.where((classes >= 0).any(axis=1), confidence, scores.skin_prob)
    return VIVIDNESS_WEIGHT * scores.vividness + (1 - VIVIDNESS_WEIGHT) * named

  return Reward("emoji-preference", "jax", score, prepare=prepare, params=scorer.load()[1])


def object_classes(prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> np.ndarray:
  """Class indices of the objects named in each prompt.

  Returns:
    `[B, MAX_OBJECTS]` int32, indices into `rlft.emoji.art.OBJECTS`, filled up with -1.

  Raises:
    UserError: an object that is not in the emoji world, or too many of them.
  """
  from rlft.emoji import art

  index = {name: i for i, name in enumerate(art.OBJECTS)}
  classes = np.full((len(prompts), MAX_OBJECTS), -1, np.int32)
  for row, (prompt, known) in enumerate(zip(prompts, metadata, strict=True)):
    names = _names(known, "objects")
    if len(names) > MAX_OBJECTS:
      raise UserError(
        f"the prompt {prompt!r} names {len(names)} objects: name at most {MAX_OBJECTS}"
      )
    if unknown := [name for name in names if name not in index]:
      raise UserError(
        f"the prompt {prompt!r} names {unknown[0]!r}, which the emoji world does not have:"
        " use the names in rlft.emoji.art.OBJECTS"
      )
    classes[row, : len(names)] = [index[name] for name in names]
  return classes


def named_confidence(object_probs: jax.Array, classes: jax.Array) -> jax.Array:
  """Mean confidence in the named objects.

  Args:
    object_probs: `[B, A]` in [0, 1].
    classes: `[B, M]` int32 indices into A; -1 where there is no object.

  Returns:
    `[B]` float32 in [0, 1]; NaN where no object is named.
  """
  named = classes >= 0
  count = jnp.sum(named, axis=1)
  probs = jnp.take_along_axis(object_probs, jnp.maximum(classes, 0), axis=1)
  mean = jnp.sum(probs * named, axis=1) / jnp.maximum(count, 1)
  return jnp.where(count > 0, mean, jnp.nan)


def _require(keys: Sequence[str], prompts, metadata) -> None:
  for prompt, known in zip(prompts, metadata, strict=True):
    if not any(_names(known, key) for key in keys):
      raise UserError(
        f"the prompt {prompt!r} has no {' or '.join(map(repr, keys))} in its metadata: use"
        " prompts that say what to draw, or another reward"
      )


def _names(known: Mapping[str, Any], key: str) -> list[str]:
  # A column of a table may hold None, one word, or an array of words.
  names = known.get(key)
  return [] if names is None else [names] if isinstance(names, str) else list(names)
