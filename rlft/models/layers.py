"""Layers that the UNet, the VAE and the text encoder share; channels last, parameters float32.

Every layer has a `dtype`, the type it computes in. Means, variances and softmaxes are float32
whatever the `dtype`. Parameter names and shapes are those of the Flax classes of diffusers 0.39.
"""

from collections.abc import Sequence

from flax import linen as nn
import jax
import jax.numpy as jnp

Padding = Sequence[tuple[int, int]]


def conv2d(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding) -> jax.Array:
  """Convolves `x` `[B, H, W, I]` with `kernel` `[h, w, I, O]`; every convolution is made here."""
  if kernel.shape[:2] == (1, 1) and stride == 1:
    return x @ kernel[0, 0]
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


class Conv(nn.Module):
  """2-D convolution with the parameters of `nn.Conv`: `kernel` `[k, k, I, O]`, `bias` `[O]`.

  `padding` is what to add (before, after) to both height and width; `None` keeps the size.
  """

  features: int
  kernel_size: int = 3
  stride: int = 1
  padding: tuple[int, int] | None = None
  dtype: jnp.dtype = jnp.float32

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
    return conv2d(x, kernel, stride=self.stride, padding=(padding, padding)) + bias


class GroupNorm(nn.Module):
  """Group normalisation (https://arxiv.org/abs/1803.08494) with float32 statistics.

  The spatial axes are reduced first, to `[B, C]`, and what is left is one multiply-add a value.
  """

  groups: int
  epsilon: float
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C]` -> the same shape."""
    batch, channels = x.shape[0], x.shape[-1]
    scale = self.param("scale", nn.initializers.ones_init(), (channels,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros_init(), (channels,), jnp.float32)
    x = x.astype(jnp.float32)
    grouped = (batch, self.groups, channels // self.groups)
    mean_c = x.mean((1, 2))
    mean = mean_c.reshape(grouped).mean(-1, keepdims=True)
    # Distances from the mean, not E[x^2] - E[x]^2, which cancels where |mean| >> deviation.
    offset = jnp.broadcast_to(mean, grouped).reshape(batch, 1, 1, channels)
    variance = jnp.square(x - offset).mean((1, 2)).reshape(grouped).mean(-1, keepdims=True)
    factor = jnp.broadcast_to(jax.lax.rsqrt(variance + self.epsilon), grouped)
    factor = factor.reshape(batch, 1, 1, channels) * scale
    return ((x - offset) * factor + bias).astype(self.dtype)


def attention(
  query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
  """softmax(q k^T / sqrt(D)) v for `[B, N, heads, D]`, `[B, M, heads, D]` twice.

  `mask`, if given, is boolean and broadcasts to `[B, heads, N, M]`; False forbids. Logits and
  softmax are float32.
  """
  # Heads go beside the batch by hand: XLA's CPU products are a tenth slower otherwise.
  query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
  logits = jnp.einsum("bhnd,bhmd->bhnm", query, key, preferred_element_type=jnp.float32)
  logits *= query.shape[-1] ** -0.5
  if mask is not None:
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
  return jnp.einsum("bhnm,bhmd->bhnd", weights, value).transpose(0, 2, 1, 3)


class Attention(nn.Module):
  """Multi-head attention.

  Attributes:
    heads: number of heads; must divide `features`.
    features: channels of query, key, value and output.
    names: parameter names of the query, key, value and output projections.
    bias: whether query, key and value have a bias (the output always has).
    dtype: type of the computation.
  """

  heads: int
  features: int
  names: tuple[str, str, str, str] = ("to_q", "to_k", "to_v", "to_out_0")
  bias: bool = False
  dtype: jnp.dtype = jnp.float32
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  out_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(
    self, x: jax.Array, context: jax.Array | None = None, mask: jax.Array | None = None
  ) -> jax.Array:
    """`x` `[B, N, C]` attends to `context` `[B, M, D]`, or to itself -> `[B, N, features]`."""

    def project(name: str, inputs: jax.Array) -> jax.Array:
      dense = nn.Dense(
        self.features,
        use_bias=self.bias,
        dtype=self.dtype,
        kernel_init=self.kernel_init,
        name=name,
      )
      return dense(inputs).reshape(*inputs.shape[:2], self.heads, -1)

    context = x if context is None else context
    query = project(self.names[0], x)
    key, value = project(self.names[1], context), project(self.names[2], context)
    y = attention(query, key, value, mask).reshape(*x.shape[:2], self.features)
    return nn.Dense(self.features, dtype=self.dtype, kernel_init=self.out_init, name=self.names[3])(
      y
    )


class ResnetBlock(nn.Module):
  """Two normalised 3x3 convolutions around a residual; in the UNet with the timestep added."""

  features: int
  groups: int
  epsilon: float
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
    """`x` `[B, H, W, I]`, `time` `[B, E]` float32 or None -> `[B, H, W, features]`."""
    h = GroupNorm(self.groups, self.epsilon, self.dtype, name="norm1")(x)
    h = Conv(self.features, dtype=self.dtype, name="conv1")(nn.silu(h))
    if time is not None:
      time = nn.Dense(self.features, dtype=self.dtype, name="time_emb_proj")(nn.silu(time))
      h = h + time[:, None, None]
    h = GroupNorm(self.groups, self.epsilon, self.dtype, name="norm2")(h)
    h = Conv(self.features, dtype=self.dtype, name="conv2")(nn.silu(h))
    if x.shape[-1] != self.features:
      x = Conv(self.features, 1, dtype=self.dtype, name="conv_shortcut")(x)
    return x + h


class Upsample(nn.Module):
  """Doubles height and width (nearest neighbour), then convolves."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C]` -> `[B, 2H, 2W, C]`."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
    return Conv(c, dtype=self.dtype, name="conv")(x)


class Downsample(nn.Module):
  """Halves height and width by a convolution with stride 2 and the given padding."""

  padding: tuple[int, int]
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C]` -> `[B, H/2, W/2, C]`."""
    return Conv(x.shape[-1], stride=2, padding=self.padding, dtype=self.dtype, name="conv")(x)
