"""Losses of each image: clipped policy gradient, KL divergence to the base model, denoising.

What is minimised is their `weighted_sum` over the batch of all devices; every part of a batch can
then be computed by itself.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlft.types import Conditioning, Denoiser, Process


def mean_weights(mask: jax.Array) -> jax.Array:
  """`[B]` float32 weights of a mean over the images where `[B]` mask is True, 0 elsewhere."""
  return mask / jnp.maximum(mask.sum(), 1)


def weighted_sum(values: jax.Array, weights: jax.Array) -> jax.Array:
  """Sum of `[B]` values times `[B]` weights; values of weight 0 may be NaN."""
  chex.assert_rank([values, weights], 1)
  chex.assert_equal_shape([values, weights])
  return jnp.sum(jnp.where(weights > 0, values, 0.0) * weights)


def zero_where_not(mask: jax.Array, rows: Any) -> Any:
  """A tree of `[K, B, ...]` with zeros for the images where `[B]` mask is False.

  A loss that gives an image no weight still multiplies by 0 what its gradient is made of.
  """

  def keep(x):
    return jnp.where(mask.reshape(1, -1, *(1,) * (x.ndim - 2)), x, 0)

  return jax.tree.map(keep, rows)


def clipped_surrogate(
  log_ratio: jax.Array, advantages: jax.Array, *, clip_range: float
) -> jax.Array:
  """Negated PPO objective: `[B]` -min(w A, clip(w, 1 - e, 1 + e) A), w = exp(log_ratio).

  Schulman et al., arXiv 1707.06347, equation 7; the paper's J.

  Args:
    log_ratio: `[B]` log p - log p_old of a step, under current and sampling parameters.
    advantages: `[B]`.
    clip_range: e.
  """
  chex.assert_rank([log_ratio, advantages], 1)
  chex.assert_equal_shape([log_ratio, advantages])
  ratio = jnp.exp(log_ratio)
  clipped = jnp.clip(ratio, 1.0 - clip_range, 1.0 + clip_range)
  return -jnp.minimum(ratio * advantages, clipped * advantages)


def ratio_metrics(
  log_ratio: jax.Array, advantages: jax.Array, weights: jax.Array, *, clip_range: float
) -> dict[str, jax.Array]:
  """What became of the ratio w = exp(log_ratio).

  Args:
    log_ratio: `[B]`.
    advantages: `[B]`.
    weights: `[B]`, see `mean_weights`; images of weight 0 are left out.
    clip_range: e.

  Returns:
    The ratio's largest deviation from 1, the share of images that the clipping leaves without a
    gradient (w > 1 + e with A > 0, or w < 1 - e with A < 0), and the mean of w - 1 - log w, which
    of likelihoods would estimate KL(old || new). Of w, the likelihoods' ratio to the power of one
    over the number of latent dimensions, it is half the mean square of log w: less than that KL
    divergence per dimension, and of use to see how far ratios have moved.
  """
  ratio = jnp.exp(log_ratio)
  clipped = jnp.where(advantages > 0, ratio > 1.0 + clip_range, ratio < 1.0 - clip_range)
  clipped &= advantages != 0
  return {
    "ratio/max_abs_deviation": jnp.where(weights > 0, jnp.abs(ratio - 1.0), 0.0).max(),
    "clip_fraction": weighted_sum(clipped.astype(jnp.float32), weights),
    # expm1 keeps the digits that ratio - 1 - log_ratio would cancel.
    "approx_kl": weighted_sum(jnp.expm1(log_ratio) - log_ratio, weights),
  }


def gaussian_kl(mean: jax.Array, base_mean: jax.Array, std: jax.Array) -> jax.Array:
  """`[B]` KL divergence of N(mean, std^2) from N(base_mean, std^2), averaged over dimensions.

  `std` is a scalar or `[B]`.
  """
  chex.assert_equal_shape([mean, base_mean])
  return jnp.mean((mean - base_mean) ** 2, axis=tuple(range(1, mean.ndim))) / (2 * std**2)


def denoising_noise(
  key: jax.Array, shape: tuple[int, ...], steps: int
) -> tuple[jax.Array, jax.Array]:
  """What `denoising_error` adds: `[B]` int32 timesteps in [0, steps), standard normal noise.

  Args:
    key: consumed.
    shape: `[B, H, W, C]` of the latents.
    steps: timesteps that the network was trained on.
  """
  time_key, noise_key = jax.random.split(key)
  timesteps = jax.random.randint(time_key, shape[:1], 0, steps)
  return timesteps, jax.random.normal(noise_key, shape)


def denoising_error(
  denoise: Denoiser,
  process: Process,
  latents: jax.Array,
  text: Conditioning,
  timesteps: jax.Array,
  noise: jax.Array,
) -> jax.Array:
  """The ordinary pretraining loss: `[B]` mean squared errors of the prediction.

  Args:
    denoise: the network with its weights bound.
    process: says what x_t is, and what should be predicted.
    latents: `[B, H, W, C]` float32, scaled.
    text: of the captions.
    timesteps, noise: see `denoising_noise`.
  """
  output = denoise(process.corrupt(latents, noise, timesteps), timesteps, text)
  target = process.target(latents, noise, timesteps)
  return jnp.square(output - target).mean((1, 2, 3))
