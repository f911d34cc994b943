"""The denoiser of Stable Diffusion 1.x, 2.x and XL: a UNet with cross-attention to the text.

Parameter tree: `FlaxUNet2DConditionModel` of diffusers 0.39. Numbers: PyTorch's
`UNet2DConditionModel` (which differs from the Flax class in the epsilon of the transformers' group
norms, the exact GELU, and `norm_num_groups`/`norm_eps`, which the Flax class ignores).
"""

import dataclasses
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from rlft.models import layers, transformer, unet_config
from rlft.types import Conditioning

UNetConfig = unet_config.UNetConfig


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
    x = layers.Dense(self.features, name="linear_1")(x)
    return layers.Dense(self.features, name="linear_2")(nn.silu(x))


def _addition(config: UNetConfig, conditioning: Conditioning) -> jax.Array:
  """Pooled text and sines and cosines of the sizes `[B, projection_class_embeddings_input_dim]`."""
  pooled, sizes = conditioning.pooled, conditioning.sizes
  if pooled is None or sizes is None:
    raise ValueError("this UNet needs the pooled text and the sizes of the images")
  waves = timestep_embedding(
    sizes.reshape(-1),
    config.addition_time_embed_dim,
    flip_sin_to_cos=config.flip_sin_to_cos,
    freq_shift=config.freq_shift,
  )
  return jnp.concatenate([pooled, waves.reshape(len(pooled), -1)], axis=-1)


class _Level(nn.Module):
  """The resnets (and transformers) of one resolution; a down block, an up block or the middle.

  Attributes:
    config: of the UNet.
    level: index into `config.block_out_channels`.
    kind: 'down', 'mid' or 'up'.
    attend: whether there are transformers.
    dtype, remat, attention: of the UNet.
  """

  config: UNetConfig
  level: int
  kind: str
  attend: bool
  dtype: jnp.dtype
  remat: bool
  attention: str

  def setup(self):
    c, last = self.config, len(self.config.block_out_channels) - 1
    resnets = {"down": c.layers_per_block, "mid": 2, "up": c.layers_per_block + 1}[self.kind]
    self.resnets = [self._resnet() for _ in range(resnets)]
    if self.attend:
      self.attentions = [self._transformer() for _ in range(resnets - (self.kind == "mid"))]
    if self.kind == "down" and self.level < last:
      self.downsamplers = [layers.Downsample((1, 1), self.dtype)]
    if self.kind == "up" and self.level > 0:
      self.upsamplers = [layers.Upsample(self.dtype)]

  def _resnet(self) -> nn.Module:
    c = self.config
    cls = nn.remat(layers.ResnetBlock) if self.remat else layers.ResnetBlock
    return cls(c.block_out_channels[self.level], c.norm_num_groups, c.norm_eps, self.dtype)

  def _transformer(self) -> nn.Module:
    c, depth = self.config, self.config.depths[self.level]
    # One block is computed again together with its projections, several one by one: what exists at
    # once are the activations of one block.
    whole = self.remat and depth == 1
    cls = nn.remat(transformer.Transformer2D) if whole else transformer.Transformer2D
    return cls(
      c.block_out_channels[self.level],
      c.heads[self.level],
      c.norm_num_groups,
      c.use_linear_projection,
      depth,
      c.cross_only[self.level] and self.kind != "mid",
      self.dtype,
      self.attention,
      self.remat and depth > 1,
    )

  def __call__(
    self,
    x: jax.Array,
    skips: tuple[jax.Array, ...],
    time: jax.Array,
    text: transformer.Text | None,
  ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """`x` `[n, H, W, C]` and the stack of skip connections -> both after this level."""
    for i, resnet in enumerate(self.resnets):
      if self.kind == "up":
        x, skips = jnp.concatenate(layers.alike(x, skips[-1]), axis=-1), skips[:-1]
      x = resnet(x, time)
      if self.attend and i < len(self.attentions):
        x = self.attentions[i](x, transformer.part(text, f"attentions_{i}"))
      if self.kind == "down":
        skips = (*skips, x)
    if hasattr(self, "downsamplers"):
      x = self.downsamplers[0](x)
      skips = (*skips, x)
    if hasattr(self, "upsamplers"):
      x = self.upsamplers[0](x)
    return x, skips

  def prepare(self, text: jax.Array) -> dict[str, transformer.Text]:
    """`[..., L, D]` -> keys and values of all transformers."""
    return {f"attentions_{i}": module.prepare(text) for i, module in enumerate(self.attentions)}


class UNet2DCondition(nn.Module):
  """Predicts the noise (or the velocity) in noisy latents.

  Attributes:
    config: see `UNetConfig`.
    dtype: type of the computation; parameters, input and output are float32.
    remat: saves memory in the backward pass by computing resnets and transformers twice.
    attention: implementation of the transformers' attention, see `attention.attention`.
  """

  config: UNetConfig
  dtype: jnp.dtype = jnp.float32
  remat: bool = False
  attention: str = "auto"

  def setup(self):
    c, last = self.config, len(self.config.block_out_channels) - 1

    def level(i: int, kind: str, block: str) -> _Level:
      attend = "CrossAttn" in block
      return _Level(c, i, kind, attend, self.dtype, self.remat, self.attention)

    first = c.block_out_channels[0]
    self.time_embedding = TimeEmbedding(4 * first)
    if c.addition_embed_type is not None:
      self.add_embedding = TimeEmbedding(4 * first)
    self.conv_in = layers.Conv(first, dtype=self.dtype)
    self.down_blocks = [level(i, "down", block) for i, block in enumerate(c.down_block_types)]
    self.mid_block = level(last, "mid", "CrossAttn")
    self.up_blocks = [level(last - i, "up", block) for i, block in enumerate(c.up_block_types)]
    self.conv_norm_out = layers.GroupNorm(c.norm_num_groups, c.norm_eps, self.dtype, silu=True)
    self.conv_out = layers.Conv(c.out_channels, dtype=self.dtype)

  def _levels(self) -> dict[str, _Level]:
    """In the order in which they are run, under their names."""
    return {
      **{f"down_blocks_{i}": module for i, module in enumerate(self.down_blocks)},
      "mid_block": self.mid_block,
      **{f"up_blocks_{i}": module for i, module in enumerate(self.up_blocks)},
    }

  def __call__(
    self, latents: jax.Array, timesteps: jax.Array, conditioning: Conditioning
  ) -> jax.Array:
    """Runs the network.

    Args:
      latents: `[n, H, W, in_channels]` float32; H and W multiples of 2^(levels - 1).
      timesteps: `[n]` int32 in [0, num_train_timesteps).
      conditioning: leaves `[B, ...]` float32, D the config's `cross_attention_dim` and F its
        `pooled_features`; or what `prepare` made of it. B is a multiple of n, see `layers.alike`:
        in float32 what comes before the first attention to the text is computed once for all texts.

    Returns:
      `[B, H, W, out_channels]` float32.
    """
    c = self.config
    multiple = 2 ** (len(c.block_out_channels) - 1)
    if any(size % multiple for size in latents.shape[1:3]):
      raise ValueError(f"latents {latents.shape}: height and width must be multiples of {multiple}")
    if self.dtype != jnp.float32:
      # XLA rounds elsewhere in sampling than in training if repeated maps were rounded before.
      rows = jax.tree.leaves(conditioning.text)[0]
      latents, timesteps = (layers.alike(x, rows)[0] for x in (latents, timesteps))
    time = timestep_embedding(
      timesteps,
      c.block_out_channels[0],
      flip_sin_to_cos=c.flip_sin_to_cos,
      freq_shift=c.freq_shift,
    )
    time = self.time_embedding(time)
    if c.addition_embed_type is not None:
      time = layers.add(time, self.add_embedding(_addition(c, conditioning)))

    x = self.conv_in(latents)
    skips = (x,)
    for name, level in self._levels().items():
      text = transformer.part(conditioning.text, name) if level.attend else None
      x, skips = level(x, skips, time, text)
    return self.conv_out(self.conv_norm_out(x)).astype(jnp.float32)

  def prepare(self, conditioning: Conditioning) -> Conditioning:
    """Does what depends on the text alone, so that it is done once, not at every step.

    Args:
      conditioning: leaves `[..., B, ...]`.

    Returns:
      What `__call__` takes in its place, with the same result: `text` holds the keys and values
      `[..., B, L, C]` of each attention to the text, under the names of the modules.
    """
    text = {
      name: level.prepare(conditioning.text)
      for name, level in self._levels().items()
      if level.attend
    }
    return dataclasses.replace(conditioning, text=text)

  def example_inputs(self) -> tuple[Any, ...]:
    """The smallest valid inputs of `__call__`, of `jax.ShapeDtypeStruct`s."""
    c = self.config
    size = 2 ** (len(c.block_out_channels) - 1)

    def f32(*shape: int) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct(shape, jnp.float32)

    more = {}
    if c.addition_embed_type is not None:
      more = {"pooled": f32(1, c.pooled_features), "sizes": f32(1, unet_config.SIZES)}
    return (
      f32(1, size, size, c.in_channels),
      jax.ShapeDtypeStruct((1,), jnp.int32),
      Conditioning(f32(1, 1, c.cross_attention_dim), **more),
    )
