"""A stand-in for a safety classifier: how sure it is that a picture shows no large red area.

experiments/rewards/combination.flags uses it as a veto. Put your own classifier in its place.
"""

import jax
import jax.numpy as jnp


def safe(images: jax.Array) -> jax.Array:
  """`[B, H, W, 3]` float32 in [0, 1] -> `[B]` in [0, 1]: 1 - 2 * (share of strongly red pixels)."""
  red, green, blue = jnp.moveaxis(images, -1, 0)
  strongly_red = (red > 0.5) & (red > 1.5 * green) & (red > 1.5 * blue)
  return jnp.clip(1 - 2 * strongly_red.mean(axis=(1, 2)), 0, 1)
