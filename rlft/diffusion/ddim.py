"""DDIM: the noise schedule, and the reverse step as a Gaussian N(mean, std^2 I); float32 only.

Song et al., "Denoising Diffusion Implicit Models" (arXiv 2010.02502), equations 12 and 16. With
eta = 1 the steps are random: the policy that reinforcement learning improves.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rlft.models.scheduler_config import SchedulerConfig
from rlft.types import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DDIM:
  """T reverse steps, in the order in which they are taken; a `rlft.types.Process`.

  Attributes:
    timesteps: `[T]` int32, the network's time input.
    alpha: `[T]` cumulative product alpha_bar at `timesteps`, the signal's share of the variance.
    alpha_prev: `[T]` the same one step later, in (0, 1].
    std: `[T]` standard deviation of the step; 0 where it is deterministic (never train on those).
    alpha_bar: `[N]` alpha_bar at each of the N timesteps that the network was trained on.
    prediction_type: 'epsilon' or 'v_prediction': what the network predicts.
  """

  timesteps: jax.Array
  alpha: jax.Array
  alpha_prev: jax.Array
  std: jax.Array
  alpha_bar: jax.Array
  prediction_type: str = dataclasses.field(metadata={"static": True})

  @property
  def train_timesteps(self) -> int:
    """N, the timesteps that the network was trained on."""
    return len(self.alpha_bar)

  def mean(self, index: jax.Array, sample: jax.Array, output: jax.Array) -> jax.Array:
    """`[B, H, W, C]` mean of p(x_{t-1} | x_t): DDIM's equation 12 without its noise term.

    Args:
      index: scalar or `[B]` int, position of the step in `timesteps` (not the timestep).
      sample: `[B, H, W, C]` float32, x_t.
      output: `[B, H, W, C]` float32, the guided network output.
    """
    clean, epsilon = self._parts(index, sample, output)
    alpha_prev, std = at_step(self.alpha_prev, index), at_step(self.std, index)
    # alpha_prev + std^2 <= 1; the maximum removes the rounding error of the last step.
    direction = jnp.sqrt(jnp.maximum(1 - alpha_prev - std**2, 0.0))
    return jnp.sqrt(alpha_prev) * clean + direction * epsilon

  def clean(self, index: jax.Array, sample: jax.Array, output: jax.Array) -> jax.Array:
    """`[B, H, W, C]` prediction of the clean latent x_0; arguments as of `mean`."""
    return self._parts(index, sample, output)[0]

  def _parts(
    self, index: jax.Array, sample: jax.Array, output: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """What x_t is made of, as the network sees it: the clean latent and the noise."""
    chex.assert_type([sample, output], jnp.float32)
    chex.assert_equal_shape([sample, output])
    alpha = at_step(self.alpha, index)
    signal, noise = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
    if self.prediction_type == "epsilon":
      return (sample - noise * output) / signal, output
    return signal * sample - noise * output, signal * output + noise * sample

  def corrupt(self, clean: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
    """`[B, H, W, C]` x_t of the forward process from x_0, at `[B]` int timesteps in [0, N)."""
    alpha_bar = jnp.asarray(self.alpha_bar)[timesteps][:, None, None, None]
    return jnp.sqrt(alpha_bar) * clean + jnp.sqrt(1 - alpha_bar) * noise

  def target(self, clean: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
    """`[B, H, W, C]` right output at `corrupt`'s x_t: noise, or v (Salimans & Ho, 2202.00512)."""
    if self.prediction_type == "epsilon":
      return noise
    alpha_bar = jnp.asarray(self.alpha_bar)[timesteps][:, None, None, None]
    return jnp.sqrt(alpha_bar) * noise - jnp.sqrt(1 - alpha_bar) * clean


def alphas_cumprod(config: Mapping[str, Any]) -> np.ndarray:
  """`[num_train_timesteps]` float64 alpha_bar of a diffusers `scheduler_config.json`.

  Raises:
    UserError: see `SchedulerConfig.from_dict`.
  """
  return _alphas_cumprod(SchedulerConfig.from_dict(config))


def _alphas_cumprod(config: SchedulerConfig) -> np.ndarray:
  start, end, count = config.beta_start, config.beta_end, config.num_train_timesteps
  if config.trained_betas is not None:
    betas = np.array(config.trained_betas, np.float64)
  elif config.beta_schedule == "linear":
    betas = np.linspace(start, end, count)
  else:
    betas = np.linspace(start**0.5, end**0.5, count) ** 2
  alpha_bar = np.cumprod(1.0 - betas)
  if config.rescale_betas_zero_snr:
    # Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2305.08891),
    # algorithm 1: the first root of alpha_bar stays, the last becomes 0.
    root = np.sqrt(alpha_bar)
    alpha_bar = (root[0] * (root - root[-1]) / (root[0] - root[-1])) ** 2
  return alpha_bar


def make(config: Mapping[str, Any], steps: int, *, eta: float = 1.0) -> DDIM:
  """The reverse steps that diffusers' `DDIMScheduler` takes.

  A step leads `num_train_timesteps // steps` timesteps on, whatever the spacing; with 'linspace'
  that is not quite where the next one begins.

  Args:
    config: a parsed `scheduler_config.json`.
    steps: T, from 1 to `num_train_timesteps`.
    eta: share of the stochastic noise; 1 is ancestral sampling, 0 deterministic DDIM.

  Raises:
    UserError: the number of steps is impossible, or see `SchedulerConfig.from_dict`.
  """
  parsed = SchedulerConfig.from_dict(config)
  alpha_bar = _alphas_cumprod(parsed)
  count = len(alpha_bar)
  if not 1 <= steps <= count:
    raise UserError(f"sampling_steps={steps}: choose from 1 to {count}")
  timesteps = _timesteps(parsed, steps)
  if timesteps.max() >= count:
    raise UserError(
      f"scheduler_config.json: steps_offset={parsed.steps_offset} leads past {count} timesteps;"
      " lower it with --scheduler=steps_offset=0"
    )
  final = 1.0 if parsed.set_alpha_to_one else alpha_bar[0]
  previous = timesteps - count // steps
  alpha = alpha_bar[timesteps]
  alpha_prev = np.where(previous >= 0, alpha_bar[np.maximum(previous, 0)], final)
  variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)

  def f32(x):
    return np.asarray(x, np.float32)

  return DDIM(
    timesteps=np.asarray(timesteps, np.int32),
    alpha=f32(alpha),
    alpha_prev=f32(alpha_prev),
    std=f32(eta * np.sqrt(np.maximum(variance, 0.0))),
    alpha_bar=f32(alpha_bar),
    prediction_type=parsed.prediction_type,
  )


def _timesteps(config: SchedulerConfig, steps: int) -> np.ndarray:
  """`[steps]` int, falling."""
  count = config.num_train_timesteps
  if config.timestep_spacing == "leading":
    return np.arange(steps)[::-1] * (count // steps) + config.steps_offset
  if config.timestep_spacing == "trailing":
    return np.round(np.arange(count, 0, -count / steps)).astype(np.int64)[:steps] - 1
  return np.linspace(0, count - 1, steps).round()[::-1].astype(np.int64)


def at_step(constants: jax.Array, index: jax.Array) -> jax.Array:
  """What `[T]` constants are at `index`: a scalar, or `[B, 1, 1, 1]` at `[B]` indices."""
  values = jnp.asarray(constants)[index]
  return values[:, None, None, None] if values.ndim else values
