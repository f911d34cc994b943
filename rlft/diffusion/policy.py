"""The policy: a network with its reverse process, guidance and adapter, bound once."""

from collections.abc import Callable
import dataclasses

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rlft.diffusion import ddim
from rlft.models import lora
from rlft.models.stable_diffusion import StableDiffusion
from rlft.types import Conditioning, Denoiser, Guidance, Process


@dataclasses.dataclass(frozen=True)
class Policy:
  """p(x_{t-1} | x_t, prompt): how images are drawn, in sampling and in training alike.

  Only its weights change: every method takes them first, whole (not in shards).

  Attributes:
    unet: the network.
    process: T reverse steps.
    guidance_scale: of classifier-free guidance; 1 is none.
    lora_scale: alpha / rank, where the weights have an adapter.
  """

  unet: nn.Module
  process: Process
  guidance_scale: float
  lora_scale: float = 0.0

  def denoiser(self, weights: lora.Weights) -> Denoiser:
    """The network with its weights bound, without guidance."""
    return lora.denoiser(self.unet, weights, self.lora_scale)

  def conditioned(self, weights: lora.Weights, text: Guidance) -> Conditioning:
    """What the network is given of the texts at every step, see `conditioned` below."""

    def prepare(conditioning):
      return lora.prepare(self.unet, weights, self.lora_scale, conditioning)

    return conditioned(text, self.guidance_scale, prepare)

  def output(
    self, weights: lora.Weights, index: jax.Array, sample: jax.Array, conditioning: Conditioning
  ) -> jax.Array:
    """`[B, H, W, C]` float32: the guided output at step `index` (scalar or `[B]`) from x_t."""
    return guided_output(
      self.denoiser(weights),
      sample,
      jnp.asarray(self.process.timesteps)[index],
      conditioning,
      guidance_scale=self.guidance_scale,
    )

  def log_prob(
    self,
    weights: lora.Weights,
    index: jax.Array,
    sample: jax.Array,
    next_sample: jax.Array,
    text: Guidance,
  ) -> tuple[jax.Array, jax.Array]:
    """Log-probability of steps that were taken, under the given weights.

    Args:
      weights: of the network.
      index: scalar or `[B]` int, which of the T steps it was.
      sample, next_sample: `[B, H, W, C]` float32, before and after it.
      text: `[B, ...]`.

    Returns:
      (`[B]` mean log-probability of `next_sample`, `[B, H, W, C]` mean of the step), float32.
    """
    output = self.output(weights, index, sample, self.conditioned(weights, text))
    mean = self.process.mean(index, sample, output)
    return log_prob(next_sample, mean, ddim.at_step(self.process.std, index)), mean


def make_policy(
  model: StableDiffusion,
  *,
  sampling_steps: int,
  guidance_scale: float,
  eta: float = 1.0,
  lora_scale: float = 0.0,
) -> Policy:
  """The policy of a model; the process is the one that its scheduler names.

  Args:
    model: the modules, and the scheduler's configuration.
    sampling_steps: T.
    guidance_scale: of classifier-free guidance; 1 is none.
    eta: noise of the steps, 1 as DDPM, 0 none.
    lora_scale: alpha / rank, where weights have an adapter.

  Raises:
    UserError: see `ddim.make`.
  """
  process = ddim.make(model.scheduler, sampling_steps, eta=eta)
  return Policy(model.unet, process, guidance_scale, lora_scale)


def conditioned(
  text: Guidance, guidance_scale: float, prepare: Callable[[Conditioning], Conditioning]
) -> Conditioning:
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
    denoise: the network with its weights bound.
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


def log_prob(value: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
  """`[B]` log N(value; mean, std^2), *averaged* over the latent dimensions H, W, C.

  The mean (not the sum) is what makes a clip range of 1e-4 meaningful (the paper, section 3).
  Latents and log-probabilities are never rounded below float32: a bfloat16 copy of the last step's
  latent shifts its log-probability by dozens of clip ranges.

  Args:
    value, mean: `[B, H, W, C]` float32.
    std: a scalar or `[B, 1, 1, 1]`, greater than 0.
  """
  chex.assert_equal_shape([value, mean])
  z = (value - mean) / std
  elementwise = -0.5 * z**2 - jnp.log(std) - 0.5 * np.log(2 * np.pi)
  return elementwise.mean(axis=tuple(range(1, value.ndim)))
