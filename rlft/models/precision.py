"""Parameters in the type that a network computes in."""

from typing import Any

import jax
import jax.numpy as jnp

# Modules that compute in float32 whatever the type of the network.
_FLOAT32 = ("time_embedding", "add_embedding")


def cast(params: Any, dtype: Any) -> Any:
  """What a UNet that computes in `dtype` reads; half the size, and half to send, in bfloat16.

  Kernels are rounded, as the layers would do with them. Scales and biases stay: they are small,
  and norms are float32.
  """

  def leaf(path, x):
    if x.ndim < 2 or jax.tree_util.keystr(path[:1], simple=True) in _FLOAT32:
      return x
    return x.astype(dtype)

  return params if dtype == jnp.float32 else jax.tree_util.tree_map_with_path(leaf, params)
