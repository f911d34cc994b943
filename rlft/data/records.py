"""Prompt data sets as ArrayRecord files, which `launch/prepare_prompts.py` writes.

A data set is a directory with `manifest.json` and a file SPLIT.array_record for each split. A
record is a prompt as a JSON object: its text under `prompt`, and its metadata.
"""

from collections.abc import Mapping, Sequence
import contextlib
import hashlib
import json
import os
from typing import Any

from rlft.data.sources import Source, as_json
from rlft.storage import files
from rlft.types import Prompt, UserError

MANIFEST = "manifest.json"
_SUFFIX = ".array_record"
# Few records are unpacked for one that is asked for, and they still share what they have in common.
_WRITING = "group_size:16"
_READING = "readahead_buffer_size:0"  # the order is random


class Records(Source):
  """Prompts of an ArrayRecord file."""

  def __init__(self, path: str, digest: str = ""):
    """Opens a file.

    Args:
      path: of it.
      digest: of its content, if it is known.

    Raises:
      UserError: array-record is not installed, or the file is damaged or of another kind.
    """
    self._path, self._digest = path, digest
    with self._reading():
      self._reader = _library(path).ArrayRecordReader(path, _READING)
      self._count = self._reader.num_records()
      if not self._reader.ok():
        raise OSError("no ArrayRecord file, or not all of it")
    if self._count:
      self.take([0, self._count - 1])

  def __len__(self) -> int:
    return self._count

  def take(self, rows: Sequence[int]) -> list[Prompt]:
    with self._reading():
      read = self._reader.read([int(row) for row in rows]) if rows else []
      found = [json.loads(record) for record in read]
      return [Prompt(row.pop("prompt"), row) for row in found]

  def digest(self) -> str:
    return self._digest or super().digest()

  @contextlib.contextmanager
  def _reading(self):
    try:
      yield
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
      raise UserError(
        f"{self._path} holds no prompts of rlft, which are JSON objects with 'prompt': make it with"
        " launch/prepare_prompts.py"
      ) from error
    except (RuntimeError, OSError, IndexError) as error:
      reason = " ".join(str(error).split())
      raise UserError(f"{self._path} cannot be read ({reason}): make it anew") from error


def load(folder: str, split: str) -> Source:
  """The prompts of a data set.

  Args:
    folder: its directory.
    split: one of its manifest's.

  Raises:
    UserError: there is no such data set or split, or its files are not those that it was made with.
  """
  folder = files.staged(folder)
  where = os.path.join(folder, MANIFEST)
  if not os.path.exists(where) and os.path.exists(os.path.join(folder, split, MANIFEST)):
    known = ", ".join(_splits(os.path.join(folder, split, MANIFEST)))
    raise UserError(f"records:{folder}/{split} names no split: add one of {known} with a slash")
  splits = _splits(where)
  if split not in splits:
    raise UserError(f"{folder} has no split '{split}': use one of {', '.join(splits)}")
  told = splits[split]
  path = os.path.join(folder, split + _SUFFIX)
  size = os.path.getsize(path) if os.path.isfile(path) else 0
  if size != told["bytes"]:
    raise UserError(
      f"{path} has {size:,} bytes and {where} says {told['bytes']:,}: copy the data set again, or"
      " make it anew"
    )
  return Records(path, told["sha256"])


def _splits(where: str) -> Mapping[str, Mapping[str, Any]]:
  try:
    with open(where, "rb") as file:
      splits = json.load(file)["splits"]
    for told in splits.values():
      for key, kind in (("rows", int), ("bytes", int), ("sha256", str)):
        if not isinstance(told[key], kind):
          raise TypeError(f"{key} is {told[key]!r:.100}")
    return splits
  except OSError as error:
    raise UserError(
      f"{where} cannot be read ({error.strerror or error}): give the directory of a data set that"
      " launch/prepare_prompts.py made"
    ) from error
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise UserError(
      f"{where} is no manifest of prompts ({error}): make the data set anew with"
      " launch/prepare_prompts.py"
    ) from error


class Writer:
  """Writes a split; it is there, whole, when `close` returns."""

  def __init__(self, folder: str, split: str):
    """Begins a split in a directory that exists.

    Raises:
      UserError: array-record is not installed, or nothing can be written there.
    """
    self._path = os.path.join(folder, split + _SUFFIX)
    self._temporary = f"{self._path}.tmp"
    self._hashed, self._rows = hashlib.sha256(), 0
    with self._writing():
      self._writer = _library(self._path).ArrayRecordWriter(self._temporary, _WRITING)

  def add(self, prompt: Prompt) -> None:
    """Adds a prompt."""
    record = as_json(prompt)
    self._hashed.update(record + b"\n")
    self._rows += 1
    with self._writing():
      self._writer.write(record)

  def close(self) -> Mapping[str, Any]:
    """Ends the split, reads it again, and gives what the manifest says of it.

    Raises:
      UserError: it cannot be written, or not everything is there.
    """
    with self._writing():
      self._writer.close()
      if _hash_of_file(self._temporary) != (self._rows, self._hashed.hexdigest()):
        raise OSError("what was written is not what is there")
      with open(self._temporary, "rb+") as file:
        os.fsync(file.fileno())
      os.replace(self._temporary, self._path)
      size = os.path.getsize(self._path)
    return {"rows": self._rows, "bytes": size, "sha256": self._hashed.hexdigest()}

  def discard(self) -> None:
    """Leaves nothing behind of a split."""
    for path in (self._temporary, self._path):
      with contextlib.suppress(OSError):
        os.unlink(path)

  @contextlib.contextmanager
  def _writing(self):
    with files.writing(self._path):
      try:
        yield
      except RuntimeError as error:  # The library has no other of its own.
        raise OSError(str(error)) from error


def _hash_of_file(path: str) -> tuple[int, str]:
  """How many records a file has, and the hash of them all, each with a line break."""
  reader, hashed = _library(path).ArrayRecordReader(path, ""), hashlib.sha256()
  count = reader.num_records()
  for _ in range(count):
    hashed.update(reader.read() + b"\n")
  return count, hashed.hexdigest()


def _library(path: str) -> Any:
  try:
    from array_record.python import array_record_module
  except ImportError as error:
    raise UserError(f"{path} needs array-record: pip install array-record") from error
  return array_record_module
