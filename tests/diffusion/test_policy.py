"""The policy: guidance, and its log-probability on literals."""

import jax.numpy as jnp
import numpy as np

from rlft.diffusion.policy import conditioned, guided_output, log_prob
from rlft.models import layers
from rlft.types import Conditioning, Guidance

TEXT = Guidance(
  prompt=Conditioning(jnp.arange(24.0).reshape(4, 3, 2) / 24),
  empty=Conditioning(jnp.zeros((4, 3, 2))),
)


def network(x, timesteps, text):
  """Depends on the latent, the time and the text."""
  maps = 0.1 * x + 1e-4 * timesteps[:, None, None, None]
  return layers.add(maps, text.text.mean(axis=(1, 2))[:, None, None, None])


def test_guidance_mixes_both_outputs():
  x, time = jnp.linspace(-1, 1, 16).reshape(4, 2, 2, 1), jnp.int32(500)
  uncond = network(x, jnp.full((4,), 500), TEXT.empty)
  cond = network(x, jnp.full((4,), 500), TEXT.prompt)
  for scale in (1.0, 7.0):
    text = conditioned(TEXT, scale, lambda x: x)
    guided = guided_output(network, x, time, text, guidance_scale=scale)
    np.testing.assert_allclose(guided, uncond + scale * (cond - uncond), rtol=1e-5, atol=1e-6)


def test_log_prob_is_a_mean_over_dimensions():
  value = jnp.array([[[[0.0, 2.0]]], [[[1.0, 1.0]]]])
  # Standard normal: -x^2 / 2 - 0.9189385; means of (0, 2) and (1, 1) are 1 and 0.5.
  expected = [-1.9189385, -1.4189385]
  np.testing.assert_allclose(log_prob(value, jnp.zeros_like(value), 1.0), expected, rtol=1e-6)
