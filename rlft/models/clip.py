"""The CLIP text encoder of Stable Diffusion (https://arxiv.org/abs/2103.00020).

Parameter tree: `FlaxCLIPTextModel` of transformers 4.57. Numbers: PyTorch's `CLIPTextModel`.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from rlft.models import config as config_lib
from rlft.models import layers


def quick_gelu(x: jax.Array) -> jax.Array:
  """x sigmoid(1.702 x): the GELU of OpenAI's CLIP models (SD 1.x)."""
  return x * nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
  """The exact GELU (SD 2.x)."""
  return nn.gelu(x, approximate=False)


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
  """Names and defaults of transformers' `CLIPTextConfig`; token ids are kept for saving."""

  vocab_size: int = 49408
  hidden_size: int = 512
  intermediate_size: int = 2048
  num_hidden_layers: int = 12
  num_attention_heads: int = 8
  max_position_embeddings: int = 77
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  projection_dim: int = 512
  pad_token_id: int | None = 1
  bos_token_id: int | None = 49406
  eos_token_id: int | None = 49407

  def __post_init__(self):
    config_lib.require(
      self.hidden_act in _ACTIVATIONS,
      f"text encoder config: hidden_act={self.hidden_act!r} must be one of "
      f"{', '.join(_ACTIVATIONS)}",
    )
    config_lib.require(
      self.hidden_size % self.num_attention_heads == 0,
      f"text encoder config: hidden_size={self.hidden_size} must be a multiple of "
      f"num_attention_heads={self.num_attention_heads}",
    )

  @classmethod
  def from_dict(cls, data: Mapping[str, Any], what: str = "text encoder config"):
    """From a parsed `text_encoder/config.json`; raises `UserError` if it is not CLIP's."""
    found = data.get("model_type", "clip_text_model")
    config_lib.require(
      found == "clip_text_model",
      f"{what}: model_type={found!r} is not supported (only 'clip_text_model'); "
      "use a Stable Diffusion 1.x or 2.x model",
    )
    return config_lib.parse(cls, data, what=what)


class _Embeddings(nn.Module):
  config: CLIPTextConfig

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    """`[B, L]` int32 -> `[B, L, D]`: the sum of token and position embeddings."""
    c = self.config
    tokens = nn.Embed(
      c.vocab_size,
      c.hidden_size,
      embedding_init=nn.initializers.normal(0.02),
      name="token_embedding",
    )
    positions = nn.Embed(
      c.max_position_embeddings,
      c.hidden_size,
      embedding_init=nn.initializers.normal(0.01),
      name="position_embedding",
    )
    return tokens(ids) + positions(jnp.arange(ids.shape[1]))


class _MLP(nn.Module):
  config: CLIPTextConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, L, D]` -> `[B, L, D]`."""
    c = self.config
    in_init = nn.initializers.normal((2 * c.hidden_size) ** -0.5)
    x = nn.Dense(c.intermediate_size, dtype=self.dtype, kernel_init=in_init, name="fc1")(x)
    x = _ACTIVATIONS[c.hidden_act](x)
    return nn.Dense(c.hidden_size, dtype=self.dtype, kernel_init=_out_init(c), name="fc2")(x)


def _out_init(config: CLIPTextConfig) -> nn.initializers.Initializer:
  """Projections into the residual stream start smaller with depth, as in OpenAI's CLIP."""
  return nn.initializers.normal((2 * config.num_hidden_layers * config.hidden_size) ** -0.5)


class _Layer(nn.Module):
  config: CLIPTextConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """`x` `[B, L, D]`, `mask` `[L, L]` bool -> `[B, L, D]`."""
    c = self.config
    y = nn.LayerNorm(c.layer_norm_eps, dtype=self.dtype, name="layer_norm1")(x)
    attention = layers.Attention(
      c.num_attention_heads,
      c.hidden_size,
      names=("q_proj", "k_proj", "v_proj", "out_proj"),
      bias=True,
      dtype=self.dtype,
      kernel_init=nn.initializers.normal(c.hidden_size**-0.5),
      out_init=_out_init(c),
      name="self_attn",
    )
    x = x + attention(y, mask=mask)
    y = nn.LayerNorm(c.layer_norm_eps, dtype=self.dtype, name="layer_norm2")(x)
    return x + _MLP(c, self.dtype, name="mlp")(y)


class _Layers(nn.Module):
  config: CLIPTextConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """`[B, L, D]` -> `[B, L, D]`."""
    for i in range(self.config.num_hidden_layers):
      x = _Layer(self.config, self.dtype, name=str(i))(x, mask)
    return x


class _Encoder(nn.Module):
  config: CLIPTextConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """`[B, L, D]` -> `[B, L, D]`; exists for the parameter tree's sake."""
    return _Layers(self.config, self.dtype, name="layers")(x, mask)


class _TextTransformer(nn.Module):
  config: CLIPTextConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    """`[B, L]` -> `[B, L, D]`."""
    x = _Embeddings(self.config, name="embeddings")(ids).astype(self.dtype)
    causal = jnp.tril(jnp.ones((ids.shape[1], ids.shape[1]), bool))
    x = _Encoder(self.config, self.dtype, name="encoder")(x, causal)
    norm = nn.LayerNorm(self.config.layer_norm_eps, dtype=self.dtype, name="final_layer_norm")
    return norm(x)


class CLIPTextEncoder(nn.Module):
  """Attributes: config (see `CLIPTextConfig`); dtype of the computation."""

  config: CLIPTextConfig
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    """Encodes token ids.

    Args:
      ids: `[B, L]` int32 in [0, vocab_size), L at most `max_position_embeddings`. A token attends
        to itself and those before it; padding needs no mask, as in Stable Diffusion.

    Returns:
      `[B, L, hidden_size]` float32: the last layer's states after the final layer norm.
    """
    if ids.shape[1] > self.config.max_position_embeddings:
      raise ValueError(
        f"{ids.shape[1]} tokens, but the text encoder takes at most "
        f"{self.config.max_position_embeddings}; truncate the prompts"
      )
    return _TextTransformer(self.config, self.dtype, name="text_model")(ids).astype(jnp.float32)
