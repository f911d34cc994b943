"""Losses on literals, with the arithmetic shown."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.algorithms import losses
from rlft.diffusion import ddim

# Ratios 1.2, 0.9, 1.05, 0.5 with advantages 1, -2, 3, 1 and a clip range of 0.1:
#   min(1.2 * 1, 1.1 * 1)       =  1.1    clipped: no gradient
#   min(0.9 * -2, 0.9 * -2)     = -1.8    on the edge of the range
#   min(1.05 * 3, 1.05 * 3)     =  3.15
#   min(0.5 * 1, 0.9 * 1)       =  0.5    outside of the range, but on the side that is not clipped
LOG_RATIOS = np.log([1.2, 0.9, 1.05, 0.5]).astype(np.float32)
OLD = np.array([-1.0, 0.5, 2.0, 0.0], np.float32)
ADVANTAGES = np.array([1.0, -2.0, 3.0, 1.0], np.float32)
ALL = np.ones(4, bool)


def surrogate(log_probs, mask=ALL, clip_range=0.1):
  """The loss of the batch, and its metrics."""
  log_ratio, weights = log_probs - OLD, losses.mean_weights(jnp.asarray(mask))
  values = losses.clipped_surrogate(log_ratio, jnp.asarray(ADVANTAGES), clip_range=clip_range)
  metrics = losses.ratio_metrics(log_ratio, jnp.asarray(ADVANTAGES), weights, clip_range=clip_range)
  return losses.weighted_sum(values, weights), metrics


def test_clipped_loss():
  loss, metrics = surrogate(jnp.asarray(OLD + LOG_RATIOS), clip_range=0.1001)
  np.testing.assert_allclose(loss, -(1.1001 - 1.8 + 3.15 + 0.5) / 4, rtol=1e-5)
  np.testing.assert_allclose(metrics["ratio/max_abs_deviation"], 0.5, rtol=1e-5)
  assert metrics["clip_fraction"] == 0.25  # 1.2; 0.5 is outside, but not clipped
  # w - 1 - ln w: 0.0176784, 0.0053605, 0.0012098, 0.1931472; their mean is 0.0543490.
  np.testing.assert_allclose(metrics["approx_kl"], 0.0543490, rtol=1e-4)


def test_gradient_of_clipped_loss():
  gradient = jax.grad(lambda x: surrogate(x, clip_range=0.1001)[0])(jnp.asarray(OLD + LOG_RATIOS))
  # d/d log p of -w A / 4 where it is not clipped: 0, 0.9 * 2 / 4, -1.05 * 3 / 4, -0.5 / 4
  np.testing.assert_allclose(gradient, [0.0, 0.45, -0.7875, -0.125], rtol=1e-5)


def test_mask_leaves_images_out_even_if_nan():
  mask = np.array([True, True, False, True])
  log_probs = (OLD + LOG_RATIOS).astype(np.float32)
  log_probs[2] = np.nan
  loss, metrics = surrogate(jnp.asarray(log_probs), mask, clip_range=0.1001)
  np.testing.assert_allclose(loss, -(1.1001 - 1.8 + 0.5) / 3, rtol=1e-5)
  assert all(np.isfinite(value) for value in metrics.values())


def test_ratio_is_one_before_an_update():
  loss, metrics = surrogate(jnp.asarray(OLD))
  np.testing.assert_allclose(loss, -ADVANTAGES.mean())
  assert metrics["ratio/max_abs_deviation"] == metrics["clip_fraction"] == metrics["approx_kl"] == 0


def test_nothing_to_average_is_zero():
  loss, _ = surrogate(jnp.asarray(OLD), np.zeros(4, bool))
  assert loss == 0


def test_gaussian_kl():
  # (mean difference)^2 / (2 std^2) per dimension: differences 1 and 3, std 2: (1/8 + 9/8) / 2
  mean = jnp.array([[[[1.0, 3.0]]]])
  np.testing.assert_allclose(losses.gaussian_kl(mean, jnp.zeros_like(mean), 2.0), [0.625])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_denoising_loss_of_a_perfect_network_is_zero(prediction_type):
  clean = 0.7
  alphas = jnp.linspace(0.9, 0.1, 10)
  steps = np.zeros(1, np.float32)
  process = ddim.DDIM(steps, steps, steps, steps, alphas, prediction_type)

  def perfect(x, timesteps, text):
    alpha = alphas[timesteps][:, None, None, None]
    noise = (x - jnp.sqrt(alpha) * clean) / jnp.sqrt(1 - alpha)
    if prediction_type == "epsilon":
      return noise
    return jnp.sqrt(alpha) * noise - jnp.sqrt(1 - alpha) * clean

  latents = jnp.full((8, 2, 2, 1), clean)
  timesteps, noise = losses.denoising_noise(jax.random.key(0), latents.shape, 10)
  args = (process, latents, jnp.zeros((8, 1, 1)), timesteps, noise)
  assert losses.denoising_error(perfect, *args).max() < 1e-10
  # A network that always says 0 misses by the target's mean square, which is of order one.
  assert losses.denoising_error(lambda x, *_: jnp.zeros_like(x), *args).mean() > 0.1


def test_noise_of_the_pretraining_loss_covers_all_timesteps():
  timesteps, noise = losses.denoising_noise(jax.random.key(1), (400, 2, 2, 1), 10)
  assert set(timesteps.tolist()) == set(range(10))
  np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.1)
