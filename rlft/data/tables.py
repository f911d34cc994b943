"""Tables in text files as people write them: CSV, and TSV, in which quotes are text.

Nothing is dropped or altered in silence: what is ambiguous is a UserError with the line's number.
"""

from collections.abc import Iterator
import csv
from typing import TextIO

from rlft.types import UserError

Row = tuple[int, list[str]]  # the number of its first line, and its cells


def read_csv(path: str) -> Iterator[Row]:
  """The rows of a comma-separated file, the header first; rows without any text are left out.

  Every row has as many cells as the header, or fewer. A table of one column has no use for commas
  between cells: they are taken as text.

  Raises:
    UserError: a quote is not closed or not doubled, or a row has more cells than the header.
      OSError and UnicodeDecodeError are left to the caller.
  """
  with open(path, encoding="utf-8-sig", newline="") as file:
    width = 0
    for number, cells, raw in _quoted(path, file, ","):
      width = width or len(cells)
      if len(cells) > width == 1 and '"' not in raw:
        cells = [raw.strip()]
      yield number, _cut(path, number, cells, width, "put a text that has commas in quotes")


def read_tsv(path: str) -> Iterator[Row]:
  """The rows of a tab-separated file, the header first; rows without any text are left out.

  A quote is text, as the format has no quotes. But there are programs that write them nevertheless:
  a cell with a quote inside, in which each is doubled, is read as in CSV, and so is a whole file
  whose header begins with a quote.

  Raises:
    UserError: as `read_csv`.
  """
  remedy = "a cell cannot hold tabs or line breaks: write CSV or JSON lines"
  with open(path, encoding="utf-8-sig", newline="") as file:
    quoted = file.read(1) == '"'
    file.seek(0)
    rows = _quoted(path, file, "\t") if quoted else _plain(file)
    width = 0
    for number, cells, _ in rows:
      width = width or len(cells)
      yield number, _cut(path, number, cells, width, remedy)


def _quoted(path: str, file: TextIO, separator: str) -> Iterator[tuple[int, list[str], str]]:
  """(number of the first line, cells, the text that they were read from) of each row."""
  lines: list[str] = []

  def remembered():
    for line in file:
      lines.append(line)
      yield line

  reader = csv.reader(remembered(), delimiter=separator, strict=True)
  while True:
    number = reader.line_num + 1
    lines.clear()
    try:
      cells = next(reader)
    except StopIteration:
      return
    except csv.Error as error:
      raise UserError(
        f"{path}, line {number}: {error}: a cell that begins with a quote must end with one, and"
        " have those inside doubled"
      ) from error
    if any(cell.strip() for cell in cells):
      yield number, cells, "".join(lines)


def _plain(file: TextIO) -> Iterator[tuple[int, list[str], str]]:
  """As `_quoted`, of a file in which nothing but tabs and line breaks has a meaning."""
  for number, line in enumerate(file, 1):
    if line.strip():
      yield number, [_unquoted(cell) for cell in line.rstrip("\r\n").split("\t")], line


def _unquoted(cell: str) -> str:
  inner = cell[1:-1]
  if cell[:1] == cell[-1:] == '"' and '""' in inner and '"' not in inner.replace('""', ""):
    return inner.replace('""', '"')
  return cell


def _cut(path: str, number: int, cells: list[str], width: int, remedy: str) -> list[str]:
  """The first `width` cells; what is beyond them must be empty."""
  if any(cells[width:]):
    raise UserError(
      f"{path}, line {number} has {len(cells)} cells and the header {width}: {remedy}"
    )
  return cells[:width]
