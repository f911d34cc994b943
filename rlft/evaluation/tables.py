"""Tables of text, as Markdown and as CSV."""

from collections.abc import Sequence
import csv
import dataclasses
import io


@dataclasses.dataclass(frozen=True)
class Table:
  """Cells of text.

  Attributes:
    header: a title for each column.
    rows: of as many cells.
  """

  header: Sequence[str]
  rows: Sequence[Sequence[str]]

  def markdown(self) -> str:
    """A table of GitHub's Markdown, without the last end of line."""
    lines = [self.header, ["---"] * len(self.header), *self.rows]
    return "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)

  def csv(self) -> str:
    """Lines of comma-separated values."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([self.header, *self.rows])
    return text.getvalue()


def _escaped(cell: str) -> str:
  return cell.replace("|", "\\|").replace("\n", " ")
