"""CLIP's image tower, a Vision Transformer (https://arxiv.org/abs/2103.00020).

Parameter tree and numbers: `CLIPVisionModel` of transformers; with `pre_norm='pre_layernorm'`, the
image tower of OWL-ViT and OWLv2, which differs in that name only.
"""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from rlft.models import clip_layers
from rlft.models import config as config_lib


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
  """Names and defaults of transformers' `CLIPVisionConfig` (ViT-B/32)."""

  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  num_channels: int = 3
  image_size: int = 224
  patch_size: int = 32
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  projection_dim: int = 512

  def __post_init__(self):
    clip_layers.check(self, "image tower")
    config_lib.require(
      self.image_size % self.patch_size == 0,
      f"image tower config: image_size={self.image_size} must be a multiple of "
      f"patch_size={self.patch_size}",
    )

  @property
  def grid(self) -> int:
    """Patches along one side of the image."""
    return self.image_size // self.patch_size

  @property
  def pixels(self) -> jax.ShapeDtypeStruct:
    """What the tower takes for one image: `[1, S, S, 3]` float32."""
    shape = (1, self.image_size, self.image_size, self.num_channels)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


class PatchEmbedding(nn.Module):
  """Convolution with stride = kernel size, as one matrix product: exact, and quicker on CPUs.

  Attributes: patch, the side of a patch in pixels; features; use_bias; dtype of the computation.
  """

  patch: int
  features: int
  use_bias: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """`[B, S, T, C]`, S and T multiples of `patch` -> `[B, N, features]`, patches row by row."""
    p, (b, h, w, c) = self.patch, pixels.shape
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (p, p, c, self.features))
    x = pixels.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(b, -1, p * p * c).astype(self.dtype)
    x = x @ kernel.reshape(-1, self.features).astype(self.dtype)
    if self.use_bias:
      x = x + self.param("bias", nn.initializers.zeros_init(), (self.features,)).astype(self.dtype)
    return x


class _Embeddings(nn.Module):
  config: CLIPVisionConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """`[B, S, S, 3]` -> `[B, 1 + N, D]`: the class token, then the patches; with positions."""
    c = self.config
    width = c.hidden_size
    cls = self.param("class_embedding", nn.initializers.normal(width**-0.5), (width,))
    patches = PatchEmbedding(c.patch_size, width, dtype=self.dtype, name="patch_embedding")(pixels)
    positions = nn.Embed(
      1 + c.grid**2,
      width,
      embedding_init=nn.initializers.normal(width**-0.5),
      name="position_embedding",
    )
    first = jnp.broadcast_to(cls.astype(self.dtype), (len(pixels), 1, width))
    return jnp.concatenate([first, patches], axis=1) + positions(jnp.arange(1 + c.grid**2))


class CLIPVisionTower(nn.Module):
  """Attributes: config; dtype of the computation; pre_norm, the name of the first layer norm."""

  config: CLIPVisionConfig
  dtype: jnp.dtype = jnp.float32
  pre_norm: str = "pre_layrnorm"  # as in the published files

  @nn.compact
  def __call__(self, pixels: jax.Array, all_tokens: bool = False) -> jax.Array:
    """Encodes images.

    Args:
      pixels: `[B, S, S, 3]` float, S the config's `image_size`, normalised with CLIP's mean and
        deviation.
      all_tokens: whether to return the patches too.

    Returns:
      float32, after the last layer norm: the class token `[B, D]`, or all tokens `[B, 1 + N, D]`,
      of which the first is the class token and the others are the patches row by row.
    """
    c = self.config
    if pixels.shape[1:] != c.pixels.shape[1:]:
      raise ValueError(
        f"images of shape {pixels.shape[1:]}, but the image tower takes {c.pixels.shape[1:]};"
        " resize them"
      )
    x = _Embeddings(c, self.dtype, name="embeddings")(pixels)
    x = nn.LayerNorm(c.layer_norm_eps, dtype=self.dtype, name=self.pre_norm)(x)
    _, x = clip_layers.Encoder(c, self.dtype, name="encoder")(x)
    if not all_tokens:
      x = x[:, 0]
    return nn.LayerNorm(c.layer_norm_eps, dtype=jnp.float32, name="post_layernorm")(x)

  def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The smallest valid inputs of `__call__`."""
    return (self.config.pixels,)
