"""The transformer that both towers of CLIP are made of (https://arxiv.org/abs/2103.00020).

Parameter tree: `encoder.layers.<i>...` of transformers' CLIP and OWL-ViT. The configs of the towers
differ in other things; what counts here is in `TowerConfig`.
"""

from typing import Protocol

from flax import linen as nn
import jax
import jax.numpy as jnp

from rlft.models import config as config_lib
from rlft.models import layers


class TowerConfig(Protocol):
  """What the text and the image tower have in common; names of transformers."""

  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  hidden_act: str
  layer_norm_eps: float


def quick_gelu(x: jax.Array) -> jax.Array:
  """x sigmoid(1.702 x): the GELU of OpenAI's CLIP models (SD 1.x)."""
  return x * nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
  """The exact GELU (SD 2.x, LAION's CLIP models)."""
  return nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


def check(config: TowerConfig, what: str) -> None:
  """Raises `UserError` for an unknown activation, or heads that do not divide the width."""
  config_lib.require(
    config.hidden_act in ACTIVATIONS,
    f"{what} config: hidden_act={config.hidden_act!r} must be one of {', '.join(ACTIVATIONS)}",
  )
  config_lib.require(
    config.hidden_size % config.num_attention_heads == 0,
    f"{what} config: hidden_size={config.hidden_size} must be a multiple of "
    f"num_attention_heads={config.num_attention_heads}",
  )


def _out_init(config: TowerConfig) -> nn.initializers.Initializer:
  """Projections into the residual stream start smaller with depth, as in OpenAI's CLIP."""
  return nn.initializers.normal((2 * config.num_hidden_layers * config.hidden_size) ** -0.5)


class _MLP(nn.Module):
  config: TowerConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, L, D]` -> `[B, L, D]`."""
    c = self.config
    in_init = nn.initializers.normal((2 * c.hidden_size) ** -0.5)
    x = nn.Dense(c.intermediate_size, dtype=self.dtype, kernel_init=in_init, name="fc1")(x)
    x = ACTIVATIONS[c.hidden_act](x)
    return nn.Dense(c.hidden_size, dtype=self.dtype, kernel_init=_out_init(c), name="fc2")(x)


class _Layer(nn.Module):
  config: TowerConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`x` `[B, L, D]`, `mask` `[L, L]` bool or None -> `[B, L, D]`."""
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
  config: TowerConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """`[B, L, D]` -> `[B, L, D]` before and after the last layer."""
    before = x
    for i in range(self.config.num_hidden_layers):
      before, x = x, _Layer(self.config, self.dtype, name=str(i))(x, mask)
    return before, x


class Encoder(nn.Module):
  """The layers, each with self-attention and an MLP after a layer norm.

  Attributes: config; dtype of the computation.
  """

  config: TowerConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """`x` `[B, L, D]`, `mask` `[L, L]` bool (False forbids) or None.

    Returns:
      `[B, L, D]` twice: before and after the last layer.
    """
    return _Layers(self.config, self.dtype, name="layers")(x, mask)
