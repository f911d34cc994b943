"""DDIM as a Gaussian policy: noise schedule, one reverse step, its log-probability (float32 only).

Song et al., "Denoising Diffusion Implicit Models" (arXiv 2010.02502), equations 12 and 16. With
eta = 1 each reverse step is a Gaussian N(mean, std^2 I): the policy that reinforcement learning
improves. Latents and log-probabilities are never rounded below float32: a bfloat16 copy of the last
step's latent shifts its log-probability by dozens of clip ranges.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rlft.types import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
  """Constants of T reverse steps, in the order in which they are taken; all `[T]`.

  Attributes:
    timesteps: int32, the network's time input.
    alpha: cumulative product alpha_bar at `timesteps`, the signal's share of the variance.
    alpha_prev: the same one step later, in (0, 1].
    std: standard deviation of the step; 0 where it is deterministic (never train on those).
    prediction_type: 'epsilon' or 'v_prediction': what the network predicts.
  """

  timesteps: jax.Array
  alpha: jax.Array
  alpha_prev: jax.Array
  std: jax.Array
  prediction_type: str = dataclasses.field(metadata={"static": True})

  @property
  def trainable(self) -> np.ndarray:
    """`[n]` int: the steps with a log-probability, those with std > 0."""
    return np.flatnonzero(np.asarray(self.std) > 0)


def alphas_cumprod(config: Mapping[str, Any]) -> np.ndarray:
  """`[num_train_timesteps]` float64 alpha_bar of a diffusers `scheduler_config.json`."""
  count = config.get("num_train_timesteps", 1000)
  start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
  kind = config.get("beta_schedule", "linear")
  if kind == "linear":
    betas = np.linspace(start, end, count)
  elif kind == "scaled_linear":
    betas = np.linspace(start**0.5, end**0.5, count) ** 2
  else:
    raise UserError(
      f"scheduler_config.json: beta_schedule {kind!r} is not supported; use 'linear' or"
      " 'scaled_linear'"
    )
  if config.get("rescale_betas_zero_snr", False):
    raise UserError(
      "scheduler_config.json: rescale_betas_zero_snr is not supported: its first step has no"
      " signal, so no finite epsilon; set it to false"
    )
  return np.cumprod(1.0 - betas)


def make_schedule(config: Mapping[str, Any], steps: int, *, eta: float = 1.0) -> Schedule:
  """The reverse steps of a diffusers scheduler configuration, 'leading' or 'trailing' spacing.

  Args:
    config: `scheduler_config.json`.
    steps: T, from 1 to `num_train_timesteps`.
    eta: share of the stochastic noise; 1 is ancestral sampling, 0 deterministic DDIM.

  Raises:
    UserError: the configuration asks for something that changes the maths and is not supported.
  """
  alpha_bar = alphas_cumprod(config)
  count = len(alpha_bar)
  if not 1 <= steps <= count:
    raise UserError(f"sampling_steps={steps}: choose from 1 to {count}")
  spacing = config.get("timestep_spacing", "leading")
  if spacing == "leading":
    timesteps = np.arange(steps)[::-1] * (count // steps) + config.get("steps_offset", 0)
  elif spacing == "trailing":
    timesteps = np.round(np.arange(count, 0, -count / steps)).astype(np.int64)[:steps] - 1
  else:
    raise UserError(
      f"scheduler_config.json: timestep_spacing {spacing!r} is not supported; use 'leading' or"
      " 'trailing'"
    )
  if timesteps.max() >= count:
    raise UserError(f"scheduler_config.json: steps_offset leads past {count} timesteps; lower it")
  if config.get("clip_sample", False) or config.get("thresholding", False):
    raise UserError(
      "scheduler_config.json: clip_sample and thresholding are for pixel-space models; set both"
      " to false"
    )
  prediction_type = config.get("prediction_type", "epsilon")
  if prediction_type not in ("epsilon", "v_prediction"):
    raise UserError(
      f"scheduler_config.json: prediction_type {prediction_type!r} is not supported; use"
      " 'epsilon' or 'v_prediction'"
    )
  final = 1.0 if config.get("set_alpha_to_one", True) else alpha_bar[0]
  previous = timesteps - count // steps
  alpha = alpha_bar[timesteps]
  alpha_prev = np.where(previous >= 0, alpha_bar[np.maximum(previous, 0)], final)
  variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)

  def f32(x):
    return np.asarray(x, np.float32)

  return Schedule(
    timesteps=np.asarray(timesteps, np.int32),
    alpha=f32(alpha),
    alpha_prev=f32(alpha_prev),
    std=f32(eta * np.sqrt(np.maximum(variance, 0.0))),
    prediction_type=prediction_type,
  )


def at_step(constants: jax.Array, index: jax.Array) -> jax.Array:
  """What `[T]` constants are at `index`: a scalar, or `[B, 1, 1, 1]` at `[B]` indices."""
  values = jnp.asarray(constants)[index]
  return values[:, None, None, None] if values.ndim else values


def step_mean(schedule: Schedule, index: jax.Array, sample: jax.Array, output: jax.Array):
  """Mean of p(x_{t-1} | x_t): DDIM's equation 12 without its noise term.

  Args:
    schedule: T steps.
    index: scalar or `[B]` int, position of the step in the schedule (not the timestep).
    sample: `[B, H, W, C]` float32, x_t.
    output: `[B, H, W, C]` float32, the guided network output.
  """
  chex.assert_type([sample, output], jnp.float32)
  chex.assert_equal_shape([sample, output])
  alpha, alpha_prev, std = (
    at_step(x, index) for x in (schedule.alpha, schedule.alpha_prev, schedule.std)
  )
  signal, noise = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
  if schedule.prediction_type == "epsilon":
    epsilon = output
    clean = (sample - noise * epsilon) / signal
  else:
    clean = signal * sample - noise * output
    epsilon = signal * output + noise * sample
  # alpha_prev + std^2 <= 1; the maximum removes the rounding error of the last step.
  direction = jnp.sqrt(jnp.maximum(1 - alpha_prev - std**2, 0.0))
  return jnp.sqrt(alpha_prev) * clean + direction * epsilon


def log_prob(value: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
  """`[B]` log N(value; mean, std^2), *averaged* over the latent dimensions H, W, C.

  `std` is a scalar or `[B, 1, 1, 1]`.

  The mean (not the sum) is what makes a clip range of 1e-4 meaningful (the paper, section 3).
  """
  chex.assert_equal_shape([value, mean])
  z = (value - mean) / std
  elementwise = -0.5 * z**2 - jnp.log(std) - 0.5 * np.log(2 * np.pi)
  return elementwise.mean(axis=tuple(range(1, value.ndim)))


def add_noise(alpha_bar: jax.Array, clean: jax.Array, noise: jax.Array) -> jax.Array:
  """x_t of the forward process; `alpha_bar` is `[B]`, the others `[B, H, W, C]`."""
  alpha_bar = alpha_bar[:, None, None, None]
  return jnp.sqrt(alpha_bar) * clean + jnp.sqrt(1 - alpha_bar) * noise


def denoising_target(
  prediction_type: str, alpha_bar: jax.Array, clean: jax.Array, noise: jax.Array
) -> jax.Array:
  """What the network should predict at x_t: the noise, or v (Salimans & Ho, 2202.00512)."""
  if prediction_type == "epsilon":
    return noise
  alpha_bar = alpha_bar[:, None, None, None]
  return jnp.sqrt(alpha_bar) * noise - jnp.sqrt(1 - alpha_bar) * clean
