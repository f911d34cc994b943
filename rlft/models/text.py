"""Encodes texts for a UNet: with one text encoder (SD 1.x, 2.x) or two (SDXL)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rlft.models.stable_diffusion import StableDiffusion
from rlft.types import Conditioning


def encode(
  model: StableDiffusion,
  params: Mapping[str, Any],
  ids: jax.Array,
  size: tuple[int, int],
  sources: jax.Array | None = None,
) -> Conditioning:
  """Encodes prompts.

  Args:
    model: E text encoders.
    params: {'text_encoder': ...}, with 'text_encoder_2' for SDXL; others are not looked at.
    ids: `[B, E, L]` int32 token ids.
    size: height and width of the images in pixels.
    sources: `[B, 4]` where each image comes from, which SDXL is told: height and width of the
      original, and the first row and column of what was cut out of it after it was scaled. None for
      images that were neither scaled nor cut.

  Returns:
    Leaves `[B, ...]` float32. SD: the last states of the encoder, after its final norm. SDXL
    (https://arxiv.org/abs/2307.01952, section 2.1): those before the last layers of both, side by
    side; and the projected end of the second.
  """
  first, *others = model.text_encoders
  variables = {"params": params["text_encoder"]}
  if not others:
    return Conditioning(first.apply(variables, ids[:, 0]))
  (second,) = others
  states = first.apply(variables, ids[:, 0], method="before_last")
  more, pooled = second.apply({"params": params["text_encoder_2"]}, ids[:, 1])
  if sources is None:
    sources = jnp.array([[*size, 0, 0]])
  targets = jnp.broadcast_to(jnp.array([size]), (len(sources), 2))
  sizes = jnp.concatenate([sources, targets], axis=1).astype(jnp.float32)
  return Conditioning(
    jnp.concatenate([states, more], axis=-1),
    pooled,
    jnp.broadcast_to(sizes, (len(ids), sizes.shape[1])),
  )


def empty(
  model: StableDiffusion, params: Mapping[str, Any], ids: jax.Array, size: tuple[int, int]
) -> Conditioning:
  """Encodes the empty prompt, given its `ids`, like `encode`; zeros if the model has `zero_empty`.

  Models with `zero_empty` were trained with zeros where no prompt was given, not with the empty
  one.
  """
  encoded = encode(model, params, ids, size)
  if not model.zero_empty:
    return encoded
  text, pooled = jax.tree.map(jnp.zeros_like, (encoded.text, encoded.pooled))
  return Conditioning(text, pooled, encoded.sizes)
