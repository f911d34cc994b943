"""The autoencoder of Stable Diffusion: images to latents of an eighth of their size, and back.

Parameter tree: `FlaxAutoencoderKL` of diffusers 0.39. Numbers: PyTorch's `AutoencoderKL`.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from rlft.models import config as config_lib
from rlft.models import layers

# Options of the PyTorch class that change what is computed, with the value implemented here.
_FIXED = {
  "act_fn": "silu",
  "latents_mean": None,
  "latents_std": None,
  "mid_block_add_attention": True,
  "shift_factor": None,
  "use_post_quant_conv": True,
  "use_quant_conv": True,
}
_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """What varies between the autoencoders of SD 1.x and 2.x; names and defaults are diffusers'.

  Attributes:
    scaling_factor: the UNet works on `latents * scaling_factor`; `encode` and `decode` do not.
    sample_size: image size that the model was made for; kept for saving.
    force_upcast: whether PyTorch has to run it in float32; kept for saving.
    (others: as in diffusers' `AutoencoderKL`.)
  """

  in_channels: int = 3
  out_channels: int = 3
  down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
  up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
  block_out_channels: tuple[int, ...] = (64,)
  layers_per_block: int = 1
  latent_channels: int = 4
  norm_num_groups: int = 32
  sample_size: int | tuple[int, int] = 32
  scaling_factor: float = 0.18215
  force_upcast: bool = True

  def __post_init__(self):
    levels = len(self.block_out_channels)
    for name, known in (
      ("down_block_types", "DownEncoderBlock2D"),
      ("up_block_types", "UpDecoderBlock2D"),
    ):
      found = getattr(self, name)
      config_lib.require(
        found == (known,) * levels,
        f"VAE config: {name}={found} must be {levels} times {known}, once for each of "
        f"block_out_channels={self.block_out_channels}",
      )
    config_lib.require(
      all(channels % self.norm_num_groups == 0 for channels in self.block_out_channels),
      f"VAE config: block_out_channels={self.block_out_channels} must be multiples of "
      f"norm_num_groups={self.norm_num_groups}",
    )

  @property
  def downscale(self) -> int:
    """Image pixels per latent pixel, along one side."""
    return 2 ** (len(self.block_out_channels) - 1)

  @classmethod
  def from_dict(cls, data: Mapping[str, Any], what: str = "VAE config") -> "VAEConfig":
    """From a parsed `vae/config.json`; raises `UserError` on anything not implemented."""
    return config_lib.parse(cls, data, what=what, fixed=_FIXED, ignored=())


class _Stage(nn.Module):
  """The resnets of one resolution, then a change of resolution unless it is the last stage."""

  features: int
  layers: int
  groups: int
  resample: str | None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C]` -> `[B, H', W', features]`."""
    for i in range(self.layers):
      resnet = layers.ResnetBlock(
        self.features, self.groups, _EPSILON, self.dtype, name=f"resnets_{i}"
      )
      x = resnet(x)
    if self.resample == "down":
      # PyTorch pads only below and to the right here.
      x = layers.Downsample((0, 1), self.dtype, name="downsamplers_0")(x)
    elif self.resample == "up":
      x = layers.Upsample(self.dtype, name="upsamplers_0")(x)
    return x


class _PixelAttention(nn.Module):
  """Self-attention with one head over the pixels of a map, as a residual."""

  groups: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C]` -> `[B, H, W, C]`."""
    b, h, w, c = x.shape
    y = layers.GroupNorm(self.groups, _EPSILON, self.dtype, name="group_norm")(x)
    # Inlined rather than nested: the projections are children of this module in the tree.
    y = y.reshape(b, h * w, 1, c)
    query, key, value = (
      nn.Dense(c, dtype=self.dtype, name=name)(y) for name in ("query", "key", "value")
    )
    y = layers.attention(query, key, value).reshape(b, h, w, c)
    return x + nn.Dense(c, dtype=self.dtype, name="proj_attn")(y)


class _Middle(nn.Module):
  """Resnet, attention, resnet at the lowest resolution."""

  groups: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C]` -> `[B, H, W, C]`."""

    def resnet(i: int, y: jax.Array) -> jax.Array:
      module = layers.ResnetBlock(
        x.shape[-1], self.groups, _EPSILON, self.dtype, name=f"resnets_{i}"
      )
      return module(y)

    y = _PixelAttention(self.groups, self.dtype, name="attentions_0")(resnet(0, x))
    return resnet(1, y)


class _Encoder(nn.Module):
  """Images to the moments of the latents, before `quant_conv`."""

  config: VAEConfig
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, 3]` -> `[B, h, w, 2 * latent_channels]`."""
    c = self.config
    x = layers.Conv(c.block_out_channels[0], dtype=self.dtype, name="conv_in")(x)
    for i, features in enumerate(c.block_out_channels):
      resample = "down" if i < len(c.block_out_channels) - 1 else None
      stage = _Stage(
        features,
        c.layers_per_block,
        c.norm_num_groups,
        resample,
        self.dtype,
        name=f"down_blocks_{i}",
      )
      x = stage(x)
    x = _Middle(c.norm_num_groups, self.dtype, name="mid_block")(x)
    x = layers.GroupNorm(c.norm_num_groups, _EPSILON, self.dtype, silu=True, name="conv_norm_out")(
      x
    )
    return layers.Conv(2 * c.latent_channels, dtype=self.dtype, name="conv_out")(x)


class _Decoder(nn.Module):
  """Latents, after `post_quant_conv`, to images."""

  config: VAEConfig
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, h, w, latent_channels]` -> `[B, H, W, 3]`."""
    c = self.config
    x = layers.Conv(c.block_out_channels[-1], dtype=self.dtype, name="conv_in")(x)
    x = _Middle(c.norm_num_groups, self.dtype, name="mid_block")(x)
    for i, features in enumerate(c.block_out_channels[::-1]):
      resample = "up" if i < len(c.block_out_channels) - 1 else None
      stage = _Stage(
        features,
        c.layers_per_block + 1,
        c.norm_num_groups,
        resample,
        self.dtype,
        name=f"up_blocks_{i}",
      )
      x = stage(x)
    x = layers.GroupNorm(c.norm_num_groups, _EPSILON, self.dtype, silu=True, name="conv_norm_out")(
      x
    )
    return layers.Conv(c.out_channels, dtype=self.dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
  """Use `apply(variables, x, method="encode")` or `method="decode"`.

  Attributes:
    config: see `VAEConfig`.
    dtype: type of the computation; parameters, inputs and outputs are float32.
  """

  config: VAEConfig
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    c = self.config
    self.encoder = _Encoder(c, self.dtype)
    self.decoder = _Decoder(c, self.dtype)
    self.quant_conv = layers.Conv(2 * c.latent_channels, 1, dtype=self.dtype)
    self.post_quant_conv = layers.Conv(c.latent_channels, 1, dtype=self.dtype)

  def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`images` `[B, H, W, 3]` in [-1, 1] -> mean, log variance, each `[B, h, w, C]` float32.

    The log variance is clipped to [-30, 20]. h = H / downscale, w = W / downscale.
    """
    moments = self.quant_conv(self.encoder(images)).astype(jnp.float32)
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)

  def decode(self, latents: jax.Array) -> jax.Array:
    """`latents` `[B, h, w, C]`, divided by `scaling_factor` -> `[B, H, W, 3]` about [-1, 1]."""
    return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Encodes, takes the mean, decodes; `init` goes through here, so it sees every parameter."""
    return self.decode(self.encode(images)[0])

  def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The smallest valid inputs of `__call__`."""
    size = self.config.downscale
    return (jax.ShapeDtypeStruct((1, size, size, self.config.in_channels), jnp.float32),)
