"""Diversity of the images of a prompt: set rewards on embeddings.

    clip-diversity?weights=...   mean pairwise distance of CLIP embeddings, in [0, 2]
    clip-vendi?weights=...       Vendi score of CLIP embeddings, in [1, G]

The measures take any embedding; with `rlft.rewards.sets.set_reward` a user's own becomes a reward.
"""

from collections.abc import Callable
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from rlft.rewards import sets
from rlft.types import JaxReward

_TINY = 1e-6  # shares of eigenvalues below this are rounding errors of 0


def pairwise_distance(features: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean of 1 - cosine over all pairs of a set.

      2 / (n (n - 1)) sum_{i < j} (1 - <f_i, f_j> / (|f_i| |f_j|))

  Args:
    features: `[G, F]`, of any length.
    mask: `[G]` bool, the n images in the set.

  Returns:
    A float32 scalar: 0 if all point the same way, 1 if they are orthogonal, at most n / (n - 1); 0
    for a single image and NaN for none.
  """
  kernel = _cosines(features, mask)
  count = mask.sum()
  pairs = mask[:, None] & mask & ~jnp.eye(len(mask), dtype=bool)
  total = jnp.sum(1 - kernel, where=pairs)
  mean = total / jnp.maximum(count * (count - 1), 1)
  return jnp.where(count > 0, mean, jnp.nan)


def vendi(features: jax.Array, mask: jax.Array) -> jax.Array:
  """Vendi score with the cosine kernel: how many different images there are in effect.

      exp(-sum_k l_k log l_k),   l the eigenvalues of K / n,   K_ij = <f_i, f_j> / (|f_i| |f_j|)

  Source: arXiv 2210.02410, definition 3.1. An eigenvalue of 0 adds nothing. The gradient is that of
  the eigenvalues above 1e-6; where images are equal, the true one is infinite.

  Args:
    features: `[G, F]`, of any length.
    mask: `[G]` bool, the n images in the set.

  Returns:
    A float32 scalar in [1, n]: 1 if all are equal, n if they are orthogonal; NaN for no image.
  """
  count = mask.sum()
  # An image that is left out has a row and a column of 0, and so one more eigenvalue of 0.
  values = jnp.linalg.eigvalsh(_cosines(features, mask) / jnp.maximum(count, 1))
  positive = values > _TINY
  safe = jnp.where(positive, values, 1.0)
  entropy = -jnp.sum(safe * jnp.log(safe))
  return jnp.where(count > 0, jnp.exp(entropy), jnp.nan)


def clip_diversity(
  weights: str, dtype: Literal["float32", "bfloat16"] = "float32", credit: sets.Credit = "set"
) -> JaxReward:
  """'clip-diversity': mean pairwise 1 - cosine of CLIP's image embeddings.

  Args:
    weights: a CLIP model; see `rlft.models.files.clip_weights.load`.
    dtype: of the network's products.
    credit: one of `rlft.rewards.sets.CREDITS`.
  """
  return _on_clip("clip-diversity", pairwise_distance, weights, dtype, credit)


def clip_vendi(
  weights: str, dtype: Literal["float32", "bfloat16"] = "float32", credit: sets.Credit = "set"
) -> JaxReward:
  """'clip-vendi': the Vendi score of CLIP's image embeddings.

  Args:
    weights: a CLIP model; see `rlft.models.files.clip_weights.load`.
    dtype: of the network's products.
    credit: one of `rlft.rewards.sets.CREDITS`.
  """
  return _on_clip("clip-vendi", vendi, weights, dtype, credit)


def _on_clip(
  name: str,
  measure: Callable[[jax.Array, jax.Array], jax.Array],
  weights: str,
  dtype: str,
  credit: sets.Credit,
) -> JaxReward:
  from rlft.rewards import clip

  embed, params = clip.image_embedder(weights, dtype)
  return sets.set_reward(name, embed, measure, params, credit=credit)


def _cosines(features: jax.Array, mask: jax.Array) -> jax.Array:
  """`[G, G]` float32; 0 in the rows and columns of what is not in the set."""
  chex.assert_rank([features, mask], [2, 1])
  features = jnp.where(mask[:, None], features, 0).astype(jnp.float32)
  # The root of 0 has no gradient.
  square = jnp.sum(features**2, axis=1, keepdims=True)
  unit = features * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0))
  return jnp.matmul(unit, unit.T, precision=jax.lax.Precision.HIGHEST)
