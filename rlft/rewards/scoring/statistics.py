"""Statistics of scores, with those that could not be made (NaN) left out."""

import chex
import jax
import jax.numpy as jnp

# Scores that spread less count as equal: else rounding errors would be taken for differences.
EPSILON = 1e-6


def normalise(rewards: jax.Array, *, clip: float, group_size: int | None = None) -> jax.Array:
  """(r - mean) / (std + epsilon) over the batch, or over each group of consecutive images.

  Args:
    rewards: `[B]` float32, the global batch; NaN where an image could not be scored.
    clip: bound on the advantages' size (10 in the paper).
    group_size: G; None normalises over all of B.

  Returns:
    `[B]` float32; 0 where the reward is NaN.
  """
  chex.assert_rank(rewards, 1)
  groups = rewards.reshape(-1, group_size or len(rewards))
  valid = jnp.isfinite(groups)
  count = jnp.maximum(valid.sum(axis=1, keepdims=True), 1)
  mean = jnp.where(valid, groups, 0.0).sum(axis=1, keepdims=True) / count
  centred = jnp.where(valid, groups - mean, 0.0)
  std = jnp.sqrt((centred**2).sum(axis=1, keepdims=True) / count)
  return jnp.clip(centred / (std + EPSILON), -clip, clip).reshape(-1)
