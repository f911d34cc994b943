"""Sampling with trajectories and log-probabilities: one `lax.scan` over the reverse steps."""

import chex
import jax
import jax.numpy as jnp

from rlft.diffusion import ddim
from rlft.types import Conditioning, Denoiser, Guidance, Prepare, Trajectory


def unprepared(conditioning: Conditioning) -> Conditioning:
  """Of a denoiser that takes the conditioning as it is."""
  return conditioning


def conditioned(text: Guidance, guidance_scale: float, prepare: Prepare) -> Conditioning:
  """What the network is given at once: `[2 B, ...]`, first without the prompts, then with them.

  `[B, ...]`, only the prompts, if a guidance scale of 1 leaves the unconditional half out. All
  images have the same empty prompt, which is prepared once.
  """
  prompt = prepare(text.prompt)
  if guidance_scale == 1.0:
    return prompt
  empty = prepare(jax.tree.map(lambda x: x[:1], text.empty))
  return jax.tree.map(
    lambda one, all_: jnp.concatenate([jnp.broadcast_to(one, all_.shape), all_]), empty, prompt
  )


def guided_output(
  denoise: Denoiser,
  sample: jax.Array,
  timestep: jax.Array,
  conditioning: Conditioning,
  *,
  guidance_scale: float,
) -> jax.Array:
  """Classifier-free guidance (Ho & Salimans, 2207.12598): uncond + scale * (cond - uncond).

  The same function serves sampling and training, with the same batch shape: only then is the
  importance ratio exactly 1 before the first update.

  Args:
    denoise: the network with its parameters bound.
    sample: `[B, H, W, C]` float32, x_t.
    timestep: scalar or `[B]` int32.
    conditioning: see `conditioned`.
    guidance_scale: 1 leaves the unconditional half out.

  Returns:
    `[B, H, W, C]` float32.
  """
  chex.assert_rank(sample, 4)
  output = denoise(sample, jnp.broadcast_to(timestep, sample.shape[:1]), conditioning)
  if guidance_scale == 1.0:
    return output
  uncond, cond = jnp.split(output, 2)
  return uncond + guidance_scale * (cond - uncond)


def policy_log_prob(
  denoise: Denoiser,
  schedule: ddim.Schedule,
  index: jax.Array,
  sample: jax.Array,
  next_sample: jax.Array,
  text: Guidance,
  *,
  guidance_scale: float,
  prepare: Prepare = unprepared,
) -> tuple[jax.Array, jax.Array]:
  """Log-probability of steps that were taken, under the given parameters.

  Args:
    denoise: the network with its parameters bound.
    schedule: T steps.
    index: scalar or `[B]` int, which step of the schedule it was.
    sample, next_sample: `[B, H, W, C]` float32, before and after it.
    text: `[B, ...]`.
    guidance_scale, prepare: as in `sample`.

  Returns:
    (`[B]` mean log-probability of `next_sample`, `[B, H, W, C]` mean of the step), float32.
  """
  output = guided_output(
    denoise,
    sample,
    jnp.asarray(schedule.timesteps)[index],
    conditioned(text, guidance_scale, prepare),
    guidance_scale=guidance_scale,
  )
  mean = ddim.step_mean(schedule, index, sample, output)
  return ddim.log_prob(next_sample, mean, ddim.at_step(schedule.std, index)), mean


def normal(keys: jax.Array, index: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
  """`[B, *shape]` standard normal noise number `index` of each image's key `[B]`."""
  return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(keys)


def sample(
  denoise: Denoiser,
  schedule: ddim.Schedule,
  noise: jax.Array,
  text: Guidance,
  keys: jax.Array,
  *,
  guidance_scale: float,
  prepare: Prepare = unprepared,
) -> Trajectory:
  """Samples B trajectories of T steps.

  Args:
    denoise: the network with its parameters bound.
    schedule: T steps.
    noise: `[B, H, W, C]` float32 standard normal, x_T.
    text: of the empty prompt and of the prompts, `[B, ...]`.
    keys: `[B]`, consumed: step i of an image uses `fold_in(its key, i)`, so that an image depends
      on its own key only, not on the batch around it.
    guidance_scale: see `guided_output`.
    prepare: makes of the conditioning what `denoise` takes; called once, before the steps.

  Returns:
    Latents `[T+1, B, H, W, C]` and log-probabilities `[T, B]` (0 for deterministic steps).
  """
  chex.assert_type(noise, jnp.float32)
  conditioning = conditioned(text, guidance_scale, prepare)

  def step(latent, index):
    output = guided_output(
      denoise,
      latent,
      jnp.asarray(schedule.timesteps)[index],
      conditioning,
      guidance_scale=guidance_scale,
    )
    mean = ddim.step_mean(schedule, index, latent, output)
    std = jnp.asarray(schedule.std)[index]
    following = mean + std * normal(keys, index, latent.shape[1:])
    safe = jnp.where(std > 0, std, 1.0)
    log_prob = jnp.where(std > 0, ddim.log_prob(following, mean, safe), 0.0)
    return following, (following, log_prob)

  _, (latents, log_probs) = jax.lax.scan(step, noise, jnp.arange(len(schedule.timesteps)))
  return Trajectory(jnp.concatenate([noise[None], latents]), log_probs)
