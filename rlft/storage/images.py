"""Pictures as arrays of bytes: grids and PNG files."""

import io
import os

import numpy as np
import PIL.Image
import PIL.ImageOps

from rlft.storage import files

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # of files of pictures, in small letters

_BACKGROUND = 255


def to_uint8(images: np.ndarray) -> np.ndarray:
  """Converts `[..., H, W, 3]` images, uint8 or float in [0, 1], to uint8.

  Floats outside [0, 1] are clipped; NaN, which a diverged model paints, becomes black.

  Raises:
    ValueError: another shape or type.
  """
  images = np.asarray(images)
  if images.ndim < 3 or images.shape[-1] != 3:
    raise ValueError(f"expected images [..., H, W, 3], got {list(images.shape)}")
  if images.dtype == np.uint8:
    return images
  # bfloat16 is no subtype of NumPy's floating.
  if images.dtype.kind not in "fV":
    raise ValueError(f"expected images in uint8 or float in [0, 1], got {images.dtype}")
  unit = np.clip(np.nan_to_num(images.astype(np.float32), nan=0.0), 0, 1)
  return np.round(unit * 255).astype(np.uint8)


def upright(path: str | os.PathLike[str]) -> PIL.Image.Image:
  """An image file as RGB of 8 bits, turned as its EXIF data say, on white where it is transparent.

  Raises:
    Exception: of whatever kind a decoder raises; ValueError if nobody says what is white in it.
  """
  with PIL.Image.open(path) as file:
    image = _with_8_bits(PIL.ImageOps.exif_transpose(file)).convert("RGBA")
  white = PIL.Image.new("RGBA", image.size, "white")
  return PIL.Image.alpha_composite(white, image).convert("RGB")


def _with_8_bits(image: PIL.Image.Image) -> PIL.Image.Image:
  """An image whose values are at most 255, where Pillow would cut off what is above.

  Raises:
    ValueError: of 32 bits nobody says what is white.
  """
  if image.mode.startswith("I;16"):
    values = np.asarray(image).astype(np.uint32)
    return PIL.Image.fromarray(((values + 128) // 257).astype(np.uint8))
  if image.mode in ("I", "F"):
    raise ValueError("its pixels have 32 bits: save it with 8 or 16")
  return image


def grid(images: np.ndarray, columns: int, *, scale: int = 1, pad: int = 2) -> np.ndarray:
  """Lays images out in rows, from left to right and from the top down.

  Args:
    images: `[N, H, W, 3]`, uint8 or float in [0, 1]; N >= 1.
    columns: images in a row; the last row is filled up with white.
    scale: whole factor of enlargement; pixels become squares.
    pad: white pixels around each image, after enlargement.

  Returns:
    `[rows * (scale * H + pad) + pad, columns * (scale * W + pad) + pad, 3]` uint8.

  Raises:
    ValueError: no images, or a shape, type or size out of range.
  """
  images = to_uint8(images)
  if images.ndim != 4 or not len(images):
    raise ValueError(f"expected images [N, H, W, 3] with N >= 1, got {list(images.shape)}")
  if columns < 1 or scale < 1 or pad < 0:
    raise ValueError(f"expected columns, scale >= 1 and pad >= 0, got {columns}, {scale}, {pad}")
  images = images.repeat(scale, axis=1).repeat(scale, axis=2)
  _, height, width, _ = images.shape
  rows = -(-len(images) // columns)
  cells = np.full((rows * columns, height + pad, width + pad, 3), _BACKGROUND, np.uint8)
  cells[: len(images), :height, :width] = images
  cells = cells.reshape(rows, columns, height + pad, width + pad, 3).swapaxes(1, 2)
  joined = cells.reshape(rows * (height + pad), columns * (width + pad), 3)
  return np.pad(joined, ((pad, 0), (pad, 0), (0, 0)), constant_values=_BACKGROUND)


def encode_png(image: np.ndarray) -> bytes:
  """A PNG file's content for one image `[H, W, 3]`, uint8 or float in [0, 1]."""
  buffer = io.BytesIO()
  PIL.Image.fromarray(to_uint8(image)).save(buffer, format="PNG", optimize=True)
  return buffer.getvalue()


def save_png(path: str | os.PathLike[str], image: np.ndarray) -> None:
  """Writes one image `[H, W, 3]`, uint8 or float in [0, 1], atomically.

  Raises:
    UserError: the file cannot be written.
  """
  files.write_atomic(path, encode_png(image))
