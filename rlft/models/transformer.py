"""The transformer over the pixels of a map in Stable Diffusion's UNet.

Parameter tree: `FlaxTransformer2DModel` of diffusers 0.39. Numbers: PyTorch's
`Transformer2DModel`, with its group norm's epsilon of 1e-6 and the exact GELU.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

from rlft.models import layers


class Geglu(nn.Module):
  """Gated GELU (https://arxiv.org/abs/2002.05202); the GELU is exact, as in PyTorch."""

  features: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, N, C]` -> `[B, N, features]`."""
    x, gate = jnp.split(nn.Dense(2 * self.features, dtype=self.dtype, name="proj")(x), 2, axis=-1)
    return x * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
  """Gated GELU to 4 C and back; the layers are called after their place in PyTorch's list."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, N, C]` -> `[B, N, C]`."""
    features = x.shape[-1]
    x = Geglu(4 * features, self.dtype, name="net_0")(x)
    return nn.Dense(features, dtype=self.dtype, name="net_2")(x)


class TransformerBlock(nn.Module):
  """Self-attention, cross-attention to the text, feed-forward; each after a layer norm."""

  heads: int
  cross_only: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
    """`x` `[B, N, C]`, `text` `[B, L, D]` -> `[B, N, C]`."""

    def norm(i: int, y: jax.Array) -> jax.Array:
      return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=f"norm{i}")(y)

    def attend(i: int, y: jax.Array, context: jax.Array | None) -> jax.Array:
      module = layers.Attention(self.heads, y.shape[-1], dtype=self.dtype, name=f"attn{i}")
      return module(y, context)

    x = x + attend(1, norm(1, x), text if self.cross_only else None)
    x = x + attend(2, norm(2, x), text)
    return x + FeedForward(self.dtype, name="ff")(norm(3, x))


class Transformer2D(nn.Module):
  """A transformer block over the pixels of a map, between two projections, as a residual."""

  heads: int
  groups: int
  linear: bool
  cross_only: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
    """`x` `[B, H, W, C]`, `text` `[B, L, D]` -> `[B, H, W, C]`."""
    b, h, w, c = x.shape

    def project(name: str, y: jax.Array) -> jax.Array:
      if self.linear:
        return nn.Dense(c, dtype=self.dtype, name=name)(y)
      return layers.Conv(c, 1, dtype=self.dtype, name=name)(y.reshape(b, h, w, c))

    y = layers.GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x)
    y = project("proj_in", y).reshape(b, h * w, c)
    block = TransformerBlock(self.heads, self.cross_only, self.dtype, name="transformer_blocks_0")
    return x + project("proj_out", block(y, text)).reshape(b, h, w, c)
