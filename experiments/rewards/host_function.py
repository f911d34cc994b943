"""A reward of one's own as a Python function: how warm the colours of a picture are.

experiments/rewards/host_function.flags trains with it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def warmth(
  images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> np.ndarray:
  """Mean of red minus blue, in [-1, 1].

  Args:
    images: `[B, H, W, 3]` float32 in [0, 1].
    prompts: B strings; not used.
    metadata: B dicts, what is known about each prompt; not used.

  Returns:
    `[B]` float32; NaN would say "could not be scored".
  """
  del prompts, metadata
  return np.mean(images[..., 0] - images[..., 2], axis=(1, 2))
