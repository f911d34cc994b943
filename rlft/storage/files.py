"""Files that a crash or a full disk leaves whole: atomic replacement, and JSON lines."""

from collections.abc import Iterator
import contextlib
import json
import math
import os
import pathlib
from typing import Any

from rlft.types import UserError


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
  """Turns the OSError of what is done to `path` inside the block into a UserError of one line."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f"cannot write {path}: {error.strerror or error}; free some space or fix the directory, then"
      " run the same command again (what was written before is intact)"
    ) from error


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
  """Writes a file so that any reader, also after a crash, sees the old content or the new.

  Args:
    path: its directory is made where it is missing.
    data: the content; text is written as UTF-8.

  Raises:
    UserError: the disk is full or the directory cannot be written; the old file is untouched.
  """
  path = pathlib.Path(path)
  data = data.encode() if isinstance(data, str) else data
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, path)
    except BaseException:
      with contextlib.suppress(OSError):
        temporary.unlink()
      raise


def finite(value: Any) -> float | None:
  """A number as JSON can hold it: None (null) for NaN and infinities."""
  value = float(value)
  return value if math.isfinite(value) else None


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The objects of a JSON-lines file; a last line that a crash left half-written is dropped.

  Returns:
    One dict a line; empty if there is no such file.

  Raises:
    UserError: a line that is not the last is no JSON object, or the file cannot be read.
  """
  try:
    lines = pathlib.Path(path).read_bytes().splitlines()
  except (FileNotFoundError, NotADirectoryError):
    return []
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}; make it readable") from error
  entries = []
  for number, line in enumerate(lines, start=1):
    try:
      entry = json.loads(line)
      if not isinstance(entry, dict):
        raise ValueError("not an object")
    except ValueError as error:
      if number == len(lines):
        break
      raise UserError(
        f"line {number} of {path} is not a JSON object: repair or delete that line, or move the"
        " file away"
      ) from error
    entries.append(entry)
  return entries


def keep_before(path: str | os.PathLike[str], iteration: int) -> list[dict[str, Any]]:
  """Drops the lines of a JSON-lines file from an iteration on, and a half-written last one.

  A run that goes on from a checkpoint repeats the iterations after it; their lines come again.

  Args:
    path: a file whose every line has an integer 'iteration'.
    iteration: the first one to drop.

  Returns:
    The lines that stay.

  Raises:
    UserError: a line without 'iteration', or the file cannot be rewritten.
  """
  entries = read_jsonl(path)
  for number, entry in enumerate(entries, start=1):
    if not isinstance(entry.get("iteration"), int):
      raise UserError(f"line {number} of {path} has no 'iteration': move the file away")
  kept = [entry for entry in entries if entry["iteration"] < iteration]
  content = "".join(json.dumps(entry) + "\n" for entry in kept).encode()
  path = pathlib.Path(path)
  if path.exists() and path.read_bytes() != content:
    write_atomic(path, content)
  return kept
