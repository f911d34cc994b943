"""Prompt sources: files, and data sets of TensorFlow Datasets."""

from collections.abc import Callable, Collection, Mapping, Sequence
import contextlib
import functools
import os
import re
from typing import Any

from rlft.data import columns, lines, records, tables
from rlft.data.sources import Source
from rlft.storage import files
from rlft.types import Prompt, UserError

_COLUMN = "prompt"
_OPTIONS = re.compile(r"(.+)\?column=([^?]+)")
_TFDS_OPTIONS = re.compile(r"([^?]+)\?column=([^?\[]+)(\[.*\])?")


def load_file(spec: str) -> Source:
  """The prompts of a file, in its order; lines without text, and rows (counted), are left out.

  Args:
    spec: one of
      FILE.txt               one prompt a line;
      FILE.jsonl             objects with `prompt`; the other keys are the prompt's metadata;
      FILE.json              an array of such objects, or of texts; held in memory;
      FILE.csv, FILE.tsv     a column `prompt` (or `Prompt`); the other columns are metadata;
      FILE.parquet           a column `prompt`; the other columns are metadata;
      FILE.array_record      objects with `prompt` in JSON, as `rlft.data.records` writes them.
      FILE?column=NAME takes another key or column than `prompt`.

  Returns:
    At least one prompt.

  Raises:
    UserError: the file does not exist, cannot be read, or has no prompts.
  """
  path, column = check_file(spec)
  with lines.reading(path):
    loaded = _READERS[_suffix(path)](path, column)
  if not len(loaded):
    raise UserError(f"prompt file {path} has no prompts: give a file with at least one")
  return loaded


def check_file(spec: str) -> tuple[str, str]:
  """Checks that `load_file` knows such a file and that it exists, without reading it.

  Returns:
    Its path and the column to use.

  Raises:
    UserError: as `load_file`.
  """
  path, column = split_column(spec)
  path = files.staged(path)
  if not os.path.exists(path):
    if re.match(r"[\d.]+\*", spec):
      how = "a mixture is NUMBER*SOURCE + NUMBER*SOURCE, with spaces around the +"
    elif re.search(r"\][^\]]*$", path):
      how = "a source has one part, FILE?column=NAME[PART]"
    else:
      how = "give a file, emoji:TASK/SPLIT, records:DIRECTORY/SPLIT or tfds:NAME/SPLIT"
    raise UserError(f"prompt file {path} does not exist: {how}")
  if os.path.isdir(path):
    raise UserError(
      f"prompts {path} is a directory: give a file, records:{path}/SPLIT for what"
      f" launch/prepare_prompts.py made, or tfds:{path}/SPLIT for a TFDS data set"
    )
  if _suffix(path) not in _READERS:
    raise UserError(f"prompt file {path} has no known suffix: use one of {', '.join(_READERS)}")
  if column != _COLUMN and _suffix(path) in _WITHOUT_COLUMNS:
    raise UserError(f"prompt file {path} has no columns: leave ?column={column} out")
  return path, column


def split_column(spec: str) -> tuple[str, str]:
  """'FILE?column=NAME' -> (FILE, NAME); the column is `prompt` where none is named."""
  match = None if os.path.exists(os.path.expanduser(spec)) else _OPTIONS.fullmatch(spec)
  return (match[1], match[2]) if match else (spec, _COLUMN)


def _suffix(path: str) -> str:
  return os.path.splitext(path)[1].lower()


def _read_table(path: str, column: str, *, separator: str) -> Source:
  table = tables.Table(path, separator)
  names = table.columns
  named = [place for place, name in enumerate(names) if name.strip().lower() == column.lower()]
  if names and not named:
    raise columns.no_column(path, column, names)
  repeated = [name for name in names if name and names.count(name) > 1]
  if len(named) > 1 or repeated:
    raise UserError(f"{path} has two columns '{(repeated or [column])[0]}': rename one of them")

  def rows():
    for row in table.rows():
      if named[0] >= len(row.cells):
        raise UserError(
          f"{path}, line {row.number} has {len(row.cells)} of {len(names)} cells, and none in the"
          f" column '{names[named[0]]}': correct it"
        )
      lines.check_text(path, row.number, row.cells[named[0]])
      yield row.start, row.size, row.cells[named[0]]

  def parse(text):
    cells: list[str | None] = [*table.cells(text)]
    found = dict(zip(names, cells + [None] * (len(names) - len(cells)), strict=True))
    return Prompt(found.pop(names[named[0]]).strip(), found)

  return lines.with_text(path, rows(), parse)


_READERS: Mapping[str, Callable[[str, str], Source]] = {
  ".txt": lambda path, column: lines.read_text(path),
  ".jsonl": lines.read_json_lines,
  ".json": lines.read_json,
  ".csv": functools.partial(_read_table, separator=","),
  ".tsv": functools.partial(_read_table, separator="\t"),
  ".parquet": columns.read_parquet,
  ".array_record": lambda path, column: records.Records(path),
}
_WITHOUT_COLUMNS = (".txt", ".array_record")


class _Tfds(Source):
  """Rows of a random-access data source: a feature is the prompt, others are its metadata.

  A row takes about 0.1 ms where the data set has a shard for each 10,000 rows or so; one by one, 40
  times as long from a single shard of a million. So rows without a prompt are not looked for, which
  would read all of them before the first is drawn: they are empty prompts.
  """

  def __init__(self, spec: str, source: Any, column: str, left_out: Collection[str]):
    """Takes a data source, and which of its features are no metadata."""
    self._spec, self._source, self._column, self._left_out = spec, source, column, left_out

  def __len__(self) -> int:
    return len(self._source)

  def take(self, rows: Sequence[int]) -> list[Prompt]:
    try:
      read = self._source.__getitems__([int(row) for row in rows]) if rows else []
    except Exception as error:  # TFDS documents no common base class of its errors
      raise _unreadable(self._spec, error) from error
    return [self._prompt(row) for row in read]

  def _prompt(self, row: Mapping[str, Any]) -> Prompt:
    found = {name: _plain(value) for name, value in row.items() if name not in self._left_out}
    text = found.pop(self._column)
    if not isinstance(text, str):
      raise UserError(
        f"prompts {self._spec}: '{self._column}' holds {text!r:.60}, which is no text in UTF-8:"
        " name another feature with ?column="
      )
    return Prompt(text.strip(), found)


def load_tfds(name: str, split: str) -> Source:
  """The prompts of a TensorFlow Datasets data set (array_record; TensorFlow is not needed).

  Its other features are their metadata, but for pictures, films and sounds.

  Args:
    name: of a data set with a text feature `prompt`, or the path of its folder.
    split: of the data set; SPLIT?column=NAME takes another feature than `prompt`, and a part may
      stand before or behind it.

  Raises:
    UserError: it cannot be read, has no such feature, or is empty.
  """
  split, column = _tfds_column(split)
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
    features = dict((builder.info.features or {}).items())
    if column not in features:
      raise columns.no_column(spec, column, list(features))
    media = (tfds.features.Image, tfds.features.Video, tfds.features.Audio)
    left_out = [key for key, feature in features.items() if _has(feature, media)]
    # Only a picture of its own can be left undecoded.
    undecoded = [key for key in left_out if type(features[key]) is tfds.features.Image]
    decoders = {key: tfds.decode.SkipDecoding() for key in undecoded}
    source = builder.as_data_source(split=split, decoders=decoders or None)
    count = source.__len__()  # Below 0 for [10:5], which len() refuses.
  except UserError:
    raise
  except Exception as error:  # TFDS documents no common base class of its errors
    raise _unreadable(spec, error) from error
  if count <= 0:
    raise UserError(f"prompts {spec} are empty: give a split with at least one prompt")
  found = _Tfds(spec, source, column, left_out)
  found.take([0])  # Before a run has begun, if it cannot be read.
  return found


def _tfds_column(split: str) -> tuple[str, str]:
  """'SPLIT?column=NAME[PART]' -> (SPLIT[PART], NAME)."""
  match = _TFDS_OPTIONS.fullmatch(split)
  return (match[1] + (match[3] or ""), match[2]) if match else (split, _COLUMN)


def _has(feature: Any, kinds: tuple[type, ...]) -> bool:
  """Whether a feature is one of these, or has one within it."""
  if isinstance(feature, kinds):
    return True
  inner = [feature.feature] if hasattr(feature, "feature") else []
  inner += feature.values() if hasattr(feature, "values") else []
  return any(_has(one, kinds) for one in inner)


def _plain(value: Any) -> Any:
  """A value of a feature as JSON would have it; bytes that are no text stay."""
  if isinstance(value, Mapping):
    return {key: _plain(inner) for key, inner in value.items()}
  if hasattr(value, "tolist"):  # NumPy's arrays and numbers.
    value = value.tolist()
  if isinstance(value, list | tuple):
    return [_plain(inner) for inner in value]
  if isinstance(value, bytes):
    with contextlib.suppress(UnicodeDecodeError):
      return value.decode()
  return value


def _unreadable(spec: str, error: Exception) -> UserError:
  first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
  return UserError(f"prompts {spec} cannot be read: {first_line}")
