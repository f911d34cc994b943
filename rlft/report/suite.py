"""The page of a suite: several models side by side, in tables and in pictures; one file."""

import base64
from collections.abc import Mapping, Sequence
import dataclasses
import io

import numpy as np
import PIL.Image

from rlft.evaluation import side_by_side, statistics
from rlft.evaluation.side_by_side import Row
from rlft.evaluation.tables import Table
from rlft.report.render import render
from rlft.report.samples import Sheet
from rlft.storage import images as images_lib

_PIXELATED = 64  # images up to this height are kept exactly, and enlarged as squares
_REDUCED = 256
_WIDTH = 128  # of an image on the page, in pixels; half of that where a cell has several


@dataclasses.dataclass(frozen=True)
class Gallery:
  """The pictures of one evaluation: a row for each prompt, a data URI for each model."""

  name: str
  models: Sequence[str]
  rows: Sequence[tuple[str, Sequence[str]]]
  width: int
  pixelated: bool


def gallery(name: str, sheets: Mapping[str, Sheet]) -> Gallery:
  """The same prompts by several models.

  Args:
    name: of the evaluation.
    sheets: by model, of the same prompts.
  """
  first = next(iter(sheets.values()))
  columns = [[_encode(cell, sheet.image_size) for cell in sheet.cells] for sheet in sheets.values()]
  return Gallery(
    name,
    list(sheets),
    list(zip(first.prompts, zip(*columns, strict=True), strict=True)),
    (_WIDTH if first.across == 1 else _WIDTH // 2) * first.across,
    first.image_size <= _PIXELATED,
  )


def page(
  suite: str,
  *,
  rows: Sequence[Row],
  models: Sequence[tuple[str, str]],
  sweeps: Mapping[str, Table],
  galleries: Sequence[Gallery],
  missing: Sequence[str],
  notes: Sequence[str],
) -> str:
  """The HTML.

  Args:
    suite: as the user wrote it.
    rows: the evaluations.
    models: (name, how it drew) of each.
    sweeps: each model by guidance, if that was asked for.
    galleries: pictures.
    missing, notes: of the suite.
  """
  return render(
    "suite.html",
    title=f"rlft: {suite.partition('?')[0]}",
    suite=suite,
    models=models,
    results=side_by_side.table(rows),
    kinds=[cell.verdict.replace(" ", "-") for row in rows for cell in row.cells],
    parts={row.name: side_by_side.parts_table(row) for row in rows if row.parts},
    sweeps=sweeps,
    galleries=galleries,
    missing=missing,
    notes=notes,
    level=f"{statistics.LEVEL:.0%}",
    effect=f"{statistics.EFFECT:.0%}",
  )


def _encode(cell: np.ndarray, image_size: int) -> str:
  """A cell as a data URI: small pictures exactly, larger ones reduced."""
  if image_size <= _PIXELATED:
    kind, content = "png", images_lib.encode_png(cell)
  else:
    picture, buffer = PIL.Image.fromarray(cell), io.BytesIO()
    factor = min(_REDUCED / image_size, 1)
    size = [max(round(side * factor), 1) for side in picture.size]
    picture.resize(size, PIL.Image.Resampling.LANCZOS).save(buffer, format="JPEG", quality=85)
    kind, content = "jpeg", buffer.getvalue()
  return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
