"""Advantages: rewards relative to a baseline, with failed scores (NaN) left out.

The paper normalises over the whole batch of a task, on all devices: statistics for each prompt are
impossible when prompts never repeat. DDPO's running statistics for each prompt and group-relative
statistics are here for comparison. A NaN takes no part in any statistic; its advantage is 0, and
the caller masks it out of the loss by `isfinite`.
"""

from collections.abc import Sequence
import math

from rlft.rewards.scoring.statistics import EPSILON


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
      value = (reward - mean) / (std + EPSILON) if math.isfinite(reward) else 0.0
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
