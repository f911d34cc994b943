"""From final latents to images on all devices, and the way back that a gradient takes."""

import functools
from typing import Any

import jax
from jax.sharding import Mesh

from rlft.models import stable_diffusion
from rlft.models.stable_diffusion import StableDiffusion
from rlft.parallel import microbatch as microbatch_lib
from rlft.parallel import sharding


class Decoder:
  """The VAE's decoder for the images of all devices, each of which takes its own.

  Attributes:
    decode: `(vae_params, latents [B, h, w, C]) -> images [B, H, W, 3]` in [0, 1], jitted.
    pull: `(vae_params, latents [B, h, w, C], gradient [B, H, W, 3]) -> [B, h, w, C]`, jitted: from
      the gradient with respect to the decoded images that with respect to the latents. It is 0 for
      pixels that the decoder puts beyond [0, 1].
  """

  def __init__(self, model: StableDiffusion, mesh: Mesh, *, chunk: int = 0):
    """Compiles nothing yet.

    Args:
      model: the modules.
      mesh: all devices; `vae_params` are laid out as `sharding.parameters` says.
      chunk: images at once on a device; 0 for all.
    """

    def decoder(vae_params):
      return functools.partial(stable_diffusion.decode, model, vae_params)

    def pulled(vae_params, rows):
      latents, gradient = rows
      _, pull = jax.vjp(decoder(vae_params), latents)
      return pull(gradient)[0]

    def on_devices(function, vae_params, rows):
      where = sharding.specs(mesh, vae_params)

      def local(vae_params, rows):
        whole = sharding.gather(vae_params, where)
        return microbatch_lib.mapped(functools.partial(function, whole), rows, chunk)

      return sharding.on_each(
        mesh, local, in_specs=(where, sharding.ROWS), out_specs=sharding.ROWS
      )(vae_params, rows)

    def decode(vae_params: Any, latents: jax.Array) -> jax.Array:
      return on_devices(lambda params, rows: decoder(params)(rows), vae_params, latents)

    def pull(vae_params: Any, latents: jax.Array, gradient: jax.Array) -> jax.Array:
      return on_devices(pulled, vae_params, (latents, gradient))

    self.decode, self.pull = sharding.jit(decode), sharding.jit(pull)
