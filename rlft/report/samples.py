"""Samples kept during training: the same prompts and seeds at every evaluation, for the report."""

import base64
from collections.abc import Sequence
import dataclasses
import io
import itertools
import json
import os

import numpy as np
import PIL.Image

from rlft.evaluation import summary
from rlft.storage import files
from rlft.storage import images as images_lib
from rlft.types import Prompt

GRIDS_DIRECTORY = "grids"

PIXELATED = 64  # images up to this height are enlarged as squares, larger ones may be reduced
# Times that are shown and the height of an image: what is tried until the page is small enough.
_SIZES = ((12, 512), (8, 512), (8, 384), (6, 256), (4, 256), (4, 128), (2, 128))
_ACROSS = 4  # images side by side for one prompt
_PAD = 1


@dataclasses.dataclass(frozen=True)
class Sheet:
  """The samples of one evaluation at one iteration.

  Attributes:
    iteration: when they were drawn.
    prompts: one text for each cell.
    cells: uint8 `[h, w, 3]` each; a cell holds all kept images of its prompt.
    image_size: height of one image in pixels.
    across: images side by side in a cell.
  """

  iteration: int
  prompts: tuple[str, ...]
  cells: tuple[np.ndarray, ...]
  image_size: int
  across: int


@dataclasses.dataclass(frozen=True)
class Keeper:
  """Keeps the first images of some of the prompts of each evaluation.

  The prompts are evenly spread over the list, always the same.

  Attributes:
    workdir: the run's directory.
    iteration: number of finished iterations; at least 0.
    max_prompts: cells to keep at most; 0 keeps nothing.
    images_per_prompt: images in a cell at most.
  """

  workdir: str | os.PathLike[str]
  iteration: int
  max_prompts: int = 8
  images_per_prompt: int = 8

  def choose(self, prompts: Sequence[Prompt]) -> list[int]:
    """The places of the images to keep; of equal prompts that follow each other, the first."""
    return [place for _, places in self._cells(prompts) for place in places]

  def save(self, name: str, images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> None:
    """Writes `grids/<name>/<iteration>.png`, and the prompts to a `.json` beside it.

    Args:
      name: of the evaluation.
      images: those at `choose(prompts)`, `[H, W, 3]` uint8 each.
      prompts: of all images of the evaluation.

    Raises:
      UserError: the files cannot be written.
    """
    cells = self._cells(prompts)
    if not cells:
      return
    rows = np.reshape(images, (len(cells), -1, *images[0].shape))
    across = min(rows.shape[1], _ACROSS)
    sheet = np.concatenate([images_lib.grid(row, across, pad=_PAD) for row in rows])
    path = files.path_of(self.workdir) / GRIDS_DIRECTORY / name / f"{self.iteration:06d}.png"
    about = {"prompts": [text for text, _ in cells], "image_size": rows.shape[2], "across": across}
    # The picture comes last: where it is, its text is too.
    files.write_atomic(path.with_suffix(".json"), json.dumps(about) + "\n")
    images_lib.save_png(path, sheet)

  def _cells(self, prompts: Sequence[Prompt]) -> list[tuple[str, list[int]]]:
    """The text of each cell and the places of its images, as many in each."""
    runs = itertools.groupby(range(len(prompts)), key=lambda place: prompts[place].text)
    runs = [(text, list(places)) for text, places in runs]
    spread = np.linspace(0, len(runs) - 1, min(self.max_prompts, len(runs)))
    cells = [runs[place] for place in spread.astype(int)]
    # Every cell has the same size, that of the shortest run.
    count = min([self.images_per_prompt, *(len(places) for _, places in cells)])
    return [(text, places[:count]) for text, places in cells]


def read_samples(workdir: str | os.PathLike[str]) -> dict[str, list[Sheet]]:
  """The kept samples by evaluation, oldest first.

  Only those of the newest prompts, if they changed during the run. A file that cannot be read is
  left out: a report without a picture is better than none.
  """
  found = {}
  grids = files.path_of(workdir) / GRIDS_DIRECTORY
  directories = sorted(path for path in grids.iterdir() if path.is_dir()) if grids.is_dir() else ()
  for directory in directories:
    pictures = sorted(path for path in directory.iterdir() if path.suffix == ".png")
    sheets = [sheet for path in pictures if (sheet := _read(path))]
    if sheets:
      found[directory.name] = [s for s in sheets if s.prompts == sheets[-1].prompts]
  return found


def read_sheets(workdir: str | os.PathLike[str], iteration: int) -> dict[str, Sheet]:
  """The kept samples of one iteration by evaluation; a file that cannot be read is left out."""
  grids = files.path_of(workdir) / GRIDS_DIRECTORY
  names = sorted(path.name for path in grids.iterdir()) if grids.is_dir() else ()
  found = {name: _read(grids / name / f"{iteration:06d}.png") for name in names}
  return {name: sheet for name, sheet in found.items() if sheet}


def _read(path: files.Path) -> Sheet | None:
  try:
    about = json.loads(path.with_suffix(".json").read_text())
    with PIL.Image.open(io.BytesIO(path.read_bytes())) as picture:
      pixels = np.asarray(picture.convert("RGB"))
    prompts = tuple(about["prompts"])
    cells = tuple(np.split(pixels, len(prompts)))
    return Sheet(int(path.stem), prompts, cells, about["image_size"], about["across"])
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return None


@dataclasses.dataclass(frozen=True)
class Picture:
  """A cell at one time; `data` is a data URI."""

  iteration: int
  time: str
  data: str


@dataclasses.dataclass(frozen=True)
class Gallery:
  """The pictures of one evaluation, as the page shows them.

  Attributes:
    name: of the evaluation.
    iterations: at which there are pictures, the first first.
    rows: a prompt and its pictures, one for each of `iterations`.
    width: of a picture in CSS pixels, as it is shown first.
    pixelated: whether pixels are shown as squares.
  """

  name: str
  iterations: tuple[int, ...]
  rows: tuple[tuple[str, tuple[Picture, ...]], ...]
  width: int
  pixelated: bool


def galleries(workdir: str | os.PathLike[str], *, budget: int) -> list[Gallery]:
  """The kept samples of each evaluation: a row for each prompt, a picture for each time.

  Args:
    workdir: the run's directory.
    budget: bytes of all pictures together, in base64; fewer times are shown, and smaller pictures,
      until they fit.
  """
  sheets = read_samples(workdir)
  found: list[Gallery] = []
  for times, side in _SIZES:
    found = [_gallery(name, _spread(kept, times), side) for name, kept in sheets.items()]
    pictures = (picture for one in found for _, row in one.rows for picture in row)
    if sum(len(picture.data) for picture in pictures) <= budget:
      break
  return found


def _gallery(name: str, sheets: Sequence[Sheet], side: int) -> Gallery:
  # A row for each time, turned round.
  encoded = zip(*(_encode(sheet, side) for sheet in sheets), strict=True)
  first = sheets[0]
  return Gallery(
    name=name,
    iterations=tuple(sheet.iteration for sheet in sheets),
    rows=tuple(
      (
        prompt,
        tuple(
          Picture(sheet.iteration, summary.when(sheet.iteration), data)
          for sheet, data in zip(sheets, row, strict=True)
        ),
      )
      for prompt, row in zip(first.prompts, encoded, strict=True)
    ),
    # In a cell of several images each is smaller, so that a phone shows a whole set.
    width=(128 if first.across == 1 else 56) * first.across,
    pixelated=first.image_size <= PIXELATED,
  )


def _spread(sheets: Sequence[Sheet], count: int) -> list[Sheet]:
  """At most `count` of the sheets, evenly spread, with the first and the last."""
  count = min(count, len(sheets))
  chosen = np.unique(np.linspace(0, len(sheets) - 1, count).round().astype(int))
  return [sheets[index] for index in chosen]


def _encode(sheet: Sheet, side: int) -> list[str]:
  """The cells as data URIs."""
  cells = [cell[_PAD:-_PAD, _PAD:-_PAD] for cell in sheet.cells]  # The page has margins of its own.
  return [data_uri(cell, sheet.image_size, side) for cell in cells]


def data_uri(cell: np.ndarray, image_size: int, side: int) -> str:
  """A cell as a data URI: small pictures exactly, larger ones of `side` pixels at most.

  Args:
    cell: uint8 `[h, w, 3]`.
    image_size: height of one image in it.
    side: the same, on the page.
  """
  if image_size <= PIXELATED:
    kind, content = "png", images_lib.encode_png(cell)
  else:
    picture, buffer = PIL.Image.fromarray(cell), io.BytesIO()
    factor = min(side / image_size, 1)
    size = [max(round(length * factor), 1) for length in picture.size]
    picture.resize(size, PIL.Image.Resampling.LANCZOS).save(buffer, format="JPEG", quality=85)
    kind, content = "jpeg", buffer.getvalue()
  return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
