"""Images with captions for the pretraining loss (the L_pre of arXiv 2401.12244)."""

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import hashlib
import os

import numpy as np
from PIL import Image, ImageOps

from rlft.data import lines
from rlft.data import shuffle as order
from rlft.storage import files
from rlft.storage import images as images_lib
from rlft.types import UserError

_METADATA = "metadata.jsonl"
_STREAM = 2**31  # of the order; tasks have 0, 1, ...
_DECODERS = 8  # threads; PIL decodes without holding the interpreter's lock


class ImageError(UserError):
  """An image of the list cannot be read."""


@dataclasses.dataclass(frozen=True)
class Pairs:
  """N images with captions.

  Attributes:
    captions: N texts.
    read: indices -> images `[n, H, W, 3]` uint8, and where they come from `[n, 4]` int32: height
      and width of the original, and the first row and column of what was cut out of it after it was
      scaled. A folder's images are read when asked for, and one that cannot be decoded is a
      UserError.
    digest: of a folder's list, by which it is told from another; '' where nothing can change.
  """

  captions: Sequence[str]
  read: Callable[[Sequence[int] | np.ndarray], tuple[np.ndarray, np.ndarray]]
  digest: str = ""

  def __len__(self) -> int:
    return len(self.captions)


def load_folder(folder: str, *, size: tuple[int, int]) -> Pairs:
  """Opens a folder of images with captions.

  Args:
    folder: images and a metadata.jsonl of lines `{"file_name": ..., "text": ...}`; file names are
      relative to the folder.
    size: (H, W) in pixels; images are scaled to fill it and cut to their centre.

  Raises:
    UserError: the folder does not exist, cannot be read, is empty or names what is not in it.
  """
  check_folder(folder)
  folder = files.staged(folder)
  paths, captions = [], []
  listing = os.path.join(folder, _METADATA)
  with lines.reading(listing):
    for _, _, row in lines.json_rows(listing, ("file_name", "text")):
      _check_inside(listing, row["file_name"])
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

  def read(indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with futures.ThreadPoolExecutor(_DECODERS) as pool:
      decoded = list(pool.map(lambda i: _decode(paths[i], size), indices))
    images, sources = [image for image, _ in decoded], [source for _, source in decoded]
    return np.reshape(images, (-1, *size, 3)).astype(np.uint8), np.reshape(sources, (-1, 4)).astype(
      np.int32
    )

  with lines.reading(listing), open(listing, "rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  return Pairs(captions=captions, read=read, digest=digest)


def _check_inside(listing: str, name: str) -> None:
  """Refuses a name that leaves the folder: a list that others made must not choose what is read.

  A link within the folder leads where its owner wants.
  """
  if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
    raise UserError(
      f"{listing} names {name!r}, which is not in its folder: move the image there, or link to it"
    )


def check_folder(folder: str) -> None:
  """Checks that `load_folder` can find the folder's list of images, without reading it.

  Raises:
    UserError: as `load_folder`.
  """
  path = files.staged(folder)
  if not os.path.isfile(os.path.join(path, _METADATA)):
    raise UserError(
      f"--pretrain_data={folder} has no {_METADATA}: give emoji, or a folder with images and a "
      f'{_METADATA} of lines {{"file_name": ..., "text": ...}}'
    )


def pair_indices(seed: int, iteration: int, *, count: int, size: int) -> np.ndarray:
  """Which pairs an iteration sees: `[count]` int64 in [0, size); see `order.batch_indices`."""
  return order.batch_indices(seed, _STREAM, iteration, count=count, size=size)


def _decode(path: str, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int, int, int]]:
  """An image file as `[*size, 3]` uint8, upright, on white where it is transparent; see `Pairs`."""
  try:
    image = images_lib.upright(path)
  except Exception as error:  # Decoders of two dozen formats raise what they like.
    reason = " ".join(str(error).split()) or type(error).__name__
    raise ImageError(
      f"image {path} cannot be decoded ({reason}): replace it or remove its line from {_METADATA}"
    ) from error
  height, width = size
  scale = max(height / image.height, width / image.width)
  top, left = round((scale * image.height - height) / 2), round((scale * image.width - width) / 2)
  cut = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
  return np.asarray(cut), (image.height, image.width, top, left)
