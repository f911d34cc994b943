"""BLIP's two networks (https://arxiv.org/abs/2201.12086) as ImageReward uses them.

A Vision Transformer, and a BERT whose layers also attend to the image. The parameter trees have the
names of the original files (those of timm and of BERT), not the ones of transformers' BLIP. The
numbers are those of both. There is no dropout, neither of values nor of layers.
"""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from rlft.models import clip_vision, layers
from rlft.models import config as config_lib

# What the originals start from: 0.02. The kernels of a narrow network start larger, 0.02 being the
# value at BERT's width, so that what an attention or MLP adds is as large as in a wide one.
_INIT = nn.initializers.truncated_normal(0.02)
_KERNEL_INIT = nn.initializers.variance_scaling(0.02**2 * 768, "fan_in", "truncated_normal")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The Vision Transformer; by default ViT-L/16. Names of transformers."""

  image_size: int = 224
  patch_size: int = 16
  hidden_size: int = 1024
  intermediate_size: int = 4096
  num_hidden_layers: int = 24
  num_attention_heads: int = 16
  layer_norm_eps: float = 1e-6

  def __post_init__(self):
    _check_heads(self, "image")
    config_lib.require(
      self.image_size % self.patch_size == 0,
      f"image encoder config: image_size={self.image_size} must be a multiple of "
      f"patch_size={self.patch_size}",
    )

  @property
  def num_tokens(self) -> int:
    """N: the class token and the patches."""
    return 1 + (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """The text encoder; by default BERT-base with BLIP's two extra tokens. Names of transformers."""

  vocab_size: int = 30524
  max_position_embeddings: int = 512
  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  layer_norm_eps: float = 1e-12

  def __post_init__(self):
    _check_heads(self, "text")


def _check_heads(config: VisionConfig | TextConfig, what: str) -> None:
  config_lib.require(
    config.hidden_size % config.num_attention_heads == 0,
    f"{what} encoder config: hidden_size={config.hidden_size} must be a multiple of "
    f"num_attention_heads={config.num_attention_heads}",
  )


def _dense(features: int, dtype: jnp.dtype, name: str) -> nn.Dense:
  return nn.Dense(features, dtype=dtype, kernel_init=_KERNEL_INIT, name=name)


def _norm(config: VisionConfig | TextConfig, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
  # The variance as mean (x - mean)^2: E[x^2] - mean^2 cancels, and one epsilon here is 1e-12.
  return nn.LayerNorm(config.layer_norm_eps, dtype=dtype, use_fast_variance=False, name=name)


def _gelu(x: jax.Array) -> jax.Array:
  return nn.gelu(x, approximate=False)


class _PatchEmbed(nn.Module):
  config: VisionConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """`[B, S, S, 3]` -> `[B, N - 1, D]`."""
    c = self.config
    project = clip_vision.PatchEmbedding(
      c.patch_size, c.hidden_size, use_bias=True, dtype=self.dtype, name="proj"
    )
    return project(pixels)


class _FusedAttention(nn.Module):
  config: VisionConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, N, D]` -> `[B, N, D]`; one projection makes queries, keys and values."""
    c = self.config
    y = _dense(3 * c.hidden_size, self.dtype, "qkv")(x)
    y = y.reshape(*x.shape[:2], 3, c.num_attention_heads, -1)
    y = layers.attention(y[:, :, 0], y[:, :, 1], y[:, :, 2])
    return _dense(c.hidden_size, self.dtype, "proj")(y.reshape(x.shape))


class _MLP(nn.Module):
  config: VisionConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, N, D]` -> `[B, N, D]`."""
    c = self.config
    x = _gelu(_dense(c.intermediate_size, self.dtype, "fc1")(x))
    return _dense(c.hidden_size, self.dtype, "fc2")(x)


class _Block(nn.Module):
  config: VisionConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, N, D]` -> `[B, N, D]`; norms come before the layers."""
    c = self.config
    x = x + _FusedAttention(c, self.dtype, name="attn")(_norm(c, self.dtype, "norm1")(x))
    return x + _MLP(c, self.dtype, name="mlp")(_norm(c, self.dtype, "norm2")(x))


class _Blocks(nn.Module):
  config: VisionConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, N, D]` -> `[B, N, D]`."""
    for i in range(self.config.num_hidden_layers):
      x = _Block(self.config, self.dtype, name=str(i))(x)
    return x


class VisionTransformer(nn.Module):
  """Attributes: config; dtype of the computation."""

  config: VisionConfig
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """Encodes images.

    Args:
      pixels: `[B, S, S, 3]` float, S the config's `image_size`, normalised with CLIP's mean and
        deviation.

    Returns:
      `[B, N, D]` of type `dtype`: the class token, then the patches row by row.
    """
    c = self.config
    if pixels.shape[1:] != (c.image_size, c.image_size, 3):
      raise ValueError(
        f"images of shape {pixels.shape[1:]}, but the image encoder takes "
        f"{(c.image_size, c.image_size, 3)}; resize them"
      )
    cls = self.param("cls_token", _INIT, (1, 1, c.hidden_size))
    positions = self.param("pos_embed", _INIT, (1, c.num_tokens, c.hidden_size))
    x = _PatchEmbed(c, self.dtype, name="patch_embed")(pixels)
    first = jnp.broadcast_to(cls.astype(self.dtype), (len(pixels), 1, c.hidden_size))
    x = jnp.concatenate([first, x], axis=1) + positions.astype(self.dtype)
    x = _Blocks(c, self.dtype, name="blocks")(x)
    return _norm(c, self.dtype, "norm")(x)


class _Embeddings(nn.Module):
  config: TextConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    """`[B, L]` int32 -> `[B, L, D]`: tokens and positions; BLIP has no token types."""
    c = self.config
    words = nn.Embed(c.vocab_size, c.hidden_size, embedding_init=_INIT, name="word_embeddings")
    positions = nn.Embed(
      c.max_position_embeddings, c.hidden_size, embedding_init=_INIT, name="position_embeddings"
    )
    x = words(ids) + positions(jnp.arange(ids.shape[1]))
    return _norm(c, self.dtype, "LayerNorm")(x)


class _Projections(nn.Module):
  config: TextConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`x` `[B, L, D]` attends to `context` `[B, M, E]` -> `[B, L, D]`."""
    c = self.config

    def project(name: str, inputs: jax.Array) -> jax.Array:
      y = _dense(c.hidden_size, self.dtype, name)(inputs)
      return y.reshape(*inputs.shape[:2], c.num_attention_heads, -1)

    query, key, value = project("query", x), project("key", context), project("value", context)
    return layers.attention(query, key, value, mask).reshape(x.shape)


class _Output(nn.Module):
  config: TextConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, y: jax.Array, x: jax.Array) -> jax.Array:
    """`y` `[B, L, E]` projected, `x` `[B, L, D]` added, then the norm."""
    y = _dense(self.config.hidden_size, self.dtype, "dense")(y)
    return _norm(self.config, self.dtype, "LayerNorm")(x + y)


class _Attention(nn.Module):
  config: TextConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """`x` `[B, L, D]`, `context` `[B, M, E]`, `mask` `[B, 1, 1, M]` bool -> `[B, L, D]`."""
    c = self.config
    y = _Projections(c, self.dtype, name="self")(x, context, mask)
    return _Output(c, self.dtype, name="output")(y, x)


class _Intermediate(nn.Module):
  config: TextConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, L, D]` -> `[B, L, E]`."""
    return _gelu(_dense(self.config.intermediate_size, self.dtype, "dense")(x))


class _Layer(nn.Module):
  config: TextConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array, image: jax.Array) -> jax.Array:
    """`x` `[B, L, D]`, `mask` `[B, 1, 1, L]`, `image` `[B, N, E]` -> `[B, L, D]`."""
    c = self.config
    x = _Attention(c, self.dtype, name="attention")(x, x, mask)
    x = _Attention(c, self.dtype, name="crossattention")(x, image)
    y = _Intermediate(c, self.dtype, name="intermediate")(x)
    return _Output(c, self.dtype, name="output")(y, x)


class _Layers(nn.Module):
  config: TextConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array, image: jax.Array) -> jax.Array:
    """Arguments and result are those of `_Layer`."""
    for i in range(self.config.num_hidden_layers):
      x = _Layer(self.config, self.dtype, name=str(i))(x, mask, image)
    return x


class _Encoder(nn.Module):
  config: TextConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array, image: jax.Array) -> jax.Array:
    """Arguments and result are those of `_Layer`; exists for the parameter tree's sake."""
    return _Layers(self.config, self.dtype, name="layer")(x, mask, image)


class TextEncoder(nn.Module):
  """BERT that reads a text while it looks at an image. Attributes: config; dtype of computation."""

  config: TextConfig
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, ids: jax.Array, mask: jax.Array, image: jax.Array) -> jax.Array:
    """Encodes texts together with images.

    Args:
      ids: `[B, L]` int32 in [0, vocab_size), L at most `max_position_embeddings`.
      mask: `[B, L]`, nonzero for tokens, zero for padding, which nothing attends to.
      image: `[B, N, E]`, all tokens of each image.

    Returns:
      `[B, L, D]` of type `dtype`; at places of padding, numbers without meaning.
    """
    c = self.config
    if ids.shape[1] > c.max_position_embeddings:
      raise ValueError(
        f"{ids.shape[1]} tokens, but the text encoder takes at most {c.max_position_embeddings}; "
        "truncate the prompts"
      )
    x = _Embeddings(c, self.dtype, name="embeddings")(ids)
    mask = mask.astype(bool)[:, None, None]
    return _Encoder(c, self.dtype, name="encoder")(x, mask, image)
