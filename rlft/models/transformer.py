"""The transformer over the pixels of a map in Stable Diffusion's UNet.

Parameter tree: `FlaxTransformer2DModel` of diffusers 0.39. Numbers: PyTorch's
`Transformer2DModel`, with its group norm's epsilon of 1e-6 and the exact GELU.
"""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from rlft.models import dispatch, layers

# Text `[B, L, D]`, or the keys and values that a module makes of it, under the names of its parts;
# see `UNet2DCondition.prepare`.
Text = jax.Array | Mapping[str, Any]


def part(text: Text, name: str) -> Text:
  """The text for the submodule `name`."""
  return text[name] if isinstance(text, Mapping) else text


class Geglu(nn.Module):
  """Gated GELU (https://arxiv.org/abs/2002.05202); the GELU is exact, as in PyTorch."""

  features: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, N, C]` -> `[B, N, features]`."""
    return dispatch.gated_gelu(layers.Dense(2 * self.features, dtype=self.dtype, name="proj")(x))


class FeedForward(nn.Module):
  """Gated GELU to 4 C and back; the layers are called after their place in PyTorch's list."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, N, C]` -> `[B, N, C]`."""
    features = x.shape[-1]
    x = Geglu(4 * features, self.dtype, name="net_0")(x)
    return layers.Dense(features, dtype=self.dtype, name="net_2")(x)


class TransformerBlock(nn.Module):
  """Self-attention, cross-attention to the text, feed-forward; each after a layer norm."""

  features: int
  heads: int
  cross_only: bool = False
  dtype: jnp.dtype = jnp.float32
  attention: str = "auto"

  def setup(self):
    def attention() -> layers.Attention:
      return layers.Attention(
        self.heads, self.features, dtype=self.dtype, implementation=self.attention
      )

    def norm() -> nn.LayerNorm:
      return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)

    self.norm1, self.norm2, self.norm3 = norm(), norm(), norm()
    self.attn1, self.attn2 = attention(), attention()
    self.ff = FeedForward(self.dtype)

  def __call__(self, x: jax.Array, text: Text) -> jax.Array:
    """`x` `[n, N, C]`, `text` `[B, L, D]` or prepared, B a multiple of n -> `[B, N, C]`."""
    first = self.attn1(self.norm1(x), part(text, "attn1") if self.cross_only else None)
    x = layers.add(x, first)
    x = layers.add(x, self.attn2(self.norm2(x), part(text, "attn2")))
    return x + self.ff(self.norm3(x))

  def prepare(self, text: jax.Array) -> dict[str, Text]:
    """`[..., L, D]` -> keys and values of the attentions to the text."""
    to_text = {"attn1": self.attn1} if self.cross_only else {}
    to_text["attn2"] = self.attn2
    return {name: module.prepare(text) for name, module in to_text.items()}


class Transformer2D(nn.Module):
  """Transformer blocks over the pixels of a map, between two projections, as a residual.

  Attributes:
    features: C, channels of the map.
    heads: number of attention heads.
    groups: of the group norm.
    linear: the projections are dense layers, not 1x1 convolutions.
    depth: number of blocks.
    cross_only: the first attention of each block also attends to the text.
    dtype: type of the computation.
    attention: see `attention.attention`.
    remat: whether each block is computed again in the backward pass.
  """

  features: int
  heads: int
  groups: int
  linear: bool
  depth: int = 1
  cross_only: bool = False
  dtype: jnp.dtype = jnp.float32
  attention: str = "auto"
  remat: bool = False

  def setup(self):
    def projection() -> nn.Module:
      if self.linear:
        return layers.Dense(self.features, dtype=self.dtype)
      return layers.Conv(self.features, 1, dtype=self.dtype)

    cls = nn.remat(TransformerBlock) if self.remat else TransformerBlock
    self.norm = layers.GroupNorm(self.groups, 1e-6, self.dtype)
    self.proj_in, self.proj_out = projection(), projection()
    self.transformer_blocks = [
      cls(self.features, self.heads, self.cross_only, self.dtype, self.attention)
      for _ in range(self.depth)
    ]

  def __call__(self, x: jax.Array, text: Text) -> jax.Array:
    """`x` `[n, H, W, C]`, `text` `[B, L, D]` or prepared, B a multiple of n -> `[B, H, W, C]`."""
    n, h, w, c = x.shape
    y = self.proj_in(self.norm(x)).reshape(n, h * w, c)
    for i, block in enumerate(self.transformer_blocks):
      y = block(y, part(text, f"transformer_blocks_{i}"))
    return layers.add(x, self.proj_out(y.reshape(-1, h, w, c)))

  def prepare(self, text: jax.Array) -> dict[str, Text]:
    """`[..., L, D]` -> keys and values of all blocks."""
    return {
      f"transformer_blocks_{i}": b.prepare(text) for i, b in enumerate(self.transformer_blocks)
    }
