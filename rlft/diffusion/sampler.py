"""From prompts to images: tokens, text embeddings, reverse diffusion, decoding.

Texts have a program of their own, so that how many images each has does not make another program
of the large one.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import tqdm

from rlft.diffusion import rollout
from rlft.diffusion.policy import Policy
from rlft.models import lora, stable_diffusion
from rlft.models import text as text_lib
from rlft.models.precision import cast
from rlft.models.stable_diffusion import StableDiffusion
from rlft.parallel import microbatch as microbatch_lib
from rlft.parallel import sharding
from rlft.types import Collect, Drawn, Guidance, Trajectory, UserError


def condition(
  model: StableDiffusion,
  frozen: Any,
  ids: jax.Array,
  empty: jax.Array,
  count: int,
  *,
  guidance_scale: float,
) -> Guidance:
  """What the policy is conditioned on; pure, to be jitted. The images of a prompt are neighbours.

  Args:
    model: the modules.
    frozen: parameters of the text encoders, whole.
    ids: `[P, E, L]` int32 tokens; a text is encoded once for all of its images.
    empty: `[E, L]` int32 tokens of the empty prompt.
    count: B, images; a multiple of P.
    guidance_scale: classifier-free guidance; 1 is none.

  Returns:
    Leaves `[B, ...]`.
  """
  size = stable_diffusion.image_size(model)

  def repeat(conditioning):
    return jax.tree.map(lambda x: jnp.repeat(x, count // len(x), axis=0), conditioning)

  return Guidance(
    prompt=repeat(text_lib.encode(model, frozen, ids, size)),
    empty=None
    if guidance_scale == 1.0
    else repeat(text_lib.empty(model, frozen, empty[None], size)),
  )


def generate(
  model: StableDiffusion,
  policy: Policy,
  weights: lora.Weights,
  vae_params: Any,
  text: Guidance,
  keys: jax.Array,
  *,
  collect: Collect = "trajectory",
  microbatch: int = 0,
  decode_chunk: int = 0,
) -> tuple[Trajectory | jax.Array, jax.Array]:
  """Samples images; pure, to be jitted.

  Args:
    model: the modules.
    policy: what draws.
    weights: of the UNet, whole.
    vae_params: whole.
    text: `[B, ...]`, see `condition`.
    keys: `[B]`, consumed; each image depends on its own key alone.
    collect: what to keep of the way to the images.
    microbatch: images at once in the UNet; 0 for all.
    decode_chunk: images at once in the VAE; 0 for all.

  Returns:
    What was to be collected, see `Drawn`, and images `[B, H, W, 3]` in [0, 1].
  """
  steps, shape = len(policy.process.timesteps), stable_diffusion.latent_shape(model)

  def walk(rows):
    text, keys = rows
    path = rollout.sample(policy, weights, rollout.normal(keys, steps, shape), text, keys)
    return _swap(path) if collect == "trajectory" else path.latents[-1]

  found = microbatch_lib.mapped(walk, (text, keys), microbatch)
  if collect == "trajectory":
    found = _swap(found)
  images = microbatch_lib.mapped(
    functools.partial(stable_diffusion.decode, model, vae_params),
    found.latents[-1] if collect == "trajectory" else found,
    decode_chunk,
  )
  return found, images


def _swap(path: Trajectory) -> Trajectory:
  """Exchanges the axes of time and of the batch."""
  return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), path)


def make_encode(
  model: StableDiffusion, mesh: Mesh, *, guidance_scale: float
) -> Callable[..., Guidance]:
  """`condition` for the images of all devices, each of which encodes the texts of its own.

  Args:
    model: the modules.
    mesh: all devices; frozen parameters are laid out as `sharding.parameters` says.
    guidance_scale: as in `condition`.

  Returns:
    `(frozen, ids, empty, count) -> text`, to be jitted with `count` static; `ids` are spread over
    the devices, and so is what is returned.
  """

  def encode(frozen, ids, empty, count):
    where = sharding.specs(mesh, frozen)

    def local(frozen, ids, empty):
      whole = sharding.gather(frozen, where)
      images = count // mesh.size
      return condition(model, whole, ids, empty, images, guidance_scale=guidance_scale)

    return sharding.on_each(
      mesh,
      local,
      in_specs=(where, sharding.ROWS, sharding.EVERYWHERE),
      out_specs=sharding.ROWS,
    )(frozen, ids, empty)

  return encode


def make_sample(
  model: StableDiffusion,
  policy: Policy,
  mesh: Mesh,
  *,
  collect: Collect = "trajectory",
  microbatch: int = 0,
  decode_chunk: int = 0,
) -> Callable[..., tuple[Trajectory | jax.Array, jax.Array]]:
  """`generate` for the images of all devices, each of which draws its own.

  Args:
    model, policy, collect, decode_chunk: as in `generate`.
    mesh: all devices; weights and frozen parameters are laid out as `sharding.parameters` says.
    microbatch: images at once on a device, see `microbatch.size`.

  Returns:
    `(weights, vae_params, text, keys) -> (collected, images)`, to be jitted; `text` and `keys`
    are spread over the devices, and so is all that is returned.
  """

  def sample(weights, vae_params, text, keys):
    where = sharding.specs(mesh, (weights, vae_params))

    def local(weights, vae_params, text, keys):
      weights = dataclasses.replace(weights, unet=cast(weights.unet, model.unet.dtype))
      whole = sharding.gather((weights, vae_params), where)
      size = microbatch_lib.size(microbatch, len(keys), mesh, model.unet.dtype)
      return generate(
        model,
        policy,
        *whole,
        text,
        keys,
        collect=collect,
        microbatch=size,
        decode_chunk=decode_chunk,
      )

    collected = sharding.COLUMNS if collect == "trajectory" else sharding.ROWS
    return sharding.on_each(
      mesh,
      local,
      in_specs=(*where, sharding.ROWS, sharding.ROWS),
      out_specs=(collected, sharding.ROWS),
    )(weights, vae_params, text, keys)

  return sample


class Sampler:
  """Draws images in batches of one size; compiled once.

  Attributes:
    encode, sample: its two programs, jitted; see `make_encode` and `make_sample`.
  """

  def __init__(
    self,
    model: StableDiffusion,
    policy: Policy,
    *,
    batch_size: int,
    mesh: Mesh | None = None,
    frozen: Any = None,
    collect: Collect = "trajectory",
    microbatch: int = 0,
    decode_chunk: int = 0,
  ):
    """Places the frozen weights on the mesh (all devices if None), unless they are given.

    Args:
      model: the modules.
      policy: what draws.
      batch_size: images at once, over all devices.
      mesh: the devices.
      frozen: parameters of the VAE and the text encoders, placed; the model's own if None.
      collect, microbatch, decode_chunk: as in `make_sample`.

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
    self._frozen = frozen or sharding.place(
      self._mesh, {name: tree for name, tree in model.params.items() if name != "unet"}
    )
    self._weights = None
    self.encode = sharding.jit(
      make_encode(model, self._mesh, guidance_scale=policy.guidance_scale), static_argnums=3
    )
    self.sample = sharding.jit(
      make_sample(
        model,
        policy,
        self._mesh,
        collect=collect,
        microbatch=microbatch,
        decode_chunk=decode_chunk,
      )
    )

  @functools.cached_property
  def _empty(self) -> np.ndarray:
    """`[E, L]` int32 tokens of the empty prompt."""
    return self._model.tokenize([""])[0][0]

  def draw(self, weights: lora.Weights, ids: np.ndarray, keys: jax.Array) -> Drawn:
    """Draws a batch with all that training needs; except on CPUs, returns before it is computed.

    Args:
      weights: of the UNet, placed on the mesh.
      ids: `[P, E, L]` int32 tokens, each for as many neighbouring images.
      keys: `[B]`, consumed; each image depends on its own key alone. B may differ from the batch
        size, for another compilation.
    """
    if len(ids) % self._mesh.size:  # The images of a prompt are on several devices.
      ids = np.repeat(ids, len(keys) // len(ids), axis=0)
    ids = sharding.put(ids, sharding.batch(self._mesh))
    encoders = {name: tree for name, tree in self._frozen.items() if name != "vae"}
    text = self.encode(encoders, ids, self._empty, len(keys))
    collected, images = self.sample(weights, self._frozen["vae"], text, keys)
    return Drawn(images, text, collected)

  def __call__(self, prompts: Sequence[str], seed: int, **settings: Any) -> np.ndarray:
    """Draws one image for each prompt: `batches`, joined.

    Returns:
      `[N, H, W, 3]` float32 in [0, 1], on every process.
    """
    return np.concatenate(list(self.batches(prompts, seed, **settings)))

  def batches(
    self,
    prompts: Sequence[str],
    seed: int,
    *,
    weights: lora.Weights | None = None,
    progress: str = "",
  ) -> Iterator[np.ndarray]:
    """Draws one image for each prompt, a batch when it is asked for.

    Args:
      prompts: N texts.
      seed: image i depends on (seed, i, its prompt) alone, whatever the batch size.
      weights: of the UNet, placed on the mesh; the model's own if None.
      progress: label of a progress bar on a terminal; '' shows none.

    Yields:
      `[n, H, W, 3]` float32 in [0, 1], on every process; n is the batch size, less at the end.
    """
    if weights is None:
      if self._weights is None:
        self._weights = lora.Weights(sharding.place(self._mesh, self._model.params["unet"]))
      weights = self._weights
    ids, _ = self._model.tokenize(list(prompts))
    size, count = self._batch_size, len(prompts)
    ids = np.concatenate([ids, np.broadcast_to(self._empty, (-count % size, *ids.shape[1:]))])
    starts = range(0, count, size)
    hidden = None if progress else True  # None: where it is no terminal, as in a log file.
    for start in tqdm.tqdm(starts, desc=progress, unit="batch", disable=hidden, leave=False):
      keys = image_keys(jax.random.key(seed), start, size)
      drawn = self.draw(weights, ids[start : start + size], keys)
      yield sharding.fetch(drawn.images)[: count - start]


@functools.partial(jax.jit, static_argnums=2)
def image_keys(key: jax.Array, start: jax.Array, count: int) -> jax.Array:
  """`[count]` keys of images start, start + 1, ...; `key` is consumed."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, start + jnp.arange(count))
