"""The pretraining loss: after the tasks of an iteration, one step on pictures with captions.

It is the beta * L_pre of the paper (arXiv 2401.12244), which keeps the pictures good while the
rewards change them. The algorithms share it.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlft.algorithms import losses
from rlft.algorithms.base import Learner
from rlft.models import stable_diffusion
from rlft.models import text as text_lib
from rlft.models.stable_diffusion import StableDiffusion
from rlft.parallel import microbatch as microbatch_lib
from rlft.parallel import sharding
from rlft.types import TrainState


def make_pretrain(
  learner: Learner, model: StableDiffusion, *, weight: float, decode_chunk: int
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """One step of the optimizer on beta * L_pre.

  Args:
    learner: with the policy.
    model: the modules.
    weight: beta.
    decode_chunk: images at once in the VAE; 0 for all.

  Returns:
    `(state, frozen, images [B, H, W, 3] uint8, sources [B, 4], ids [B, E, L], key) ->
    (state, metrics)`, to be jitted.
  """

  def pretrain(state, frozen, images, sources, ids, key):
    count, shape = len(images), stable_diffusion.latent_shape(model)
    process = learner.policy.process
    timesteps, noise = losses.denoising_noise(key, (count, *shape), process.train_timesteps)

    def loss(trained, base, part):
      denoise = learner.policy.denoiser(learner.weights(trained, base))
      errors = losses.denoising_error(denoise, process, *part)
      return weight * errors.sum() / count, errors

    latents, text = encode_pairs(learner, model, frozen, images, sources, ids, decode_chunk)
    rows = jax.tree.map(lambda x: x[None], (latents, text, timesteps, noise))
    gradient, errors = learner.gradient(loss, state, frozen, rows)
    metrics = {"loss/pretrain": errors.mean(), "pretrain/grad_norm": optax.tree.norm(gradient)}
    return learner.step(state, gradient), metrics

  return pretrain


def encode_pairs(
  learner: Learner,
  model: StableDiffusion,
  frozen: Any,
  images: jax.Array,
  sources: jax.Array,
  ids: jax.Array,
  decode_chunk: int,
) -> tuple[jax.Array, Any]:
  """What the UNet sees of pairs: latents `[B, h, w, C]` and the captions' conditioning.

  `sources` `[B, 4]` say how large the pictures were, and where they were cropped.
  """
  names = [name for name in frozen if name != "unet"]
  where = sharding.specs(learner.mesh, {name: frozen[name] for name in names})

  def local(frozen, images, sources, ids):
    frozen = sharding.gather(frozen, where)
    text = text_lib.encode(model, frozen, ids, stable_diffusion.image_size(model), sources)
    encode = functools.partial(stable_diffusion.encode, model, frozen["vae"])
    images = images.astype(jnp.float32) / 255.0
    return microbatch_lib.mapped(encode, images, decode_chunk), text

  return sharding.on_each(
    learner.mesh,
    local,
    in_specs=(where, sharding.ROWS, sharding.ROWS, sharding.ROWS),
    out_specs=(sharding.ROWS, sharding.ROWS),
  )({name: frozen[name] for name in names}, images, sources, ids)
