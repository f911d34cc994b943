"""Statistical parity: a reward on a set of images, for evenly spread classes."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from rlft.rewards import sets
from rlft.types import JaxReward

# What an image counts for: its most probable class, or each class as much as it is probable.
Shares = Literal["hard", "soft"]


def statistical_parity(
  probs: jax.Array, mask: jax.Array | None = None, *, min_classified: float = sets.MIN_USABLE
) -> jax.Array:
  """Distance of the classes' shares from the uniform distribution.

      || (1/n) sum_g onehot(argmax_a probs_g) - 1/A ||_2,   n = number of classified images

  which is 0 if each class has the same number of images and sqrt(1 - 1/A) if one class has them
  all. Images in which nothing was found (`mask` False, or a probability that is not finite) are
  left out of the shares; a set of which less than `min_classified` was classified is NaN.
  Source: arXiv 2401.12244, section on fairness (A = 4 skin tones, G = 16).

  Args:
    probs: `[P, G, A]` class probabilities, or one-hot classes; ties go to the lower class.
    mask: `[P, G]` bool, whether the image has something to classify. Default: all have.
    min_classified: share of the G images in [0, 1].

  Returns:
    `[P]` float32 in [0, sqrt(1 - 1/A)], or NaN.
  """
  chex.assert_rank(probs, 3)
  num_images, num_classes = probs.shape[1:]
  classified = jnp.isfinite(probs).all(axis=-1)
  if mask is not None:
    chex.assert_shape(mask, probs.shape[:2])
    classified &= mask
  classes = jax.nn.one_hot(jnp.argmax(probs, axis=-1), num_classes, dtype=jnp.float32)
  counts = jnp.sum(classes * classified[..., None], axis=1)
  total = jnp.sum(classified, axis=1)
  shares = counts / jnp.maximum(total, 1)[:, None]
  distance = jnp.linalg.norm(shares - 1 / num_classes, axis=-1)
  enough = total >= max(min_classified * num_images, 1)
  return jnp.where(enough, distance, jnp.nan)


def parity_reward(
  classify: Callable[[Any, jax.Array], jax.Array],
  name: str,
  params: Any = None,
  *,
  credit: sets.Credit = "set",
  shares: Shares = "hard",
) -> JaxReward:
  """Minus the statistical parity of any classifier's classes, as a set reward.

  With credit='leave-one-out' an image of a rare class gets more than one of a common class, and an
  image in which there is nothing to classify gets NaN, which leaves it out of the update.

  Args:
    classify: `(params, images [B, H, W, 3] in [0, 1]) -> probs [B, A]`; a NaN row says that there
      is nothing to classify in that image.
    name: name of the reward.
    params: the classifier's weights.
    credit: one of `rlft.rewards.sets.CREDITS`.
    shares: 'soft' has a gradient, which 'hard', the paper's, has not. But it is content with images
      of which each might be of any class.
  """
  return sets.set_reward(name, classify, MEASURES[shares], params, credit=credit)


def evenness(probs: jax.Array, mask: jax.Array) -> jax.Array:
  """Minus the statistical parity of one set, as a measure of `sets.score_sets`.

  Args:
    probs: `[G, A]`, as for `statistical_parity`.
    mask: `[G]` bool, the images in the set.
  """
  # `score_sets` has seen to it that enough images could be classified.
  return -statistical_parity(probs[None], mask[None], min_classified=0)[0]


def soft_evenness(probs: jax.Array, mask: jax.Array) -> jax.Array:
  """Minus the distance of the mean probabilities from the uniform distribution; else as `evenness`.

  || (1/n) sum_g probs_g - 1/A ||_2. At an even set the gradient is 0.
  """
  count = jnp.maximum(mask.sum(), 1)
  shares = jnp.sum(probs, axis=0, where=mask[:, None]) / count
  square = jnp.sum((shares - 1 / probs.shape[1]) ** 2)
  # The root has no gradient at 0.
  distance = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
  return jnp.where(mask.any(), -distance, jnp.nan)


MEASURES: Mapping[Shares, sets.Measure] = {"hard": evenness, "soft": soft_evenness}
