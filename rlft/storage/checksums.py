"""SHA256SUMS of a directory: whether its files are, bit for bit, those that were written.

The file is as `sha256sum` writes it, so that `sha256sum --check SHA256SUMS` says the same by hand.
"""

from collections.abc import Sequence
from concurrent import futures
import hashlib
import os

from rlft.storage import files

FILE = "SHA256SUMS"
_CHUNK = 1 << 20  # bytes, read at once
_THREADS = 8  # most files read at once; hashing lets other threads run


class DamagedError(Exception):
  """A file is not as it was written; the message says which."""


def write(directory: files.Path, *, apart_from: Sequence[str] = ()) -> str:
  """Writes the sums of all files below a directory, and returns what it wrote.

  Args:
    directory: in which SHA256SUMS is made.
    apart_from: files that may still change.

  Raises:
    OSError: a file cannot be read, or SHA256SUMS cannot be written.
  """
  names = _files(directory, apart_from)
  text = "".join(f"{digest}  {name}\n" for name, digest in _sums(directory, names).items())
  (directory / FILE).write_text(text)
  return text


def check(
  directory: files.Path, *, apart_from: Sequence[str] = (), part: tuple[int, int] = (0, 1)
) -> None:
  """Checks that the files are those that SHA256SUMS lists, and each as it was.

  Args:
    directory: with a SHA256SUMS.
    apart_from: files that it was written without.
    part: (i, n) to read only the ith of n parts of the files, which n processes share.

  Raises:
    DamagedError: a file has changed, is missing or is not in the list.
    OSError: one cannot be read.
  """
  written = listed(directory)
  if strange := sorted(written.keys() ^ set(_files(directory, apart_from))):
    raise DamagedError(
      f"{strange[0]} is {'missing' if strange[0] in written else f'not in {FILE}'}"
    )
  start, step = part
  for name, digest in _sums(directory, sorted(written)[start::step]).items():
    if digest != written[name]:
      raise DamagedError(f"{name} is not as it was written")


def listed(directory: files.Path) -> dict[str, str]:
  """The sums that were written, by name.

  Raises:
    DamagedError: there are none.
    OSError: the file cannot be read.
  """
  try:
    lines = (directory / FILE).read_bytes().decode(errors="replace").splitlines()
  except FileNotFoundError:
    raise DamagedError(f"{FILE} is missing") from None
  return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _files(directory: files.Path, apart_from: Sequence[str]) -> list[str]:
  """Names of the files below a directory, relative to it; hidden ones are not of its writer."""
  found, waiting = [], [directory]
  while waiting:
    for path in waiting.pop().iterdir():
      if path.is_dir():
        waiting.append(path)
      elif not path.name.startswith("."):
        found.append(os.fspath(path).removeprefix(f"{os.fspath(directory)}/"))
  return sorted(set(found) - {FILE, *apart_from})


def _sums(directory: files.Path, names: Sequence[str]) -> dict[str, str]:
  with futures.ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
    return dict(zip(names, pool.map(lambda name: _sum(directory / name), names), strict=True))


def _sum(path: files.Path) -> str:
  digest = hashlib.sha256()
  with path.open("rb") as file:
    while chunk := file.read(_CHUNK):
      digest.update(chunk)
  return digest.hexdigest()
