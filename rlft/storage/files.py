"""Files that a crash or a full disk leaves whole: atomic replacement, and JSON lines.

Also in buckets, whose objects are replaced as a whole by their nature and cannot be appended to.
What is mapped into memory or read in parts is copied here from there.
"""

from collections.abc import Iterable, Iterator
import contextlib
import hashlib
import json
import logging
import math
import os
import pathlib
import secrets
import socket
import tempfile
from typing import Any

from etils import epath
import fsspec

from rlft.types import UserError

Path = pathlib.Path | epath.Path

_log = logging.getLogger(__name__)

_BUCKET = "gs://"
_COPIED = (_BUCKET, "s3://", "memory://")
# What says that an object is another one than before, as far as its store has it.
_VERSION = ("etag", "ETag", "md5Hash", "generation", "mtime", "LastModified", "created", "size")


def path_of(name: str | os.PathLike[str]) -> Path:
  """A path of this machine, or the address of an object in a bucket, with the same methods.

  A leading `~` is the user's directory: a shell does not see it behind `=` or in a flagfile.
  """
  # Not epath for both: it takes `/gs/...` for a bucket.
  return epath.Path(name) if is_bucket(name) else local_path(name)


def local_path(name: str | os.PathLike[str]) -> pathlib.Path:
  """A path of this machine; a `~NAME` of nobody stays, where `pathlib` would raise."""
  return pathlib.Path(os.path.expanduser(name))


def is_bucket(name: str | os.PathLike[str]) -> bool:
  """Whether this is an address in a bucket."""
  return os.fspath(name).startswith(_BUCKET)


def check_writable(directory: str) -> None:
  """Makes a directory where it is missing, and checks that files can be written there.

  Raises:
    UserError: they cannot; the message begins with `directory`.
  """
  path = path_of(directory)
  probe = path / f".rlft-{_unique()}"
  if "://" in directory and not is_bucket(directory):
    raise UserError(f"{directory} is no directory, nor in a bucket as {_BUCKET}...: give one")
  try:
    if not is_bucket(path):
      path.mkdir(parents=True, exist_ok=True)
    probe.write_bytes(b"rlft")
    with contextlib.suppress(FileNotFoundError):  # Whoever clears such files up was first.
      probe.unlink()
  except errors(path) as error:
    raise UserError(
      f"{directory} cannot be written to ({_reason(error)}): give a directory that you can write to"
    ) from error


def _unique() -> str:
  """Part of the name of a file that no other process makes, nor another thread.

  Containers on several machines that share a disk often have one process id.
  """
  return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(8)}"


def check_local(name: str | os.PathLike[str]) -> None:
  """Refuses what is not on this machine.

  Raises:
    UserError: the message begins with `name`.
  """
  if "://" in os.fspath(name):
    raise UserError(
      f"{os.fspath(name)} is not on this machine: give a path that is, and copy, for example with"
      " gcloud storage cp"
    )


def staged(name: str | os.PathLike[str]) -> str:
  """The path on this machine of a file or folder; what is in a bucket is copied here, once.

  The copy is kept in ~/.cache/rlft/buckets until what is in the bucket changes.

  Raises:
    UserError: nothing is there, or it cannot be copied; the message names `name`.
  """
  name = os.fspath(name)
  if not name.startswith(_COPIED):
    check_local(name)
    return os.path.expanduser(name)
  cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
  with reading(name):
    system, root = fsspec.core.url_to_fs(name.rstrip("/"))
    objects = {
      os.path.relpath(path, root): info for path, info in system.find(root, detail=True).items()
    }
    if not objects:
      raise UserError(f"{name} does not exist: give what is in the bucket, or a path here")
    if any(os.pardir in pathlib.PurePath(path).parts for path in objects):
      raise UserError(f"{name} has objects with '..' in their names: rename them")
    versions = {path: [info.get(key) for key in _VERSION] for path, info in objects.items()}
    state = json.dumps([name, versions], sort_keys=True, default=str).encode()
    place = cache / "rlft" / "buckets" / hashlib.sha256(state).hexdigest()[:32]
    if not place.exists():
      _log.warning("copying %s to this machine: %d files", name, len(objects))
      _copy(system, root, objects, place)
  return str(place / os.path.basename(root))


def _copy(system: Any, root: str, paths: Iterable[str], place: pathlib.Path) -> None:
  """Copies objects into a directory, which is there once it is whole."""
  place.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=place.parent) as temporary:
    whole = pathlib.Path(temporary, "whole")
    for path in paths:
      target = pathlib.Path(os.path.normpath(whole / os.path.basename(root) / path))
      target.parent.mkdir(parents=True, exist_ok=True)
      system.get_file(root if path == os.curdir else f"{root}/{path}", str(target))
    try:
      whole.rename(place)
    except OSError:
      if not place.exists():  # Else another process was first.
        raise


def errors(name: str | os.PathLike[str]) -> type[Exception]:
  """What may be raised in reading and writing; libraries of buckets have no common base class."""
  return Exception if os.fspath(name).startswith(_COPIED) else OSError


def _reason(error: Exception) -> str:
  if isinstance(error, ImportError):
    package = "s3fs" if "s3fs" in str(error) else "gcsfs"
    return f"buckets need {package}: pip install {package}"
  # Of a bucket it says an address, and no more.
  if isinstance(error, FileNotFoundError) and not error.strerror:
    return "there is no such bucket or object"
  return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
  """Turns what goes wrong in writing to `path` inside the block into a UserError of one line."""
  try:
    yield
  except UserError:
    raise
  except errors(path) as error:
    raise UserError(
      f"cannot write {os.fspath(path)}: {_reason(error)}; free some space or fix the directory,"
      " then run the same command again (what was written before is intact)"
    ) from error


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
  """Turns what goes wrong in reading `path` inside the block into a UserError of one line."""
  try:
    yield
  except UserError:
    raise
  except errors(path) as error:
    raise UserError(f"cannot read {os.fspath(path)}: {_reason(error)}; make it readable") from error


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
  """Writes a file so that any reader, also after a crash, sees the old content or the new.

  Args:
    path: its directory is made where it is missing.
    data: the content; text is written as UTF-8.

  Raises:
    UserError: the disk is full or the directory cannot be written; the old file is untouched.
  """
  path = path_of(path)
  data = data.encode() if isinstance(data, str) else data
  with writing(path):
    if is_bucket(path):
      path.write_bytes(data)
      return
    temporary = path.with_name(f".{path.name}.{_unique()}.tmp")
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


class Lines:
  """A file to which lines are added, each as a whole or not at all."""

  def __init__(self, path: str | os.PathLike[str]):
    """Opens the file and makes it, and its directory, where they are missing.

    Raises:
      UserError: it cannot be written.
    """
    self._path = path_of(path)
    self._file, self._content = None, b""
    with writing(path):
      if is_bucket(path):
        self._content = self._path.read_bytes() if self._path.exists() else b""
      else:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a line is with the operating system when `add` returns, so that a killed
        # process loses none.
        self._file = open(self._path, "ab", buffering=0)

  def add(self, line: str) -> None:
    """Adds a line; in a bucket, all lines are written anew.

    Raises:
      UserError: the disk is full, for example.
    """
    data = f"{line}\n".encode()
    with writing(self._path):
      if self._file is None:
        self._path.write_bytes(self._content + data)
        self._content += data
        return
      size = os.fstat(self._file.fileno()).st_size
      try:
        if self._file.write(data) != len(data):
          raise OSError("no space left on the device")
      except OSError:
        with contextlib.suppress(OSError):
          os.ftruncate(self._file.fileno(), size)
        raise

  def close(self) -> None:
    """Closes the file; all lines are in it."""
    if self._file is not None:
      self._file.close()


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
  with reading(path):
    try:
      lines = path_of(path).read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
      return []
  entries = []
  for number, line in enumerate(lines, start=1):
    try:
      entry = json.loads(line)
      if not isinstance(entry, dict):
        raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
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
  path = path_of(path)
  if path.exists() and path.read_bytes() != content:
    write_atomic(path, content)
  return kept
