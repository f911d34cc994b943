"""The plain forms of operations, which XLA makes fast on accelerators.

`dispatch` chooses between these and the forms in `cpu/`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Padding = Sequence[tuple[int, int]]  # (before, after) of height and of width


def conv2d(
  stride: int, padding: Padding, x: jax.Array, kernel: jax.Array, **dilation: Any
) -> jax.Array:
  """`x` `[B, H, W, I]` convolved with `kernel` `[h, w, I, O]`, of one type."""
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **dilation
  )


def group_norm(
  groups: int, epsilon: float, silu: bool, x: jax.Array, scale: jax.Array, bias: jax.Array
) -> jax.Array:
  """See `dispatch.group_norm`."""
  batch, channels = x.shape[0], x.shape[-1]
  grouped = (batch, groups, channels // groups)
  # The spatial axes are reduced first, to [B, C], and what is left is one multiply-add a value.
  mean = x.mean((1, 2)).reshape(grouped).mean(-1, keepdims=True)
  # Distances from the mean, not E[x^2] - E[x]^2, which cancels where |mean| >> deviation.
  offset = jnp.broadcast_to(mean, grouped).reshape(batch, 1, 1, channels)
  variance = jnp.square(x - offset).mean((1, 2)).reshape(grouped).mean(-1, keepdims=True)
  factor = jnp.broadcast_to(jax.lax.rsqrt(variance + epsilon), grouped)
  factor = factor.reshape(batch, 1, 1, channels) * scale
  y = (x - offset) * factor + bias
  return jax.nn.silu(y) if silu else y


def gated_gelu(x: jax.Array) -> jax.Array:
  """See `dispatch.gated_gelu`."""
  x, gate = jnp.split(x, 2, axis=-1)
  return x * jax.nn.gelu(gate, approximate=False)
