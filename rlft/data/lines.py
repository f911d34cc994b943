"""Prompts in text files, read from where they lie: lines, and lines of JSON.

Of millions of prompts, only the places where they begin are held; an array of JSON is held whole.
"""

import array
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import hashlib
import json
import logging
import os
from typing import Any, TextIO

import numpy as np

from rlft.data.sources import Source
from rlft.types import Prompt, UserError

_log = logging.getLogger(__name__)

_BOM = b"\xef\xbb\xbf"  # which some editors write before UTF-8
_CHUNK = 2**22  # bytes of a text file that are looked at together
_MOST_JSON = 2**28  # bytes of a JSON file, which is read as a whole and takes some times as much


class Lines(Source):
  """Rows of a text file."""

  def __init__(
    self, path: str, starts: np.ndarray, sizes: np.ndarray, parse: Callable[[str], Prompt]
  ):
    """Opens the file, which must not change from now on.

    Args:
      path: UTF-8.
      starts: `[N]` int64, where each row begins in the file, in bytes.
      sizes: `[N]` int64, of each row in bytes.
      parse: the text of a row -> its prompt.
    """
    self._path, self._parse = path, parse
    self._starts, self._sizes = starts, sizes
    self._file = open(path, "rb")
    self._stamp = self._seen()

  def __len__(self) -> int:
    return len(self._starts)

  def take(self, rows: Sequence[int]) -> list[Prompt]:
    with reading(self._path):
      self._check()
      read = [self._read(self._starts[row], self._sizes[row]) for row in rows]
      return [self._parse(raw.decode()) for raw in read]

  def digest(self) -> str:
    with reading(self._path):
      self._check()
      self._file.seek(0)
      return hashlib.file_digest(self._file, "sha256").hexdigest()

  def _read(self, start: int, size: int) -> bytes:
    return os.pread(self._file.fileno(), int(size), int(start))

  def _seen(self) -> tuple[int, int]:
    status = os.fstat(self._file.fileno())
    return status.st_size, status.st_mtime_ns

  def _check(self) -> None:
    # A file that is replaced is still there for who has it open; one that is written into is not.
    if self._seen() != self._stamp:
      raise UserError(
        f"prompt file {self._path} was written to while it is in use: put it back as it was, and"
        " replace files by new ones instead"
      )


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
  """Turns what can go wrong in reading a user's text file into a UserError of one line."""
  try:
    yield
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 text ({error}): convert it") from error
  except OSError as error:
    raise UserError(
      f"{path} cannot be read ({error.strerror or error}): give a file that you can read"
    ) from error


def opened(path: str) -> TextIO:
  """A text file as people write them: line breaks as they are, a byte-order mark left out."""
  return open(path, encoding="utf-8-sig", newline="")


def placed(path: str, file: TextIO) -> Iterator[tuple[int, int, str]]:
  """Where each line begins, its size, both in bytes, and the line with its break.

  Args:
    path: of the file.
    file: from `opened`, at its start.
  """
  with open(path, "rb") as raw:
    start = len(_BOM) if raw.read(len(_BOM)) == _BOM else 0
  for line in file:
    size = len(line) if line.isascii() else len(line.encode())
    yield start, size, line
    start += size


def with_text(
  path: str, rows: Iterator[tuple[int, int, str]], parse: Callable[[str], Prompt]
) -> Source:
  """The rows that have a prompt; the others are counted in a warning.

  Args:
    path: of the file.
    rows: where each begins, its size in bytes, and its prompt.
    parse: as of `Lines`.
  """
  places, count = array.array("q"), 0
  for start, size, text in rows:
    count += 1
    if text.strip():
      places.extend((start, size))
  starts, sizes = np.array(places, np.int64).reshape(-1, 2).T
  found = Lines(path, starts, sizes, parse)
  found.left_out = count - len(found)
  warn_of_empty(path, len(found), count)
  return found


def warn_of_empty(path: str, kept: int, count: int) -> None:
  """Says how many of the rows of a source have no prompt."""
  if kept < count:
    _log.warning("%d of %d rows of %s have no prompt and are left out", count - kept, count, path)


def check_text(path: str, number: int, text: str, what: str = "line") -> None:
  """Refuses what no tokenizer takes: it is there because the file is in another encoding."""
  if "\0" in text:
    raise UserError(f"{path}, {what} {number} has a NUL character: convert the file to UTF-8")
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f"{path}, {what} {number} has half of a character ({error.object[error.start]!a}): correct it"
    ) from error


# ---------------------------------------------------------------------------- a prompt a line


def read_text(path: str) -> Source:
  """The lines of a text file that have text."""
  places = [_text_lines(path, start, block) for start, block in _blocks(path)]
  starts, sizes = np.concatenate([np.empty((2, 0), np.int64), *places], axis=1)
  return Lines(path, starts, sizes, lambda text: Prompt(text.strip()))


def _blocks(path: str) -> Iterator[tuple[int, bytes]]:
  """Parts of a file that end with a line break, and where they begin."""
  with open(path, "rb") as file:
    start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(start)
    rest = b""
    while chunk := file.read(_CHUNK):
      rest += chunk
      end = max(rest.rfind(b"\n"), rest.rfind(b"\r")) + 1
      if end:
        yield start, rest[:end]
        start, rest = start + end, rest[end:]
    if rest:
      yield start, rest + b"\n"


def _text_lines(path: str, start: int, block: bytes) -> np.ndarray:
  """Where the lines with text begin, and their sizes: `[2, N]` int64."""
  _check_block(path, block)
  codes = np.frombuffer(block, np.uint8)
  ends = np.flatnonzero((codes == ord("\n")) | (codes == ord("\r")))
  starts = np.concatenate([[0], ends[:-1] + 1])
  has_text = np.logical_or.reduceat((codes > ord(" ")) & (codes < 127), starts)
  for line in np.flatnonzero(~has_text & (ends > starts)).tolist():
    # Without a letter of ASCII: spaces of other kinds, or text of another script.
    has_text[line] = bool(block[starts[line] : ends[line]].decode().strip())
  return np.stack([start + starts, ends - starts])[:, has_text]


def _check_block(path: str, block: bytes) -> None:
  try:
    block.decode()
    if b"\0" not in block:
      return
  except UnicodeDecodeError:
    pass
  with opened(path) as file:  # Again, for the line's number.
    for number, line in enumerate(file, 1):
      check_text(path, number, line)


# ---------------------------------------------------------------------------- JSON lines


def read_json_lines(path: str, column: str) -> Source:
  """The objects of a JSON-lines file: `column` is the prompt, other keys are its metadata."""
  rows = ((start, size, row[column]) for start, size, row in json_rows(path, (column,)))

  def parse(line: str) -> Prompt:
    row = json.loads(line)
    return Prompt(row.pop(column).strip(), row)

  return with_text(path, rows, parse)


def json_rows(path: str, keys: Sequence[str]) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
  """The objects of a JSON-lines file that users write; blank lines are skipped.

  Args:
    path: a UTF-8 file.
    keys: what every object must have, with text as the value.

  Yields:
    Where the line begins, its size, both in bytes, and the object.

  Raises:
    UserError: a line is no such object. OSError and UnicodeDecodeError are left to `reading`.
  """
  form = ", ".join(f'"{key}": "..."' for key in keys)
  with opened(path) as file:
    for number, (start, size, line) in enumerate(placed(path, file), 1):
      if not line.strip():
        continue
      try:
        row = json.loads(line)
      except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number} is not JSON ({error}): correct it") from error
      if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
        raise UserError(f"{path}, line {number} is not of the form {{{form}, ...}}: correct it")
      for key in keys:
        check_text(path, number, row[key])
      yield start, size, row


# ---------------------------------------------------------------------------- an array of JSON


class Held(Source):
  """Prompts in memory, of a file whose parts cannot be read alone."""

  def __init__(self, prompts: Sequence[Prompt], digest: str):
    """Takes the prompts, and what stands for them."""
    self._prompts, self._digest = prompts, digest

  def __len__(self) -> int:
    return len(self._prompts)

  def take(self, rows: Sequence[int]) -> list[Prompt]:
    return [self._prompts[row] for row in rows]

  def digest(self) -> str:
    return self._digest


def read_json(path: str, column: str) -> Source:
  """A JSON array of texts, or of objects as those of JSON lines."""
  with open(path, "rb") as file:
    content = file.read(_MOST_JSON + 1)
  if len(content) > _MOST_JSON:
    raise UserError(
      f"{path} has more than {_MOST_JSON // 2**20} MiB, and an array is read as a whole: write an"
      " object a line, as .jsonl"
    )
  remedy = "give an array of texts or objects, or call it .jsonl if it has an object a line"
  try:
    entries = json.loads(content.decode("utf-8-sig"))
  except UnicodeDecodeError:
    raise
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path} is not JSON ({error}): {remedy}") from error
  if not isinstance(entries, list):
    raise UserError(f"{path} is no JSON array: {remedy}")
  read = [_entry(path, number, entry, column) for number, entry in enumerate(entries, 1)]
  found = Held([prompt for prompt in read if prompt.text], hashlib.sha256(content).hexdigest())
  found.left_out = len(read) - len(found)
  warn_of_empty(path, len(found), len(read))
  return found


def _entry(path: str, number: int, entry: Any, column: str) -> Prompt:
  """The prompt of an entry of an array: a text, or what an object has under `column`."""
  row = {column: entry} if isinstance(entry, str) else entry
  if not isinstance(row, dict) or not isinstance(row.get(column), str):
    keys = f" (it has {', '.join(map(str, list(row)[:10]))})" if isinstance(row, dict) else ""
    raise UserError(
      f'{path}, entry {number} is neither a text nor of the form {{"{column}": "...", ...}}{keys}:'
      " correct it, or name another key with ?column="
    )
  text = row.pop(column)
  check_text(path, number, text, "entry")
  return Prompt(text.strip(), row)
