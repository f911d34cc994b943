"""A text-to-image model in memory, and what it is to images: their latents and their size."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from rlft.models import clip, diffusers_unet, tokens, unet, vae
from rlft.models.shapes import Params


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
  tokenizers: tuple[transformers.CLIPTokenizer, ...]
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


def latent_shape(model: StableDiffusion) -> tuple[int, int, int]:
  """(H, W, C) of the latents that the UNet was made for."""
  size = model.unet.config.sample_size
  height, width = (size, size) if isinstance(size, int) else size
  return height, width, model.unet.config.in_channels


def image_size(model: StableDiffusion) -> tuple[int, int]:
  """(H, W) of the images, in pixels."""
  height, width, _ = latent_shape(model)
  return height * model.vae.config.downscale, width * model.vae.config.downscale
