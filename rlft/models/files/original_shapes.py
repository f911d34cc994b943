"""The networks of a file without configs, from its arrays' shapes and a published model."""

from collections.abc import Mapping
import dataclasses
import re
from typing import Any

import numpy as np

from rlft.models import architectures, clip, unet, unet_config, vae
from rlft.models import config as config_lib
from rlft.models import shapes as shapes_lib
from rlft.models.files.arrays import Piece
from rlft.types import UserError

_HEAD = 64  # features of an attention head, except in the UNet of 1.x, which has 8 heads


def modules(
  base: architectures.Architecture,
  file: str,
  state: Mapping[str, np.ndarray],
  pieces: Mapping[str, Mapping[str, Piece]],
) -> dict[str, shapes_lib.Module]:
  """The networks of the published model, in the sizes of this one.

  Args:
    base: the published model.
    file: for messages.
    state: all arrays in it.
    pieces: those of each network, by the names of diffusers and transformers.

  Returns:
    'unet', 'vae', 'text_encoder' and, for SDXL, 'text_encoder_2'.

  Raises:
    UserError: an array that tells a size is missing, or the sizes are not supported.
  """
  shapes = {name: _Shapes(file, state, found) for name, found in pieces.items()}
  texts = [
    _text(config, shapes[name])
    for name, config in zip(("text_encoder", "text_encoder_2"), base.texts, strict=False)
  ]
  found = {
    "unet": unet.UNet2DCondition(_unet(base.unet, shapes["unet"], texts[-1].projection_dim)),
    "vae": vae.AutoencoderKL(_vae(base.vae, shapes["vae"])),
    "text_encoder": clip.CLIPTextEncoder(texts[0]),
  }
  if len(texts) > 1:
    found["text_encoder_2"] = clip.CLIPTextEncoderWithProjection(texts[1])
  return found


@dataclasses.dataclass(frozen=True)
class _Shapes:
  """The shapes of a network's arrays."""

  file: str
  state: Mapping[str, np.ndarray]
  pieces: Mapping[str, Piece]

  def size(self, name: str, axis: int = 0) -> int:
    """Along an axis; raises `UserError` if there is no such array or axis."""
    shape = self.pieces[name].shape(self.state) if name in self.pieces else ()
    if axis >= len(shape):
      raise UserError(
        f"{self.file} has no {name} of a known shape (the name is diffusers');"
        f" {config_lib.USE_SUPPORTED}"
      )
    return shape[axis]

  def count(self, pattern: str) -> int:
    """How many names match a regular expression as a whole."""
    return sum(re.fullmatch(pattern, name) is not None for name in self.pieces)


def _unet(base: unet.UNetConfig, shapes: _Shapes, pooled: int) -> unet.UNetConfig:
  """`pooled` is the size of what SDXL's UNet is told of a whole text."""
  levels = range(1 + shapes.count(r"down_blocks\.\d+\.downsamplers\.0\.conv\.weight"))
  channels = tuple(shapes.size(f"down_blocks.{i}.resnets.0.conv2.weight") for i in levels)
  blocks = r"down_blocks\.{}\.attentions\.0\.transformer_blocks\.\d+\.norm1\.weight"
  depths = [shapes.count(blocks.format(i)) for i in levels]
  changes: dict[str, Any] = {}
  if max(depths) > 1:
    changes |= {"transformer_layers_per_block": tuple(max(depth, 1) for depth in depths)}
  if isinstance(base.attention_head_dim, tuple):
    changes |= {"attention_head_dim": tuple(max(size // _HEAD, 1) for size in channels)}
  if base.addition_embed_type is not None:
    told = shapes.size("add_embedding.linear_1.weight", 1)
    changes |= {
      "projection_class_embeddings_input_dim": told,
      "addition_time_embed_dim": (told - pooled) // unet_config.SIZES,
    }
  return dataclasses.replace(
    base,
    in_channels=shapes.size("conv_in.weight", 1),
    out_channels=shapes.size("conv_out.weight"),
    down_block_types=tuple("CrossAttnDownBlock2D" if n else "DownBlock2D" for n in depths),
    up_block_types=tuple("CrossAttnUpBlock2D" if n else "UpBlock2D" for n in depths[::-1]),
    block_out_channels=channels,
    layers_per_block=shapes.count(r"down_blocks\.0\.resnets\.\d+\.conv1\.weight"),
    cross_attention_dim=shapes.size(
      "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", 1
    ),
    **changes,
  )


def _vae(base: vae.VAEConfig, shapes: _Shapes) -> vae.VAEConfig:
  levels = shapes.count(r"encoder\.down_blocks\.\d+\.resnets\.0\.conv1\.weight")
  return dataclasses.replace(
    base,
    down_block_types=base.down_block_types[:1] * levels,
    up_block_types=base.up_block_types[:1] * levels,
    block_out_channels=tuple(
      shapes.size(f"encoder.down_blocks.{i}.resnets.0.conv2.weight") for i in range(levels)
    ),
    layers_per_block=shapes.count(r"encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.weight"),
    latent_channels=shapes.size("post_quant_conv.weight"),
  )


def _text(base: clip.CLIPTextConfig, shapes: _Shapes) -> clip.CLIPTextConfig:
  tokens = "text_model.embeddings.token_embedding.weight"
  width = shapes.size(tokens, 1)
  projected = "text_projection.weight" in shapes.pieces
  return dataclasses.replace(
    base,
    vocab_size=shapes.size(tokens),
    hidden_size=width,
    intermediate_size=shapes.size("text_model.encoder.layers.0.mlp.fc1.weight"),
    num_hidden_layers=shapes.count(r"text_model\.encoder\.layers\.\d+\.layer_norm1\.weight"),
    num_attention_heads=max(width // _HEAD, 1),
    max_position_embeddings=shapes.size("text_model.embeddings.position_embedding.weight"),
    projection_dim=shapes.size("text_projection.weight") if projected else base.projection_dim,
  )
