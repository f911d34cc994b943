"""The operations that the networks call: on CPUs in forms of their own, elsewhere plain.

Which form runs is decided when a program is traced, for the devices that JAX would run it on;
whoever compiles for others traces within `for_platform`. (`jax.lax.platform_dependent` would decide
when it is lowered, but both forms would be traced and differentiated, which takes twice as long.)
The forms of CPUs are for float32; those in other types are plain, but for the gradients of
convolutions.
"""

from collections.abc import Callable
import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rlft.models import plain
from rlft.models.cpu import convolution, ops


def for_platform(platform: str) -> contextlib.AbstractContextManager[Any]:
  """Programs that are traced within it are for "cpu", "tpu" or "cuda".

  It is part of what JAX keeps traces by, so a program may be traced for several. Only trace in it:
  for JAX it is the default device, which may not be here to run or lower anything on.
  """
  return jax.default_device("gpu" if platform == "cuda" else platform)


def is_for_cpus() -> bool:
  """Whether what is being traced is for CPUs."""
  device = jax.config.jax_default_device
  if device is None:
    return jax.default_backend() == "cpu"
  return (device if isinstance(device, str) else device.platform) == "cpu"


def on_cpu(
  cpu: Callable[..., jax.Array], elsewhere: Callable[..., jax.Array], *args: jax.Array
) -> jax.Array:
  """`cpu(*args)` on CPUs if all `args` are float32, otherwise `elsewhere(*args)`."""
  is_float32 = all(x.dtype == jnp.float32 for x in args)
  return cpu(*args) if is_float32 and is_for_cpus() else elsewhere(*args)


def dense_product(
  x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any
) -> jax.Array:
  """`x` `[..., I]` times `kernel` `[I, O]`, for `nn.Dense`, which gives more arguments."""
  product = functools.partial(jax.lax.dot_general, dimension_numbers=dimension_numbers, **options)
  return on_cpu(ops.product, product, x, kernel)


def conv2d(x: jax.Array, kernel: jax.Array, *, stride: int, padding: plain.Padding) -> jax.Array:
  """Convolves `x` `[B, H, W, I]` with `kernel` `[h, w, I, O]`; every convolution is made here."""
  if kernel.shape[:2] == (1, 1) and stride == 1:
    return on_cpu(ops.product, jnp.matmul, x, kernel[0, 0])
  form = convolution.conv2d if is_for_cpus() else plain.conv2d
  return form(stride, tuple(map(tuple, padding)), x, kernel)


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
  cpu, elsewhere = (
    functools.partial(form, groups, epsilon, silu) for form in (ops.group_norm, plain.group_norm)
  )
  return on_cpu(cpu, elsewhere, x, scale, bias)


def gated_gelu(x: jax.Array) -> jax.Array:
  """First half of the channels times GELU of the second: `[..., 2 F]` -> `[..., F]`.

  GELU(g) = g (1 + erf(g / sqrt 2)) / 2, as PyTorch computes it.
  """
  return on_cpu(ops.gated_gelu, plain.gated_gelu, x)
