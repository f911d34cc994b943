"""A reward of one's own in JAX: colours that suit what the prompt names, warm or cold.

experiments/rewards/jax_function.flags trains with it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

COLD = frozenset({"boat", "diamond", "fish", "frog", "octopus", "penguin", "robot", "turtle"})


def prepare(prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> np.ndarray:
  """What the score needs to know about each prompt: runs in Python, while images are drawn.

  Args:
    prompts: B strings; not used.
    metadata: B dicts; 'objects' lists what the prompt names.

  Returns:
    `[B]` float32: -1 where the prompt names something cold, else 1.
  """
  del prompts
  return np.array([-1 if COLD & set(known.get("objects", ())) else 1 for known in metadata], "f4")


def suits(images: jax.Array, features: jax.Array) -> jax.Array:
  """Mean of red minus blue, for cold things of blue minus red; in [-1, 1].

  Args:
    images: `[B, H, W, 3]` float32 in [0, 1]; those of all devices.
    features: `[B]`, what `prepare` returned.

  Returns:
    `[B]`.
  """
  return features * jnp.mean(images[..., 0] - images[..., 2], axis=(1, 2))


suits.prepare = prepare
