"""Advantages: rewards relative to a baseline, with failed scores (NaN) left out.

The paper normalises over the whole batch of a task, on all devices: statistics for each prompt are
impossible when prompts never repeat. DDPO's running statistics for each prompt and group-relative
statistics are here for comparison. A NaN takes no part in any statistic; its advantage is 0, and
the caller masks it out of the loss by `isfinite`.
"""

from collections.abc import Sequence
import math

import chex
import jax
import jax.numpy as jnp

_EPSILON = 1e-6  # Equal rewards have no advantage; without it their rounding error would.


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
  return jnp.clip(centred / (std + _EPSILON), -clip, clip).reshape(-1)


class PromptHistory:
  """Running statistics for each prompt (DDPO, arXiv 2305.13301, section 4.2), kept on the host.

  Every process sees the same global rewards, so every process has the same history.
  """

  def __init__(self, *, length: int, minimum: int):
    """Args: length: newest rewards kept; minimum: rewards before a prompt's own are used."""
    self._length = length
    self._minimum = minimum
    self._rewards: dict[str, list[float]] = {}

  def advantages(
    self, prompts: Sequence[str], rewards: Sequence[float], *, clip: float
  ) -> list[float]:
    """Adds `[B]` rewards and returns `[B]` advantages; short histories use the batch instead."""
    for prompt, reward in zip(prompts, rewards, strict=True):
      if math.isfinite(reward):
        history = self._rewards.setdefault(prompt, [])
        history.append(float(reward))
        del history[: -self._length]
    batch = [r for r in rewards if math.isfinite(r)]
    statistics = {
      prompt: _mean_std(
        history if len(history := self._rewards.get(prompt, [])) >= self._minimum else batch
      )
      for prompt in set(prompts)
    }
    advantages = []
    for prompt, reward in zip(prompts, rewards, strict=True):
      mean, std = statistics[prompt]
      value = (reward - mean) / (std + _EPSILON) if math.isfinite(reward) else 0.0
      advantages.append(min(max(value, -clip), clip))
    return advantages

  def state(self) -> dict[str, list[float]]:
    """For a checkpoint; JSON keeps the numbers exactly."""
    return {prompt: list(rewards) for prompt, rewards in self._rewards.items()}

  def restore(self, state: dict[str, list[float]]) -> None:
    """Goes on from `state()`."""
    self._rewards = {prompt: list(rewards) for prompt, rewards in state.items()}


def _mean_std(values: Sequence[float]) -> tuple[float, float]:
  if not values:
    return 0.0, 0.0
  mean = sum(values) / len(values)
  return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
