"""A reward that asks to be hacked: it pays for saturated colours and for nothing else.

experiments/rewards/saturation.flags trains with it, beside a judge.
"""

import jax
import jax.numpy as jnp


def saturation(images: jax.Array) -> jax.Array:
  """Mean of the greatest minus the least of each pixel's colours, in [0, 1].

  Args:
    images: `[B, H, W, 3]` float32 in [0, 1].

  Returns:
    `[B]`.
  """
  return jnp.mean(jnp.max(images, axis=-1) - jnp.min(images, axis=-1), axis=(1, 2))
