"""Tables in text files as people write them: CSV, and TSV, in which quotes are text.

Nothing is dropped or altered in silence: what is ambiguous is a UserError with the line's number.
"""

from collections.abc import Iterable, Iterator
import csv
import dataclasses
import io

from rlft.data import lines
from rlft.types import UserError


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of a table.

  Attributes:
    number: of its first line, from 1.
    cells: as many as the header has, or fewer.
    start: where it begins in the file, in bytes.
    size: of it in the file, in bytes.
  """

  number: int
  cells: list[str]
  start: int
  size: int


class Table:
  """A comma-separated or tab-separated file.

  In CSV, a table of one column has no use for commas between cells: they are taken as text.

  In TSV a quote is text, as the format has no quotes. But there are programs that write them
  nevertheless: a cell with a quote inside, in which each is doubled, is read as in CSV, and so is a
  whole file whose header begins with a quote.
  """

  def __init__(self, path: str, separator: str):
    """Reads the header of a file.

    Raises:
      UserError: as `rows`. OSError and UnicodeDecodeError are left to the caller.
    """
    self._path, self._separator = path, separator
    with lines.opened(path) as file:
      self._quoted = separator == "," or file.read(1) == '"'
    self._width = 0
    self.columns = next(self.rows(header=True), Row(0, [], 0, 0)).cells
    self._width = len(self.columns)

  def rows(self, *, header: bool = False) -> Iterator[Row]:
    """The rows, without the header unless it is asked for; those without any text are left out.

    Raises:
      UserError: a quote is not closed or not doubled, or a row has more cells than the header.
        OSError and UnicodeDecodeError are left to the caller.
    """
    with lines.opened(self._path) as file:
      rows = self._rows(lines.placed(self._path, file))
      if not header:
        next(rows, None)
      yield from rows

  def cells(self, text: str) -> list[str]:
    """The cells of a row, from its text in the file."""
    return next(self._rows((0, 0, line) for line in io.StringIO(text, newline=""))).cells

  def _rows(self, placed: Iterable[tuple[int, int, str]]) -> Iterator[Row]:
    found = (_quoted if self._quoted else _plain)(self._path, placed, self._separator)
    if self._separator == ",":
      remedy = "put a text that has commas in quotes"
    else:
      remedy = "a cell cannot hold tabs or line breaks: write CSV or JSON lines"
    for row, raw in found:
      cells, width = row.cells, self._width or len(row.cells)
      if self._separator == "," and len(cells) > width == 1 and '"' not in raw:
        cells = [raw.strip()]
      if any(cells[width:]):
        raise UserError(
          f"{self._path}, line {row.number} has {len(cells)} cells and the header {width}: {remedy}"
        )
      yield dataclasses.replace(row, cells=cells[:width])


def _quoted(
  path: str, placed: Iterable[tuple[int, int, str]], separator: str
) -> Iterator[tuple[Row, str]]:
  """The rows of a table with quotes, each with the text that it was read from."""
  read: list[tuple[int, int, str]] = []

  def remembered():
    for line in placed:
      read.append(line)
      yield line[2]

  reader = csv.reader(remembered(), delimiter=separator, strict=True)
  while True:
    number = reader.line_num + 1
    read.clear()
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
      size = sum(size for _, size, _ in read)
      yield Row(number, cells, read[0][0], size), "".join(line for _, _, line in read)


def _plain(
  path: str, placed: Iterable[tuple[int, int, str]], separator: str
) -> Iterator[tuple[Row, str]]:
  """Finds rows as `_quoted` does, where nothing but separators and line breaks has a meaning."""
  del path  # Every line is a row.
  for number, (start, size, line) in enumerate(placed, 1):
    if line.strip():
      cells = [_unquoted(cell) for cell in line.rstrip("\r\n").split(separator)]
      yield Row(number, cells, start, size), line


def _unquoted(cell: str) -> str:
  inner = cell[1:-1]
  if cell[:1] == cell[-1:] == '"' and '""' in inner and '"' not in inner.replace('""', ""):
    return inner.replace('""', '"')
  return cell
