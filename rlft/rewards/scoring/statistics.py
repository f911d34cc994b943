"""Statistics of scores; those that could not be made (NaN) are left out.

All but `constant_share` have finite gradients everywhere: what is masked is replaced before it is
used, and not only after.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

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
  centred, _, std = _centred(groups)
  return jnp.clip(centred / (std + EPSILON), -clip, clip).reshape(-1)


def mean_std(rewards: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean and standard deviation of `[B]` rewards, of which NaN is left out; 0 if all are."""
  chex.assert_rank(rewards, 1)
  _, mean, std = _centred(rewards[None])
  return mean[0, 0], std[0, 0]


def _centred(groups: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """r - mean `[N, G]` (0 for NaN), mean `[N, 1]` and deviation `[N, 1]` of `[N, G]` rewards."""
  valid = jnp.isfinite(groups)
  count = jnp.maximum(valid.sum(axis=1, keepdims=True), 1)
  known = jnp.where(valid, groups, 0.0)
  mean = known.sum(axis=1, keepdims=True) / count
  # A rounded mean of equal scores is not exactly theirs, and all would be as far from it as their
  # deviation.
  lowest = jnp.min(groups, axis=1, keepdims=True, where=valid, initial=jnp.inf)
  highest = jnp.max(groups, axis=1, keepdims=True, where=valid, initial=-jnp.inf)
  centred = jnp.where(valid & (lowest < highest), known - mean, 0.0)
  variance = (centred**2).sum(axis=1, keepdims=True) / count
  # The root has no gradient at 0.
  std = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)
  return centred, mean, std


def constant_share(rewards: np.ndarray, group_size: int | None = None) -> float:
  """The share of the groups of `[B]` rewards, or of the batch, from which nothing can be learned.

  In them all rewards that are not NaN are the same.

  Args:
    rewards: `[B]`, the global batch.
    group_size: G; None takes all of B for one group.

  Returns:
    A share in [0, 1].
  """
  groups = rewards.astype(np.float64).reshape(-1, group_size or len(rewards))
  spreads = [np.std(group[np.isfinite(group)]) for group in groups if np.isfinite(group).any()]
  return 1.0 - sum(spread > EPSILON for spread in spreads) / len(groups)
