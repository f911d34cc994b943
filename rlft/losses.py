"""Losses: the clipped policy gradient, the KL divergence to the base model, the denoising loss."""

import chex
import jax
import jax.numpy as jnp

from rlft import ddim
from rlft.rollout import Denoiser


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean of `[B]` values where `[B]` mask is True; 0 if it is nowhere."""
  return jnp.where(mask, values, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def clipped_surrogate(
  log_probs: jax.Array,
  old_log_probs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  clip_range: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Negated PPO objective: -mean min(w A, clip(w, 1 - e, 1 + e) A), w = exp(log p - log p_old).

  Schulman et al., arXiv 1707.06347, equation 7; the paper's J.

  Args:
    log_probs: `[B]` under the current parameters.
    old_log_probs: `[B]` under the parameters that sampled.
    advantages: `[B]`.
    mask: `[B]` bool; False leaves an image out.
    clip_range: e.

  Returns:
    The loss, and metrics: the ratio's largest deviation from 1, the share of images outside of the
    clip range, and an estimate of KL(old || new) per latent dimension (mean of w - 1 - log w).
  """
  chex.assert_rank([log_probs, old_log_probs, advantages, mask], 1)
  chex.assert_equal_shape([log_probs, old_log_probs, advantages, mask])
  log_ratio = log_probs - jax.lax.stop_gradient(old_log_probs)
  ratio = jnp.exp(log_ratio)
  clipped = jnp.clip(ratio, 1.0 - clip_range, 1.0 + clip_range)
  objective = jnp.minimum(ratio * advantages, clipped * advantages)
  deviation = jnp.abs(ratio - 1.0)
  metrics = {
    "ratio/max_abs_deviation": jnp.where(mask, deviation, 0.0).max(),
    "clip_fraction": masked_mean((deviation > clip_range).astype(jnp.float32), mask),
    # expm1 keeps the digits that ratio - 1 - log_ratio would cancel.
    "approx_kl": masked_mean(jnp.expm1(log_ratio) - log_ratio, mask),
  }
  return -masked_mean(objective, mask), jax.lax.stop_gradient(metrics)


def gaussian_kl(mean: jax.Array, base_mean: jax.Array, std: jax.Array) -> jax.Array:
  """`[B]` KL divergence of N(mean, std^2) from N(base_mean, std^2), averaged over dimensions."""
  chex.assert_equal_shape([mean, base_mean])
  return jnp.mean((mean - base_mean) ** 2, axis=tuple(range(1, mean.ndim))) / (2 * std**2)


def denoising_loss(
  denoise: Denoiser,
  alphas_cumprod: jax.Array,
  prediction_type: str,
  latents: jax.Array,
  text: jax.Array,
  key: jax.Array,
) -> jax.Array:
  """The ordinary pretraining loss: squared error of the prediction at uniform timesteps.

  Args:
    denoise: the network with its parameters bound.
    alphas_cumprod: `[num_train_timesteps]` float32.
    prediction_type: 'epsilon' or 'v_prediction'.
    latents: `[B, H, W, C]` float32, scaled.
    text: `[B, L, D]`.
    key: consumed.
  """
  time_key, noise_key = jax.random.split(key)
  timesteps = jax.random.randint(time_key, latents.shape[:1], 0, len(alphas_cumprod))
  noise = jax.random.normal(noise_key, latents.shape)
  alpha = alphas_cumprod[timesteps]
  output = denoise(ddim.add_noise(alpha, latents, noise), timesteps, text)
  return jnp.mean((output - ddim.denoising_target(prediction_type, alpha, latents, noise)) ** 2)
