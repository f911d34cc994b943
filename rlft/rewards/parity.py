"""Statistical parity: a reward on a set of images, for evenly spread classes."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlft.types import Reward

# A set is scored if at least this share of its images could be classified: the share of a class
# among a few images says little, and a set of mostly unusable pictures should teach nothing.
MIN_CLASSIFIED = 0.5


def statistical_parity(
  probs: jax.Array, mask: jax.Array | None = None, *, min_classified: float = MIN_CLASSIFIED
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
  classify: Callable[[Any, jax.Array], jax.Array], name: str, params: Any = None
) -> Reward:
  """Minus the statistical parity of any classifier's classes, as a set reward.

  Args:
    classify: `(params, images [B, H, W, 3] in [0, 1]) -> probs [B, A]`; a NaN row says that there
      is nothing to classify in that image.
    name: name of the reward.
    params: the classifier's weights.
  """

  def score(params, images, features):
    del features
    num_prompts, num_images = images.shape[:2]
    probs = classify(params, images.reshape(-1, *images.shape[2:]))
    return -statistical_parity(probs.reshape(num_prompts, num_images, -1))

  return Reward(name=name, kind="jax", score=score, is_set=True, params=params)
