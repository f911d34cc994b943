"""The operations that the networks call: on CPUs in forms of their own, elsewhere plain.

Which form runs is decided when a program is lowered: what is lowered for a TPU or a GPU, on
whatever machine, holds the plain operations. The forms of CPUs are for float32; those in other
types are plain, but for the gradients of convolutions.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rlft.models import plain
from rlft.models.cpu import convolution, ops


def on_cpu(
  cpu: Callable[..., jax.Array], elsewhere: Callable[..., jax.Array], *args: jax.Array
) -> jax.Array:
  """`cpu(*args)` on CPUs if all `args` are float32, otherwise `elsewhere(*args)`."""
  if any(x.dtype != jnp.float32 for x in args):
    return elsewhere(*args)
  return jax.lax.platform_dependent(*args, cpu=cpu, default=elsewhere)


@functools.cache
def fixed(form: Callable[..., jax.Array], *args: Any, **named: Any) -> Callable[..., jax.Array]:
  """`functools.partial`, the same for the same arguments: JAX traces it once for each shape."""
  return functools.partial(form, *args, **named)


def dense_product(
  x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any
) -> jax.Array:
  """`x` `[..., I]` times `kernel` `[I, O]`, for `nn.Dense`, which gives more arguments."""
  product = fixed(jax.lax.dot_general, dimension_numbers=dimension_numbers, **options)
  return on_cpu(ops.product, product, x, kernel)


def conv2d(x: jax.Array, kernel: jax.Array, *, stride: int, padding: plain.Padding) -> jax.Array:
  """Convolves `x` `[B, H, W, I]` with `kernel` `[h, w, I, O]`; every convolution is made here."""
  if kernel.shape[:2] == (1, 1) and stride == 1:
    return on_cpu(ops.product, jnp.matmul, x, kernel[0, 0])
  settings = stride, tuple(map(tuple, padding))
  cpu, default = (fixed(form, *settings) for form in (convolution.conv2d, plain.conv2d))
  return jax.lax.platform_dependent(x, kernel, cpu=cpu, default=default)


def upsample_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Doubles height and width (nearest neighbour), then convolves, keeping the size.

  Args:
    x: `[B, H, W, I]`.
    kernel: `[3, 3, I, O]`.

  Returns:
    `[B, 2H, 2W, O]`.
  """
  return on_cpu(convolution.upsample_conv, _upsample_conv, x, kernel)


def _upsample_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  b, h, w, c = x.shape
  x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
  return conv2d(x, kernel, stride=1, padding=((1, 1), (1, 1)))


def group_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array, *, groups: int, epsilon: float, silu: bool
) -> jax.Array:
  """Group normalisation (https://arxiv.org/abs/1803.08494), then x sigmoid(x) if `silu`.

  Args:
    x: `[B, H, W, C]` float32.
    scale, bias: `[C]` float32.
    groups: must divide C.
    epsilon: is added to the variance.
    silu: whether the activation follows.

  Returns:
    As `x`.
  """
  cpu, default = (fixed(form, groups, epsilon, silu) for form in (ops.group_norm, plain.group_norm))
  return on_cpu(cpu, default, x, scale, bias)


def gated_gelu(x: jax.Array) -> jax.Array:
  """First half of the channels times GELU of the second: `[..., 2 F]` -> `[..., F]`.

  GELU(g) = g (1 + erf(g / sqrt 2)) / 2, as PyTorch computes it.
  """
  return on_cpu(ops.gated_gelu, plain.gated_gelu, x)
