"""Prompts in Parquet files, with all other columns as their metadata."""

from collections.abc import Iterator, Sequence
import contextlib
import errno
import hashlib
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

  def __init__(self, batches: Sequence[Any], column: str, digest: str):
    """Takes the rows of all `batches` (`pyarrow.RecordBatch`), whose `column` has text."""
    self._batches, self._column, self._digest = batches, column, digest
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
    found = pyarrow.Table.from_batches(single).combine_chunks().to_pylist()
    return [Prompt(row.pop(self._column).strip(), row) for row in found]

  def __iter__(self) -> Iterator[Prompt]:
    for batch in self._batches:
      for row in batch.to_pylist():
        yield Prompt(row.pop(self._column).strip(), row)

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
  try:
    with parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
      names = file.schema_arrow.names
      if column not in names:
        raise no_column(path, column, names)
      if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path} has two columns '{repeated[0]}': rename one of them")
      with _unpacked(path) as unpacked, contextlib.ExitStack() as stack:
        writer = None
        for batch in _with_text(file, column):
          if writer is None:
            writer = stack.enter_context(pyarrow.ipc.new_file(unpacked, batch.schema))
          writer.write_batch(batch)
        stack.close()  # The file is whole.
        batches = []
        if writer is not None:
          reader = pyarrow.ipc.open_file(pyarrow.memory_map(unpacked))
          batches = [reader.get_batch(place) for place in range(reader.num_record_batches)]
      count = file.metadata.num_rows
    found = Columns(batches, column, _footer_digest(path))
    found.left_out = count - len(found)
    lines.warn_of_empty(path, len(found), count)
    return found
  except pyarrow.ArrowException as error:
    reason = " ".join(str(error).split())
    raise UserError(f"prompt file {path} cannot be read ({reason}): write it anew") from error


def no_column(path: str, column: str, columns: Sequence[str], remedy: str = "") -> UserError:
  """Says which columns a source has in the place of the one that is asked for."""
  shown = ", ".join(map(str, columns[:10]))
  remedy = remedy or "rename the one to use, or name it with ?column="
  return UserError(f"{path} has no column '{column}' (it has {shown}): {remedy}")


def _with_text(file: Any, column: str) -> Iterator[Any]:
  """Batches of the rows with a prompt, in types that a table on the disk can have."""
  import pyarrow

  for batch in file.iter_batches(batch_size=_ROWS):
    arrays = []
    for field, values in zip(batch.schema, batch.columns, strict=True):
      if pyarrow.types.is_dictionary(field.type):
        values = values.dictionary_decode()
      arrays.append(values.cast(pyarrow.string()) if field.name == column else values)
    batch = pyarrow.RecordBatch.from_arrays(arrays, names=batch.schema.names)
    texts = batch.column(column).to_pylist()
    kept = [place for place, text in enumerate(texts) if text and text.strip()]
    if kept:
      yield batch if len(kept) == len(texts) else batch.take(pyarrow.array(kept))


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
