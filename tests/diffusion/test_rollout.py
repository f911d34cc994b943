"""Sampling: the policy's invariants; whole runs are in models/test_end_to_end.py."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import models_cases
import numpy as np

from rlft.diffusion import ddim, rollout, sampler
from rlft.diffusion.policy import Policy
from rlft.models import layers, lora
from rlft.types import Conditioning, Guidance


class Linear(nn.Module):
  """A network that is easy to reason about: depends on the latent, the time and the text."""

  @nn.compact
  def __call__(self, x, timesteps, text):
    maps = 0.1 * x + 1e-4 * timesteps[:, None, None, None]
    return layers.add(maps, text.text.mean(axis=(1, 2))[:, None, None, None])


PROCESS = ddim.make(models_cases.SCHEDULER, 6, eta=1.0)
POLICY = Policy(Linear(), PROCESS, guidance_scale=3.0)
WEIGHTS = lora.Weights({})
TEXT = Guidance(
  prompt=Conditioning(jnp.arange(24.0).reshape(4, 3, 2) / 24),
  empty=Conditioning(jnp.zeros((4, 3, 2))),
)
KEYS = sampler.image_keys(jax.random.key(3), 0, 4)
NOISE = rollout.normal(KEYS, 6, (2, 2, 1))


def sample(keys=KEYS, noise=NOISE, text=TEXT):
  return rollout.sample(POLICY, WEIGHTS, noise, text, keys)


@jax.jit
def log_prob_and_mean(index, before, after):
  """Compiled, as sampling is: operation by operation XLA fuses nothing, and rounds otherwise."""
  return POLICY.log_prob(WEIGHTS, index, before, after, TEXT)


def test_log_probs_are_those_of_the_steps_taken():
  path = sample()
  assert path.latents.shape == (7, 4, 2, 2, 1) and path.log_probs.shape == (6, 4)
  for index in range(6):
    log_prob, mean = log_prob_and_mean(index, path.latents[index], path.latents[index + 1])
    np.testing.assert_allclose(jnp.exp(log_prob - path.log_probs[index]), 1.0, atol=1e-5)
    # The step is its mean plus std times standard normal noise: log p is known from the noise.
    noise = (path.latents[index + 1] - mean) / PROCESS.std[index]
    expected = -0.5 * (noise**2).mean((1, 2, 3)) - np.log(PROCESS.std[index]) - 0.9189385
    np.testing.assert_allclose(log_prob, expected, rtol=1e-4, atol=1e-5)


def test_steps_of_images_may_differ():
  path, index = sample(), jnp.array([4, 0, 2, 4])
  rows = jnp.arange(4)
  found, _ = log_prob_and_mean(index, path.latents[index, rows], path.latents[index + 1, rows])
  np.testing.assert_allclose(found, path.log_probs[index, rows], atol=1e-5)


def test_an_image_depends_on_its_own_key_only():
  alone = sample(KEYS[2:3], NOISE[2:3], jax.tree.map(lambda x: x[2:3], TEXT))
  np.testing.assert_allclose(alone.latents[:, 0], sample().latents[:, 2], rtol=1e-6, atol=1e-6)
