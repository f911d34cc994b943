"""Sampling with trajectories and log-probabilities: one `lax.scan` over the reverse steps."""

import chex
import jax
import jax.numpy as jnp

from rlft.diffusion.policy import Policy, log_prob
from rlft.models import lora
from rlft.types import Guidance, Trajectory


def normal(keys: jax.Array, index: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
  """`[B, *shape]` standard normal noise number `index` of each image's key `[B]`."""
  return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(keys)


def sample(
  policy: Policy, weights: lora.Weights, noise: jax.Array, text: Guidance, keys: jax.Array
) -> Trajectory:
  """Samples B trajectories of T steps.

  Args:
    policy: what draws.
    weights: its weights, whole.
    noise: `[B, H, W, C]` float32 standard normal, x_T.
    text: of the empty prompt and of the prompts, `[B, ...]`.
    keys: `[B]`, consumed: step i of an image uses `fold_in(its key, i)`, so that an image depends
      on its own key only, not on the batch around it.

  Returns:
    Latents `[T+1, B, H, W, C]` and log-probabilities `[T, B]` (0 for deterministic steps).
  """
  chex.assert_type(noise, jnp.float32)
  process = policy.process
  conditioning = policy.conditioned(weights, text)

  def step(latent, index):
    output = policy.output(weights, index, latent, conditioning)
    mean = process.mean(index, latent, output)
    std = jnp.asarray(process.std)[index]
    following = mean + std * normal(keys, index, latent.shape[1:])
    safe = jnp.where(std > 0, std, 1.0)
    found = jnp.where(std > 0, log_prob(following, mean, safe), 0.0)
    return following, (following, found)

  _, (latents, log_probs) = jax.lax.scan(step, noise, jnp.arange(len(process.timesteps)))
  return Trajectory(jnp.concatenate([noise[None], latents]), log_probs)
