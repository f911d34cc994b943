"""A text-to-image model in memory, and what it is to images: their latents and their size."""

from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlft.models import clip, diffusers_unet, tokens, unet, vae
from rlft.models.shapes import Params
from rlft.types import UserError


@dataclasses.dataclass(frozen=True)
class StableDiffusion:
  """A text-to-image model: three networks, their parameters, and what belongs to them.

  Attributes:
    unet, vae: the Flax modules (with their configs).
    text_encoders: E modules, two for SDXL.
    tokenizers: E tokenizers, of as many tokens each.
    scheduler: the parsed `scheduler_config.json`.
    params: `{'unet': ..., 'vae': ..., 'text_encoder': ...}`, for SDXL 'text_encoder_2' too; float32
      trees (numpy after `pretrained.load`).
    zero_empty: the embeddings of the empty prompt are zeros (SDXL).
    fingerprint: of the parameters that `pretrained.load` has read, where it was asked to; else ''.
  """

  unet: unet.UNet2DCondition | diffusers_unet.DiffusersUNet
  vae: vae.AutoencoderKL
  text_encoders: tuple[clip.CLIPTextEncoder | clip.CLIPTextEncoderWithProjection, ...]
  tokenizers: tuple[tokens.Tokenizer, ...]
  scheduler: Mapping[str, Any]
  params: Params
  zero_empty: bool = False
  fingerprint: str = ""

  def tokenize(self, texts: Sequence[str], *, source: str = "") -> tuple[np.ndarray, int]:
    """Token ids of every text encoder; see `tokens.tokenize`.

    Args:
      texts: B prompts.
      source: where they come from; if given, texts that are cut off are logged in one warning.

    Returns:
      ids `[B, E, L]` int32, each padded as its tokenizer does, and how many texts were cut off.
    """
    ids, cut = tokens.tokenize(self.tokenizers[0], texts, source=source)
    others = [tokens.tokenize(tokenizer, texts)[0] for tokenizer in self.tokenizers[1:]]
    return np.stack([ids, *others], axis=1), cut


def decode(model: StableDiffusion, vae_params: Any, latents: jax.Array) -> jax.Array:
  """Scaled latents `[B, h, w, C]` to images `[B, H, W, 3]` float32 in [0, 1]."""
  factor = model.vae.config.scaling_factor
  images = model.vae.apply({"params": vae_params}, latents / factor, method="decode")
  return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0)


def encode(model: StableDiffusion, vae_params: Any, images: jax.Array) -> jax.Array:
  """Images `[B, H, W, 3]` in [0, 1] to scaled latents `[B, h, w, C]` (the mean)."""
  mean, _ = model.vae.apply({"params": vae_params}, 2.0 * images - 1.0, method="encode")
  return mean.astype(jnp.float32) * model.vae.config.scaling_factor


def parse_size(text: str) -> tuple[int, int] | None:
  """(H, W) of the images of '512' or '512x768', height first; None of ''.

  Raises:
    UserError: it is no size.
  """
  if not text:
    return None
  if not (match := re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)):
    raise UserError(
      f"--image_size={text} is no size in pixels: write e.g. 512, or 512x768 for a height of 512"
    )
  return int(match[1]), int(match[2] or match[1])


def sized(
  config: unet.UNetConfig,
  vae_config: vae.VAEConfig,
  size: tuple[int, int] | None,
  *,
  what: str = "unet/config.json",
) -> unet.UNetConfig:
  """A UNet's configuration for images of a size.

  Args:
    config: its `sample_size` counts where no size is given.
    vae_config: of the VAE.
    size: (H, W) in pixels; None for the model's own.
    what: the UNet's file, for messages.

  Raises:
    UserError: the model has no size of its own, or the networks cannot halve the images as often
      as they do.
  """
  own, scale = config.sample_size, vae_config.downscale
  if size is None:
    pair = (own, own) if isinstance(own, int) else own
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(x, int) for x in pair)):
      raise UserError(
        f"{what}: sample_size={own} says nothing of the images' size: give --image_size, e.g. 512"
      )
    size = (pair[0] * scale, pair[1] * scale)
  multiple = scale * 2 ** (len(config.block_out_channels) - 1)
  if any(side % multiple or not side for side in size):
    nearest = "x".join(str(max(round(side / multiple), 1) * multiple) for side in size)
    raise UserError(
      f"images of {size[0]}x{size[1]} pixels do not fit the model, which needs multiples of"
      f" {multiple}: give --image_size={nearest}"
    )
  height, width = (side // scale for side in size)
  return dataclasses.replace(config, sample_size=height if height == width else (height, width))


def latent_shape(model: StableDiffusion) -> tuple[int, int, int]:
  """(H, W, C) of the latents."""
  size = model.unet.config.sample_size
  height, width = (size, size) if isinstance(size, int) else size
  return height, width, model.unet.config.in_channels


def image_size(model: StableDiffusion) -> tuple[int, int]:
  """(H, W) of the images, in pixels."""
  height, width, _ = latent_shape(model)
  return height * model.vae.config.downscale, width * model.vae.config.downscale
