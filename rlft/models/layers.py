"""Layers that the UNet, the VAE and the text encoder share; channels last, parameters float32.

Every layer has a `dtype`, the type it computes in. Means, variances and softmaxes are float32
whatever the `dtype`. Parameter names and shapes are those of the Flax classes of diffusers 0.39.
"""

from collections.abc import Mapping
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from rlft.models.attention import attention
from rlft.models.dispatch import conv2d, dense_product, group_norm, upsample_conv

# `nn.Dense` with a faster gradient on CPUs.
Dense = functools.partial(nn.Dense, dot_general=dense_product)


def alike(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`[n, ...]` and `[g n, ...]`, in any order -> both `[g n, ...]`: all rows again and again.

  The UNet gets a map once for all texts, and computes it once up to the first attention to them.
  """
  rows = max(len(x), len(y))
  x, y = (z if len(z) == rows else jnp.concatenate([z] * (rows // len(z))) for z in (x, y))
  return x, y


def add(x: jax.Array, y: jax.Array) -> jax.Array:
  """The sum of both, made `alike`."""
  x, y = alike(x, y)
  return x + y


class Conv(nn.Module):
  """2-D convolution with the parameters of `nn.Conv`: `kernel` `[k, k, I, O]`, `bias` `[O]`.

  `padding` is what to add (before, after) to both height and width; `None` keeps the size.
  `double` repeats each pixel twice in both directions first, for 3x3 kernels.
  """

  features: int
  kernel_size: int = 3
  stride: int = 1
  padding: tuple[int, int] | None = None
  dtype: jnp.dtype = jnp.float32
  double: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, I]` -> `[B, H', W', O]`."""
    k = self.kernel_size
    kernel = self.param(
      "kernel", nn.initializers.lecun_normal(), (k, k, x.shape[-1], self.features), jnp.float32
    )
    bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
    padding = (k // 2, k // 2) if self.padding is None else self.padding
    x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
    if self.double:
      return upsample_conv(x, kernel) + bias
    return conv2d(x, kernel, stride=self.stride, padding=(padding, padding)) + bias


class GroupNorm(nn.Module):
  """Group normalisation with float32 statistics, and x sigmoid(x) after it if `silu`."""

  groups: int
  epsilon: float
  dtype: jnp.dtype = jnp.float32
  silu: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C]` -> the same shape."""
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones_init(), (channels,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros_init(), (channels,), jnp.float32)
    # In float32, SiLU follows in the same function; elsewhere it is computed in `dtype`.
    fused = self.silu and self.dtype == jnp.float32
    y = group_norm(
      x.astype(jnp.float32), scale, bias, groups=self.groups, epsilon=self.epsilon, silu=fused
    ).astype(self.dtype)
    return nn.silu(y) if self.silu and not fused else y


class Attention(nn.Module):
  """Multi-head attention.

  Attributes:
    heads: number of heads; must divide `features`.
    features: channels of query, key, value and output.
    names: parameter names of the query, key, value and output projections.
    bias: whether query, key and value have a bias (the output always has).
    dtype: type of the computation.
    implementation: see `attention`.
  """

  heads: int
  features: int
  names: tuple[str, str, str, str] = ("to_q", "to_k", "to_v", "to_out_0")
  bias: bool = False
  dtype: jnp.dtype = jnp.float32
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  out_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  implementation: str = "auto"

  def setup(self):
    *into, out = self.names
    for name in into:
      dense = Dense(
        self.features, use_bias=self.bias, dtype=self.dtype, kernel_init=self.kernel_init
      )
      setattr(self, name, dense)
    setattr(self, out, Dense(self.features, dtype=self.dtype, kernel_init=self.out_init))

  def __call__(
    self,
    x: jax.Array,
    context: jax.Array | Mapping[str, jax.Array] | None = None,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """Attends.

    Args:
      x: `[n, N, C]`.
      context: `[B, M, D]`, what to attend to, or what `prepare` made of it; None for `x` itself. B
        is a multiple of n, see `alike`.
      mask: see `attention`.

    Returns:
      `[B, N, features]`.
    """
    query, key, value, out = self.names
    prepared = (
      context if isinstance(context, Mapping) else self.prepare(x if context is None else context)
    )
    query, key, value = (
      y.reshape(*y.shape[:2], self.heads, -1)
      for y in (getattr(self, query)(x), prepared[key], prepared[value])
    )
    query, key = alike(query, key)
    y = attention(query, key, value, mask, implementation=self.implementation)
    return getattr(self, out)(y.reshape(*y.shape[:2], self.features))

  def prepare(self, context: jax.Array) -> dict[str, jax.Array]:
    """Keys and values of `context` `[..., M, D]`, `[..., M, features]`, under their names."""
    _, key, value, _ = self.names
    return {name: getattr(self, name)(context) for name in (key, value)}


class ResnetBlock(nn.Module):
  """Two normalised 3x3 convolutions around a residual; in the UNet with the timestep added."""

  features: int
  groups: int
  epsilon: float
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
    """`x` `[n, H, W, I]`, `time` `[m, E]` float32 or None -> `[max(n, m), H, W, features]`."""
    h = GroupNorm(self.groups, self.epsilon, self.dtype, silu=True, name="norm1")(x)
    h = Conv(self.features, dtype=self.dtype, name="conv1")(h)
    if time is not None:
      time = Dense(self.features, dtype=self.dtype, name="time_emb_proj")(nn.silu(time))
      h = add(h, time[:, None, None])
    h = GroupNorm(self.groups, self.epsilon, self.dtype, silu=True, name="norm2")(h)
    h = Conv(self.features, dtype=self.dtype, name="conv2")(h)
    if x.shape[-1] != self.features:
      x = Conv(self.features, 1, dtype=self.dtype, name="conv_shortcut")(x)
    return add(x, h)


class Upsample(nn.Module):
  """Doubles height and width (nearest neighbour), then convolves."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C]` -> `[B, 2H, 2W, C]`."""
    return Conv(x.shape[-1], dtype=self.dtype, double=True, name="conv")(x)


class Downsample(nn.Module):
  """Halves height and width by a convolution with stride 2 and the given padding."""

  padding: tuple[int, int]
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C]` -> `[B, H/2, W/2, C]`."""
    return Conv(x.shape[-1], stride=2, padding=self.padding, dtype=self.dtype, name="conv")(x)
