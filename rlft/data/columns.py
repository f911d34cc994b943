"""Prompts in Parquet files, with all other columns as their metadata."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import errno
import hashlib
import inspect
import os
import tempfile
from typing import Any

import numpy as np

from rlft.data import lines
from rlft.data.sources import Source
from rlft.types import Prompt, UserError

_ROWS = 4096  # of a batch
_BUFFER = 2**20  # bytes of each column that are read ahead, in the place of a whole group of rows


class Columns(Source):
  """Rows of Arrow tables that lie on the disk."""

  def __init__(self, path: str, batches: Sequence[Any], column: str, digest: str):
    """Takes the rows of all `batches` (`pyarrow.RecordBatch`), whose `column` has text.

    Args:
      path: of the file, for messages.
      batches: its rows.
      column: of the prompts.
      digest: of the file.
    """
    self._path, self._batches, self._column, self._digest = path, batches, column, digest
    self._ends = np.cumsum([batch.num_rows for batch in batches], dtype=np.int64)

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def take(self, rows: Sequence[int]) -> list[Prompt]:
    if not len(rows):
      return []
    import pyarrow

    places = np.searchsorted(self._ends, rows, side="right")
    batches = [self._batches[place] for place in places.tolist()]
    firsts = [row - end for row, end in zip(rows, self._ends[places].tolist(), strict=True)]
    single = [
      batch.slice(batch.num_rows + first, 1) for batch, first in zip(batches, firsts, strict=True)
    ]
    # One table of them all: Python's objects are made column by column, in a third of the time.
    return self._prompts(pyarrow.Table.from_batches(single).combine_chunks())

  def __iter__(self) -> Iterator[Prompt]:
    for batch in self._batches:
      yield from self._prompts(batch)

  def _prompts(self, table: Any) -> list[Prompt]:
    with _reading(self._path):
      columns = [_objects(values) for values in table.columns]
    rows = (dict(zip(table.schema.names, row, strict=True)) for row in zip(*columns, strict=True))
    return [Prompt(row.pop(self._column).strip(), row) for row in rows]

  def digest(self) -> str:
    return self._digest


def read_parquet(path: str, column: str) -> Source:
  """The rows of a Parquet file that have a prompt; the others are counted in a warning.

  A row of Parquet cannot be read without those around it, so they are unpacked once, into a file
  without a name in the directory for temporary files, and read from there.

  Raises:
    UserError: pyarrow is not installed, the file is damaged, or has no such column of text.
  """
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError as error:
    raise UserError(f"reading {path} needs pyarrow: pip install pyarrow") from error
  options = {"buffer_size": _BUFFER, "pre_buffer": False, "page_checksum_verification": True}
  known = inspect.signature(parquet.ParquetFile).parameters  # Old versions compare no checksums.
  options = {name: value for name, value in options.items() if name in known}
  with _reading(path):
    with parquet.ParquetFile(path, **options) as file:
      names = file.schema_arrow.names
      if column not in names:
        raise no_column(path, column, names)
      if not _holds_text(kind := file.schema_arrow.field(column).type):
        raise UserError(f"{path}: column '{column}' holds {kind}, not text: name another")
      if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path} has two columns '{repeated[0]}': rename one of them")
      with _unpacked(path) as unpacked, contextlib.ExitStack() as stack:
        writer = None
        for batch in _with_text(path, file, column):
          if writer is None:
            writer = stack.enter_context(pyarrow.ipc.new_file(unpacked, batch.schema))
          writer.write_batch(batch)
        stack.close()  # The file is whole.
        batches = []
        if writer is not None:
          reader = pyarrow.ipc.open_file(pyarrow.memory_map(unpacked))
          batches = [reader.get_batch(place) for place in range(reader.num_record_batches)]
      count = file.metadata.num_rows
    found = Columns(path, batches, column, _footer_digest(path))
    found.left_out = count - len(found)
    lines.warn_of_empty(path, len(found), count)
    return found


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
  """Turns what pyarrow raises about a file's content into a UserError of one line."""
  import pyarrow

  with lines.reading(path):
    try:
      yield
    except UnicodeDecodeError:  # A ValueError that `lines.reading` has a better line for.
      raise
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
      reason = " ".join(str(error).split())
      raise UserError(f"prompt file {path} cannot be read ({reason}): write it anew") from error


def no_column(path: str, column: str, columns: Sequence[str], remedy: str = "") -> UserError:
  """Says which columns a source has in the place of the one that is asked for."""
  shown = ", ".join(map(str, columns[:10]))
  remedy = remedy or "rename the one to use, or name it with ?column="
  return UserError(f"{path} has no column '{column}' (it has {shown}): {remedy}")


def _with_text(path: str, file: Any, column: str) -> Iterator[Any]:
  """Batches of the rows with a prompt, in types that a table on the disk can have."""
  import pyarrow

  for batch in file.iter_batches(batch_size=_ROWS):
    arrays = []
    for name, values in zip(batch.schema.names, batch.columns, strict=True):
      _check_utf8(path, name, values)
      kind = pyarrow.string() if name == column else _retyped(values.type, _readable)
      # Not safe: it would refuse moments of which nanoseconds are cut off.
      arrays.append(values if kind == values.type else values.cast(kind, safe=name == column))
    batch = pyarrow.RecordBatch.from_arrays(arrays, names=batch.schema.names)
    texts = batch.column(column).to_pylist()
    kept = [place for place, text in enumerate(texts) if text and text.strip()]
    if kept:
      yield batch if len(kept) == len(texts) else batch.take(pyarrow.array(kept))


def _check_utf8(path: str, name: str, values: Any) -> None:
  """Refuses what pyarrow would hand on as text and Python cannot read, before it is drawn."""
  import pyarrow

  try:
    values.validate(full=True)
  except pyarrow.ArrowInvalid as error:
    reason = " ".join(str(error).split())
    if "UTF8" not in reason:
      raise
    raise UserError(f"{path}, column '{name}' is not UTF-8 text ({reason}): convert it") from error


def _retyped(kind: Any, leaf: Callable[[Any], Any]) -> Any:
  """A type of pyarrow with `leaf` of what is innermost in it; dictionaries are of their values.

  Raises:
    ValueError: two fields of a structure have one name.
  """
  import pyarrow

  types = pyarrow.types
  if types.is_dictionary(kind):
    return _retyped(kind.value_type, leaf)
  if types.is_struct(kind):
    names = [kind.field(place).name for place in range(kind.num_fields)]
    if repeated := [name for name in names if names.count(name) > 1]:
      raise ValueError(f"a structure has two fields '{repeated[0]}'")
    fields = (kind.field(place) for place in range(kind.num_fields))
    return pyarrow.struct([field.with_type(_retyped(field.type, leaf)) for field in fields])
  if types.is_map(kind):
    return pyarrow.map_(_retyped(kind.key_type, leaf), _retyped(kind.item_type, leaf))
  for is_list, make in ((types.is_list, pyarrow.list_), (types.is_large_list, pyarrow.large_list)):
    if is_list(kind):
      return make(kind.value_field.with_type(_retyped(kind.value_type, leaf)))
  if types.is_fixed_size_list(kind):
    inner = kind.value_field.with_type(_retyped(kind.value_type, leaf))
    return pyarrow.list_(inner, kind.list_size)
  return leaf(kind)


def _readable(kind: Any) -> Any:
  """The type whose values Python has, too: it counts microseconds, and not in every time zone."""
  import pyarrow

  types = pyarrow.types
  if types.is_timestamp(kind):
    zone = kind.tz
    try:
      zone = zone and pyarrow.lib.string_to_tzinfo(zone) and zone
    except Exception:  # Whatever library looks for it raises an error of its own.
      zone = "UTC"
    return pyarrow.timestamp("us" if kind.unit == "ns" else kind.unit, zone)
  if types.is_duration(kind) and kind.unit == "ns":
    return pyarrow.duration("us")
  return pyarrow.time64("us") if types.is_time64(kind) else kind


def _objects(values: Any) -> list[Any]:
  """Python's objects of a column; text stands for a date that is beyond Python's, as year 20000."""
  try:
    return values.to_pylist()
  except (ValueError, OverflowError):
    kind = _retyped(values.type, _text_of_times)
    return [_object(values.slice(place, 1), kind) for place in range(len(values))]


def _object(single: Any, kind: Any) -> Any:
  try:
    return single.to_pylist()[0]
  except (ValueError, OverflowError):
    return single.cast(kind).to_pylist()[0]


def _text_of_times(kind: Any) -> Any:
  import pyarrow

  return pyarrow.string() if pyarrow.types.is_temporal(kind) else kind


def _holds_text(kind: Any) -> bool:
  """Whether a column is of text, or of nothing at all."""
  from pyarrow import types

  kind = kind.value_type if types.is_dictionary(kind) else kind
  tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
  return any(test(kind) for test in tests)


@contextlib.contextmanager
def _unpacked(path: str) -> Iterator[str]:
  """A temporary file, which is gone when nobody has it open any more."""
  name = ""
  try:
    handle, name = tempfile.mkstemp(prefix="rlft-", suffix=".arrow")
    os.close(handle)
    yield name
  except OSError as error:
    if error.errno == errno.ENOSPC:
      raise UserError(
        f"there is no room in {tempfile.gettempdir()} to unpack {path}: free some, or set TMPDIR to"
        " a directory that has it"
      ) from error
    raise
  finally:
    if name:
      os.unlink(name)


def _footer_digest(path: str) -> str:
  """Bytes that describe a Parquet file: sizes, places, least and greatest values of all parts."""
  with open(path, "rb") as file:
    size = file.seek(-8, os.SEEK_END) + 8
    length = int.from_bytes(file.read(4), "little")
    file.seek(-8 - length, os.SEEK_END)
    return hashlib.sha256(str(size).encode() + file.read(length)).hexdigest()
