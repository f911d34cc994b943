"""The page of a suite: several models side by side, in tables and in pictures; one file."""

from collections.abc import Mapping, Sequence
import dataclasses

from rlft.evaluation import side_by_side, statistics
from rlft.evaluation.side_by_side import Row
from rlft.evaluation.tables import Table
from rlft.report import samples
from rlft.report.render import render
from rlft.report.samples import Sheet

_REDUCED = 256  # height of an image in the page, in pixels, at most
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
  columns = [
    [samples.data_uri(cell, sheet.image_size, _REDUCED) for cell in sheet.cells]
    for sheet in sheets.values()
  ]
  return Gallery(
    name,
    list(sheets),
    list(zip(first.prompts, zip(*columns, strict=True), strict=True)),
    (_WIDTH if first.across == 1 else _WIDTH // 2) * first.across,
    first.image_size <= samples.PIXELATED,
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
