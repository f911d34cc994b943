"""From prompts to images: tokens, text embeddings, reverse diffusion, decoding, in one program."""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import tqdm

from rlft import ddim, rollout, sharding
from rlft import prompts as prompts_lib
from rlft.models.pretrained import StableDiffusion
from rlft.types import Trajectory, UserError


def embed(model: StableDiffusion, text_params: Any, ids: jax.Array, empty: jax.Array) -> jax.Array:
  """`[2, B, L, D]`: embeddings of the empty prompt `[L]` and of the prompts `[B, L]`."""

  def encode(x):
    return model.text_encoder.apply({"params": text_params}, x)

  text = encode(ids)
  return jnp.stack([jnp.broadcast_to(encode(empty[None]), text.shape), text])


def decode(model: StableDiffusion, vae_params: Any, latents: jax.Array) -> jax.Array:
  """Scaled latents `[B, h, w, C]` to images `[B, H, W, 3]` float32 in [0, 1]."""
  factor = model.vae.config.scaling_factor
  images = model.vae.apply({"params": vae_params}, latents / factor, method="decode")
  return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0)


def encode(model: StableDiffusion, vae_params: Any, images: jax.Array) -> jax.Array:
  """Images `[B, H, W, 3]` in [0, 1] to scaled latents `[B, h, w, C]` (the mean)."""
  mean, _ = model.vae.apply({"params": vae_params}, 2.0 * images - 1.0, method="encode")
  return mean.astype(jnp.float32) * model.vae.config.scaling_factor


def latent_shape(model: StableDiffusion) -> tuple[int, int, int]:
  """(H, W, C) of the latents that the UNet was made for."""
  size = model.unet.config.sample_size
  height, width = (size, size) if isinstance(size, int) else size
  return height, width, model.unet.config.in_channels


def generate(
  model: StableDiffusion,
  schedule: ddim.Schedule,
  unet_params: Any,
  frozen: Any,
  ids: jax.Array,
  empty: jax.Array,
  keys: jax.Array,
  *,
  guidance_scale: float,
  constrain: Any = lambda x, axis: x,
) -> tuple[Trajectory, jax.Array, jax.Array]:
  """Samples an image for each prompt; pure, to be jitted.

  Args:
    model: the modules.
    schedule: T reverse steps.
    unet_params: of the UNet.
    frozen: {'vae', 'text_encoder'} parameters.
    ids: `[B, L]` int32 tokens.
    empty: `[L]` int32 tokens of the empty prompt.
    keys: `[B]`, consumed; each image depends on its own key alone.
    guidance_scale: classifier-free guidance.
    constrain: (array, batch axis) -> the array with the batch axis laid out over the devices.

  Returns:
    The trajectory, images `[B, H, W, 3]` in [0, 1], text embeddings `[2, B, L, D]`.
  """
  steps = len(schedule.timesteps)
  text = constrain(embed(model, frozen["text_encoder"], ids, empty), 1)
  noise = constrain(rollout.normal(keys, steps, latent_shape(model)), 0)
  denoise = functools.partial(_apply, model.unet, unet_params)
  path = rollout.sample(denoise, schedule, noise, text, keys, guidance_scale=guidance_scale)
  return path, constrain(decode(model, frozen["vae"], path.latents[-1]), 0), text


def _apply(module: Any, params: Any, *args: jax.Array) -> jax.Array:
  return module.apply({"params": params}, *args)


class Sampler:
  """Draws images in batches of one size; compiled once."""

  def __init__(
    self,
    model: StableDiffusion,
    *,
    batch_size: int,
    sampling_steps: int,
    guidance_scale: float,
    eta: float = 1.0,
    mesh: Mesh | None = None,
  ):
    """Places the frozen weights on the mesh (all devices if None).

    Raises:
      UserError: the batch cannot be spread over the devices.
    """
    self._mesh = mesh or sharding.make_mesh()
    if batch_size % self._mesh.size:
      raise UserError(
        f"batch size {batch_size} cannot be spread over {self._mesh.size} devices: choose a"
        " multiple"
      )
    self._model = model
    self._batch_size = batch_size
    self._schedule = ddim.make_schedule(model.scheduler, sampling_steps, eta=eta)
    everywhere = sharding.replicated(self._mesh)
    self._frozen = sharding.put(
      {name: model.params[name] for name in ("vae", "text_encoder")}, everywhere
    )
    self._params = None
    self._empty = prompts_lib.tokenize(model.tokenizer, [""])[0][0]

    def constrain(x, axis):
      return jax.lax.with_sharding_constraint(x, sharding.batch(self._mesh, axis))

    by_row, by_column = sharding.batch(self._mesh), sharding.batch(self._mesh, 1)
    self._generate = jax.jit(
      lambda params, frozen, ids, empty, keys: generate(
        model,
        self._schedule,
        sharding.gather(self._mesh, params),
        frozen,
        ids,
        empty,
        keys,
        guidance_scale=guidance_scale,
        constrain=constrain,
      ),
      out_shardings=(Trajectory(latents=by_column, log_probs=by_column), by_row, by_column),
    )

  def rollout(
    self, params: Any, ids: np.ndarray, keys: jax.Array
  ) -> tuple[Trajectory, jax.Array, jax.Array]:
    """Samples a batch with all that training needs; returns before it is computed.

    Args:
      params: of the UNet, placed on the mesh.
      ids: `[B, L]` int32 tokens; B may differ from the batch size, for another compilation.
      keys: `[B]`, consumed; each image depends on its own key alone.

    Returns:
      The trajectory, images `[B, H, W, 3]` in [0, 1], text embeddings `[2, B, L, D]`.
    """
    ids = sharding.put(ids, sharding.batch(self._mesh))
    return self._generate(params, self._frozen, ids, self._empty, keys)

  def initial_noise(self, count: int, seed: int) -> np.ndarray:
    """`[count, H, W, C]` float32: the noise that images 0..count-1 of `seed` start from."""
    steps = len(self._schedule.timesteps)
    return np.asarray(rollout.normal(_keys(seed, 0, count), steps, latent_shape(self._model)))

  def __call__(
    self, prompts: Sequence[str], seed: int, *, params: Any = None, progress: str = ""
  ) -> np.ndarray:
    """Draws one image for each prompt.

    Args:
      prompts: N texts.
      seed: image i depends on (seed, i, its prompt) alone, whatever the batch size.
      params: of the UNet, placed on the mesh; the model's own if None.
      progress: label of a progress bar; '' shows none.

    Returns:
      `[N, H, W, 3]` float32 in [0, 1], on every process.
    """
    if params is None:
      if self._params is None:
        unet = self._model.params["unet"]
        self._params = sharding.put(unet, sharding.parameters(self._mesh, unet))
      params = self._params
    ids, _ = prompts_lib.tokenize(self._model.tokenizer, list(prompts))
    size, count = self._batch_size, len(prompts)
    ids = np.concatenate([ids, np.broadcast_to(self._empty, (-count % size, ids.shape[1]))])
    images = []
    starts = range(0, count, size)
    for start in tqdm.tqdm(starts, desc=progress, unit="batch", disable=not progress, leave=False):
      batch = self.rollout(params, ids[start : start + size], _keys(seed, start, size))[1]
      images.append(fetch(batch))
    return np.concatenate(images)[:count]


def _keys(seed: int, start: int, count: int) -> jax.Array:
  return image_keys(jax.random.key(seed), start, count)


@functools.partial(jax.jit, static_argnums=2)
def image_keys(key: jax.Array, start: jax.Array, count: int) -> jax.Array:
  """`[count]` keys of images start, start + 1, ...; `key` is consumed."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, start + jnp.arange(count))


def fetch(x: jax.Array) -> np.ndarray:
  """A sharded array as a numpy array on every process."""
  if x.is_fully_addressable:
    return np.asarray(x)
  from jax.experimental import multihost_utils

  return multihost_utils.process_allgather(x, tiled=True)
