"""JPEG compressibility: a reward that cannot be differentiated, and the example of a host reward.

Source: the task "compressibility" of DDPO (arXiv 2305.13301).
"""

from collections.abc import Mapping, Sequence
import io
from typing import Any

import numpy as np
from PIL import Image

from rlft.storage import images as images_lib
from rlft.types import HostReward

QUALITY = 95


def compressibility(
  images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> np.ndarray:
  """Minus the size of each image as a JPEG file of quality 95, in kilobytes (1000 bytes).

  Args:
    images: `[B, H, W, 3]` float32 in [0, 1].
    prompts: not used.
    metadata: not used.

  Returns:
    `[B]` float32; NaN for an image with a pixel that is not finite.
  """
  del prompts, metadata
  return np.array([-_kilobytes(image) for image in images], np.float32)


def _kilobytes(image: np.ndarray) -> float:
  if not np.isfinite(image).all():
    return np.nan
  file = io.BytesIO()
  Image.fromarray(images_lib.to_uint8(image)).save(file, format="JPEG", quality=QUALITY)
  return file.tell() / 1000


def jpeg() -> HostReward:
  """The reward 'jpeg'."""
  return HostReward("jpeg", compressibility)
