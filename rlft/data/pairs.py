"""Images with captions for the pretraining loss (the L_pre of arXiv 2401.12244)."""

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import os

import numpy as np
from PIL import Image, ImageOps

from rlft.data import prompts
from rlft.data import shuffle as order
from rlft.types import UserError

_METADATA = "metadata.jsonl"
_STREAM = 2**31  # of the order; tasks have 0, 1, ...
_DECODERS = 8  # threads; PIL decodes without holding the interpreter's lock


@dataclasses.dataclass(frozen=True)
class Pairs:
  """N images with captions.

  Attributes:
    captions: N texts.
    images: indices -> `[len(indices), S, S, 3]` uint8; a folder's images are read when asked for,
      and one that cannot be decoded is a UserError.
  """

  captions: Sequence[str]
  images: Callable[[Sequence[int] | np.ndarray], np.ndarray]

  def __len__(self) -> int:
    return len(self.captions)


def load_folder(folder: str, *, size: int) -> Pairs:
  """Opens a folder of images with captions.

  Args:
    folder: images and a metadata.jsonl of lines `{"file_name": ..., "text": ...}`; file names are
      relative to the folder.
    size: S, side of the images in pixels; they are scaled to fill the square and cut to its centre.

  Raises:
    UserError: the folder does not exist, cannot be read or is empty.
  """
  check_folder(folder)
  folder = os.path.expanduser(folder)
  paths, captions = [], []
  listing = os.path.join(folder, _METADATA)
  with prompts.reading(listing):
    for row in prompts.json_rows(listing, ("file_name", "text")):
      paths.append(os.path.join(folder, row["file_name"]))
      captions.append(row["text"])
  if not paths:
    raise UserError(f"{listing} is empty: add a line for each image")
  missing = [path for path in paths if not os.path.isfile(path)]
  if missing:
    raise UserError(
      f"{listing} names {len(missing)} of {len(paths)} images that do not exist, first "
      f"{missing[0]}: add them or remove their lines"
    )

  def images(indices: Sequence[int] | np.ndarray) -> np.ndarray:
    with futures.ThreadPoolExecutor(_DECODERS) as pool:
      decoded = list(pool.map(lambda i: _decode(paths[i], size), indices))
    return np.stack(decoded) if decoded else np.empty((0, size, size, 3), np.uint8)

  return Pairs(captions=captions, images=images)


def check_folder(folder: str) -> None:
  """Checks that `load_folder` can find the folder's list of images, without reading it.

  Raises:
    UserError: as `load_folder`.
  """
  if not os.path.isfile(os.path.join(os.path.expanduser(folder), _METADATA)):
    raise UserError(
      f"--pretrain_data={folder} has no {_METADATA}: give emoji, or a folder with images and a "
      f'{_METADATA} of lines {{"file_name": ..., "text": ...}}'
    )


def pair_indices(seed: int, iteration: int, *, count: int, size: int) -> np.ndarray:
  """Which pairs an iteration sees: `[count]` int64 in [0, size); see `order.batch_indices`."""
  return order.batch_indices(seed, _STREAM, iteration, count=count, size=size)


def _decode(path: str, size: int) -> np.ndarray:
  """An image file as `[size, size, 3]` uint8, upright, on white where it is transparent."""
  try:
    with Image.open(path) as file:
      image = ImageOps.exif_transpose(file).convert("RGBA")
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    raise UserError(
      f"image {path} cannot be decoded ({error}): replace it or remove its line from {_METADATA}"
    ) from error
  white = Image.new("RGBA", image.size, "white")
  image = Image.alpha_composite(white, image).convert("RGB")
  return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))
