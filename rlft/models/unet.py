"""The denoiser of Stable Diffusion 1.x and 2.x: a UNet with cross-attention to the text.

Parameter tree: `FlaxUNet2DConditionModel` of diffusers 0.39. Numbers: PyTorch's
`UNet2DConditionModel` (which differs from the Flax class in the epsilon of the transformers' group
norms, the exact GELU, and `norm_num_groups`/`norm_eps`, which the Flax class ignores).
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from rlft.models import config as config_lib
from rlft.models import layers, transformer

_DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
_UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")

# Options of the PyTorch class that change what is computed, with the value implemented here.
_FIXED = {
  "act_fn": "silu",
  "addition_embed_type": None,
  "addition_time_embed_dim": None,
  "attention_type": "default",
  "center_input_sample": False,
  "class_embed_type": None,
  "class_embeddings_concat": False,
  "conv_in_kernel": 3,
  "conv_out_kernel": 3,
  "cross_attention_norm": None,
  "downsample_padding": 1,
  "dropout": 0.0,
  "dual_cross_attention": False,
  "encoder_hid_dim": None,
  "encoder_hid_dim_type": None,
  "mid_block_only_cross_attention": None,
  "mid_block_scale_factor": 1,
  "mid_block_type": "UNetMidBlock2DCrossAttn",
  "num_attention_heads": None,
  "num_class_embeds": None,
  "projection_class_embeddings_input_dim": None,
  "resnet_out_scale_factor": 1.0,
  "resnet_skip_time_act": False,
  "resnet_time_scale_shift": "default",
  "reverse_transformer_layers_per_block": None,
  "time_cond_proj_dim": None,
  "time_embedding_act_fn": None,
  "time_embedding_dim": None,
  "time_embedding_type": "positional",
  "timestep_post_act": None,
  "transformer_layers_per_block": 1,
}
_IGNORED = ("addition_embed_type_num_heads",)


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """What varies between the UNets of SD 1.x and 2.x; names and defaults are diffusers'.

  Attributes:
    attention_head_dim: number of heads (the name is wrong in diffusers), for all levels or each.
    upcast_attention: kept for saving; attention weights are always computed in float32 here.
    sample_size: latent height and width the model was made for; kept for saving.
    (others: as in diffusers' `UNet2DConditionModel`.)
  """

  sample_size: int | tuple[int, int] | None = None
  in_channels: int = 4
  out_channels: int = 4
  flip_sin_to_cos: bool = True
  freq_shift: int = 0
  down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
  up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
  only_cross_attention: bool | tuple[bool, ...] = False
  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  layers_per_block: int = 2
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  cross_attention_dim: int = 1280
  attention_head_dim: int | tuple[int, ...] = 8
  use_linear_projection: bool = False
  upcast_attention: bool = False

  def __post_init__(self):
    levels = len(self.block_out_channels)
    for name, known in (("down_block_types", _DOWN_BLOCKS), ("up_block_types", _UP_BLOCKS)):
      found = getattr(self, name)
      config_lib.require(
        len(found) == levels and set(found) <= set(known),
        f"UNet config: {name}={found} must be {levels} of {known}, one for each of "
        f"block_out_channels={self.block_out_channels}",
      )
    for name in ("layers_per_block", "cross_attention_dim", "norm_num_groups"):
      found = getattr(self, name)
      config_lib.require(
        isinstance(found, int), f"UNet config: {name}={found} is not supported; only one integer"
      )
    for name in ("attention_head_dim", "only_cross_attention"):
      found = getattr(self, name)
      config_lib.require(
        not isinstance(found, tuple) or len(found) == levels,
        f"UNet config: {name}={found} must be one value or {levels}",
      )
    for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
      config_lib.require(
        channels % self.norm_num_groups == 0 and channels % heads == 0,
        f"UNet config: block_out_channels={self.block_out_channels} must be multiples of "
        f"norm_num_groups={self.norm_num_groups} and of the heads {self.heads}",
      )

  @property
  def heads(self) -> tuple[int, ...]:
    """Attention heads of each level, from the largest map to the smallest."""
    return self._per_level(self.attention_head_dim)

  @property
  def cross_only(self) -> tuple[bool, ...]:
    """Whether the first attention of a level's transformers also attends to the text."""
    return self._per_level(self.only_cross_attention)

  def _per_level(self, value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

  @classmethod
  def from_dict(cls, data: Mapping[str, Any], what: str = "UNet config") -> "UNetConfig":
    """From a parsed `unet/config.json`; raises `UserError` on anything not implemented."""
    return config_lib.parse(cls, data, what=what, fixed=_FIXED, ignored=_IGNORED)


def timestep_embedding(
  timesteps: jax.Array, features: int, *, flip_sin_to_cos: bool, freq_shift: int
) -> jax.Array:
  """Sines and cosines of `timesteps` `[B]` at `features / 2` frequencies -> `[B, features]`.

  w_i = 10000^(-i / (features/2 - freq_shift)); Vaswani et al. 2017, section 3.5, as in DDPM.
  """
  half = features // 2
  exponent = -math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
  angles = timesteps.astype(jnp.float32)[:, None] * jnp.exp(exponent)[None]
  parts = [jnp.sin(angles), jnp.cos(angles)]
  return jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)


class TimeEmbedding(nn.Module):
  """Two dense layers, always float32."""

  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, E]` -> `[B, features]`."""
    x = nn.Dense(self.features, name="linear_1")(x)
    return nn.Dense(self.features, name="linear_2")(nn.silu(x))


class _Level(nn.Module):
  """The resnets (and transformers) of one resolution; a down block, an up block or the middle.

  Attributes:
    config: of the UNet.
    level: index into `config.block_out_channels`.
    kind: 'down', 'mid' or 'up'.
    attend: whether there are transformers.
    dtype: type of the computation.
    remat: whether resnets and transformers are computed again in the backward pass.
  """

  config: UNetConfig
  level: int
  kind: str
  attend: bool
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  def _resnet(self, i: int) -> Callable[..., jax.Array]:
    c = self.config
    cls = nn.remat(layers.ResnetBlock) if self.remat else layers.ResnetBlock
    return cls(
      c.block_out_channels[self.level],
      c.norm_num_groups,
      c.norm_eps,
      self.dtype,
      name=f"resnets_{i}",
    )

  def _transformer(self, i: int) -> Callable[..., jax.Array]:
    c = self.config
    cls = nn.remat(transformer.Transformer2D) if self.remat else transformer.Transformer2D
    return cls(
      c.heads[self.level],
      c.norm_num_groups,
      c.use_linear_projection,
      c.cross_only[self.level] and self.kind != "mid",
      self.dtype,
      name=f"attentions_{i}",
    )

  @nn.compact
  def __call__(
    self, x: jax.Array, skips: tuple[jax.Array, ...], time: jax.Array, text: jax.Array
  ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """`x` `[B, H, W, C]` and the stack of skip connections -> both after this level."""
    last = len(self.config.block_out_channels) - 1
    if self.kind == "mid":
      x = self._resnet(0)(x, time)
      x = self._transformer(0)(x, text)
      return self._resnet(1)(x, time), skips
    for i in range(self.config.layers_per_block + (self.kind == "up")):
      if self.kind == "up":
        x, skips = jnp.concatenate([x, skips[-1]], axis=-1), skips[:-1]
      x = self._resnet(i)(x, time)
      if self.attend:
        x = self._transformer(i)(x, text)
      if self.kind == "down":
        skips = (*skips, x)
    if self.kind == "down" and self.level < last:
      x = layers.Downsample((1, 1), self.dtype, name="downsamplers_0")(x)
      skips = (*skips, x)
    if self.kind == "up" and self.level > 0:
      x = layers.Upsample(self.dtype, name="upsamplers_0")(x)
    return x, skips


class UNet2DCondition(nn.Module):
  """Predicts the noise (or the velocity) in noisy latents.

  Attributes:
    config: see `UNetConfig`.
    dtype: type of the computation; parameters, input and output are float32.
    remat: saves memory in the backward pass by computing resnets and transformers twice.
  """

  config: UNetConfig
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, latents: jax.Array, timesteps: jax.Array, text: jax.Array) -> jax.Array:
    """Runs the network.

    Args:
      latents: `[B, H, W, in_channels]` float32; H and W multiples of 2^(levels - 1).
      timesteps: `[B]` int32 in [0, 1000).
      text: `[B, L, cross_attention_dim]` float32, the text encoder's output.

    Returns:
      `[B, H, W, out_channels]` float32.
    """
    c = self.config
    levels = len(c.block_out_channels)
    if any(size % 2 ** (levels - 1) for size in latents.shape[1:3]):
      raise ValueError(
        f"latents {latents.shape}: height and width must be multiples of {2 ** (levels - 1)}"
      )
    time = timestep_embedding(
      timesteps,
      c.block_out_channels[0],
      flip_sin_to_cos=c.flip_sin_to_cos,
      freq_shift=c.freq_shift,
    )
    time = TimeEmbedding(4 * c.block_out_channels[0], name="time_embedding")(time)

    def level(i: int, kind: str, attend: bool, name: str) -> _Level:
      return _Level(c, i, kind, attend, self.dtype, self.remat, name=name)

    x = layers.Conv(c.block_out_channels[0], dtype=self.dtype, name="conv_in")(latents)
    skips = (x,)
    for i, block in enumerate(c.down_block_types):
      attend = block.startswith("CrossAttn")
      x, skips = level(i, "down", attend, f"down_blocks_{i}")(x, skips, time, text)
    x, skips = level(levels - 1, "mid", True, "mid_block")(x, skips, time, text)
    for i, block in enumerate(c.up_block_types):
      attend = block.startswith("CrossAttn")
      x, skips = level(levels - 1 - i, "up", attend, f"up_blocks_{i}")(x, skips, time, text)

    x = layers.GroupNorm(c.norm_num_groups, c.norm_eps, self.dtype, name="conv_norm_out")(x)
    x = layers.Conv(c.out_channels, dtype=self.dtype, name="conv_out")(nn.silu(x))
    return x.astype(jnp.float32)

  def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The smallest valid inputs of `__call__`."""
    c = self.config
    size = 2 ** (len(c.block_out_channels) - 1)
    return (
      jax.ShapeDtypeStruct((1, size, size, c.in_channels), jnp.float32),
      jax.ShapeDtypeStruct((1,), jnp.int32),
      jax.ShapeDtypeStruct((1, 1, c.cross_attention_dim), jnp.float32),
    )
