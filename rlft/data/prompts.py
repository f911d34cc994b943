"""Prompt sources."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
import json
import logging
import os
from typing import Any, overload

from rlft.data import tables
from rlft.storage import files
from rlft.types import Prompt, UserError

_log = logging.getLogger(__name__)

_COLUMN = "prompt"


class _Prompts(Sequence[Prompt]):
  """Makes each `Prompt` when it is asked for: millions of prompts stay a list of strings."""

  def __init__(self, texts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None):
    self._texts = texts
    self._metadata = metadata

  def __len__(self) -> int:
    return len(self._texts)

  @overload
  def __getitem__(self, index: int) -> Prompt: ...
  @overload
  def __getitem__(self, index: slice) -> list[Prompt]: ...
  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    return Prompt(self._texts[index], self._metadata[index] if self._metadata else {})


# Sources.


def load_file(path: str) -> Sequence[Prompt]:
  """The prompts of a file, in its order; lines without text, and rows (counted), are left out.

  Args:
    path: one of
      FILE.txt               one prompt a line;
      FILE.jsonl             objects with `prompt`; the other keys are the prompt's metadata;
      FILE.csv, FILE.tsv     a column `prompt` (or `Prompt`); the other columns are metadata;
      FILE.parquet           a column `prompt`; the other columns are not read.

  Returns:
    At least one prompt.

  Raises:
    UserError: the file does not exist, cannot be read, or has no prompts.
  """
  check_file(path)
  path = os.path.expanduser(path)
  with reading(path):
    loaded = _READERS[_suffix(path)](path)
  if not len(loaded):
    raise UserError(f"prompt file {path} has no prompts: give a file with at least one")
  return loaded


def check_file(path: str) -> None:
  """Checks that `load_file` knows such a file and that it exists, without reading it.

  Raises:
    UserError: as `load_file`.
  """
  files.check_local(path)
  path = os.path.expanduser(path)
  if not os.path.exists(path):
    raise UserError(
      f"prompt file {path} does not exist: give a file, emoji:TASK/SPLIT or tfds:NAME/SPLIT"
    )
  if os.path.isdir(path):
    raise UserError(
      f"prompts {path} is a directory: give a file, or tfds:{path}/SPLIT for a TFDS data set"
    )
  if _suffix(path) not in _READERS:
    raise UserError(f"prompt file {path} has no known suffix: use one of {', '.join(_READERS)}")


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


def _suffix(path: str) -> str:
  return os.path.splitext(path)[1].lower()


def _read_text(path: str) -> Sequence[Prompt]:
  texts = []
  with open(path, encoding="utf-8-sig") as file:
    for number, line in enumerate(file, 1):
      if line.strip():
        _check_text(path, number, line)
        texts.append(line.strip())
  return _Prompts(texts)


def _read_json_lines(path: str) -> Sequence[Prompt]:
  texts, metadata = [], []
  for row in json_rows(path, (_COLUMN,)):
    texts.append(row[_COLUMN])
    metadata.append({key: value for key, value in row.items() if key != _COLUMN})
  return _with_text(path, texts, metadata)


def json_rows(path: str, keys: Sequence[str]) -> Iterator[Mapping[str, Any]]:
  """The objects of a JSON-lines file that users write; blank lines are skipped.

  Args:
    path: a UTF-8 file.
    keys: what every object must have, with text as the value.

  Raises:
    UserError: a line is no such object. OSError and UnicodeDecodeError are left to `reading`.
  """
  form = ", ".join(f'"{key}": "..."' for key in keys)
  with open(path, encoding="utf-8-sig") as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        row = json.loads(line)
      except ValueError as error:
        raise UserError(f"{path}, line {number} is not JSON ({error}): correct it") from error
      if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
        raise UserError(f"{path}, line {number} is not of the form {{{form}, ...}}: correct it")
      for key in keys:
        _check_text(path, number, row[key])
      yield row


def _read_table(path: str, read: Callable[[str], Iterator[tables.Row]]) -> Sequence[Prompt]:
  rows = read(path)
  _, columns = next(rows, (0, [_COLUMN]))
  named = [place for place, column in enumerate(columns) if column.strip().lower() == _COLUMN]
  if not named:
    raise _no_column(path, columns)
  repeated = [column for column in columns if column and columns.count(column) > 1]
  if len(named) > 1 or repeated:
    name = (repeated or [_COLUMN])[0]
    raise UserError(f"{path} has two columns '{name}': rename one of them")
  texts, metadata = [], []
  for number, cells in rows:
    if named[0] >= len(cells):
      raise UserError(
        f"{path}, line {number} has {len(cells)} of {len(columns)} cells, and none in the column"
        f" '{columns[named[0]]}': correct it"
      )
    cells += [None] * (len(columns) - len(cells))
    found = dict(zip(columns, cells, strict=True))
    texts.append(found.pop(columns[named[0]]))
    _check_text(path, number, texts[-1])
    metadata.append(found)
  return _with_text(path, texts, metadata)


def _check_text(path: str, number: int, text: str) -> None:
  """Refuses what no tokenizer takes: it is there because the file is in another encoding."""
  if "\0" in text:
    raise UserError(f"{path}, line {number} has a NUL character: convert the file to UTF-8")
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f"{path}, line {number} has half of a character ({error.object[error.start]!a}): correct it"
    ) from error


def _with_text(
  path: str, texts: Sequence[str | None], metadata: Sequence[Mapping[str, Any]] | None = None
) -> Sequence[Prompt]:
  """The prompts of the rows that have one; the others are counted in a warning."""
  kept = [place for place, text in enumerate(texts) if text and text.strip()]
  if len(kept) < len(texts):
    _log.warning(
      "%d of %d rows of %s have no prompt and are left out",
      len(texts) - len(kept),
      len(texts),
      path,
    )
  return _Prompts(
    [texts[place].strip() for place in kept], metadata and [metadata[place] for place in kept]
  )


def _read_parquet(path: str) -> Sequence[Prompt]:
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError as error:
    raise UserError(f"reading {path} needs pyarrow: pip install pyarrow") from error
  try:
    with parquet.ParquetFile(path) as file:
      columns = file.schema_arrow.names
      if _COLUMN not in columns:
        raise _no_column(path, columns)
      column = file.read(columns=[_COLUMN]).column(0).cast(pyarrow.string()).to_pylist()
  except pyarrow.ArrowException as error:
    raise UserError(f"prompt file {path} cannot be read ({error}): write it anew") from error
  return _with_text(path, column)


def _no_column(path: str, columns: Sequence[str]) -> UserError:
  shown = ", ".join(map(str, columns[:10]))
  return UserError(f"{path} has no column '{_COLUMN}' (it has {shown}): rename the one to use")


_READERS: Mapping[str, Callable[[str], Sequence[Prompt]]] = {
  ".txt": _read_text,
  ".jsonl": _read_json_lines,
  ".csv": functools.partial(_read_table, read=tables.read_csv),
  ".tsv": functools.partial(_read_table, read=tables.read_tsv),
  ".parquet": _read_parquet,
}


class _TfdsTexts(Sequence[str]):
  """The text feature of a random-access data source, read row by row.

  A row takes about 0.1 ms where the data set has a shard for each 10,000 rows or so, and 40 times
  as long from a single shard of a million.
  """

  def __init__(self, source: Sequence[Mapping[str, Any]]):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> str:
    # The source raises no IndexError, with which Python ends an iteration.
    value = self._source[range(len(self))[index]][_COLUMN]
    return value.decode() if isinstance(value, bytes) else str(value)


def load_tfds(name: str, split: str) -> Sequence[Prompt]:
  """The prompts of a TensorFlow Datasets data set (array_record; TensorFlow is not needed).

  Args:
    name: of a data set with a text feature `prompt`, or the path of its folder.
    split: of the data set.

  Raises:
    UserError: it cannot be read, has no such feature, or is empty.
  """
  spec = f"tfds:{name}/{split}"
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise UserError(
      f"prompts {spec} need tensorflow-datasets: pip install tensorflow-datasets array-record"
    ) from error
  folder = os.path.expanduser(name)
  try:
    builder = tfds.builder_from_directory(folder) if os.path.isdir(folder) else tfds.builder(name)
    columns = list(builder.info.features or [])
    if _COLUMN not in columns:
      raise _no_column(spec, columns)
    source = builder.as_data_source(split=split)
  except UserError:
    raise
  except Exception as error:  # TFDS documents no common base class of its errors
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UserError(f"prompts {spec} cannot be read: {first_line}") from error
  if not len(source):
    raise UserError(f"prompts {spec} are empty: give a split with at least one prompt")
  return _Prompts(_TfdsTexts(source))
