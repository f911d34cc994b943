"""One run writes into a directory: a file in it says who, and whether it still lives.

The holder is a process: of its own machine one asks the system whether it runs, of another one
watches its heartbeat. No two clocks are compared.
"""

from collections.abc import Mapping
import contextlib
import fcntl
import json
import logging
import os
import pathlib
import socket
import threading
import time
from typing import Any

from rlft.storage import files
from rlft.types import UserError

_log = logging.getLogger(__name__)

_BEAT_S = 10.0  # between two heartbeats
_PATIENCE_S = 60.0  # without one, after which a holder on another machine is dead


class Lock:
  """Holds a directory for this process, until it is released or the process ends."""

  def __init__(self, path: files.Path, *, patience_s: float = _PATIENCE_S):
    """Takes the lock, also over from a holder that is dead; that may take `patience_s`.

    Args:
      path: the file; its directory is made where it is missing. A lock that this process holds
        already is held anew.
      patience_s: how long to wait for a heartbeat from another machine.

    Raises:
      UserError: another process holds it, or the file cannot be written.
    """
    self._path = path
    self._own = _this_process() | {"started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    self._released = threading.Event()
    with files.writing(path), _alone(path):
      holder = _holder(path)
      if holder is not None and not _is_same(holder, self._own):
        if _lives(path, holder, patience_s):
          raise UserError(
            f"{path.parent} is being written to by {_name(holder)}: wait for it, stop it, or give"
            " another --workdir"
          )
        _log.warning("taking %s over from %s, which is dead", path.parent, _name(holder))
      self._write()
    self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
    self._thread.start()

  def check(self) -> None:
    """Returns if the lock is still held.

    Raises:
      UserError: another process took this one for dead; it must not write any more. Or it cannot
        be found out.
    """
    with files.reading(self._path):
      holder = _holder(self._path)
    if holder is None or not _is_same(holder, self._own):
      other = "somebody deleted its lock" if holder is None else f"{_name(holder)} took it over"
      raise UserError(
        f"{self._path.parent} is no longer this run's ({other}): nothing more is written; see what"
        " runs there, then run the same command to go on"
      )

  def release(self) -> None:
    """Lets others have the directory; does nothing if they have it already."""
    self._released.set()
    self._thread.join(_BEAT_S)
    with contextlib.suppress(UserError, OSError):
      self.check()
      self._path.unlink()

  def _write(self) -> None:
    files.write_atomic(self._path, json.dumps(self._own) + "\n")

  def _beat(self) -> None:
    while not self._released.wait(_BEAT_S):
      # A full disk or a bucket that does not answer is told of by what the run itself writes.
      with contextlib.suppress(UserError, OSError):
        self.check()
        if files.is_bucket(self._path):
          self._own["beat"] = self._own.get("beat", 0) + 1
          self._write()
        else:
          os.utime(self._path)


@contextlib.contextmanager
def _alone(path: files.Path):
  """Lets one process at a time look at the lock and take it, on a machine's own disk."""
  if files.is_bucket(path):
    yield
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  directory = os.open(path.parent, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):  # Not every network's file system can.
      fcntl.flock(directory, fcntl.LOCK_EX)
    yield
  finally:
    os.close(directory)


def _this_process() -> dict[str, Any]:
  return {
    "host": socket.gethostname(),
    "process": os.getpid(),
    "machine": _machine(),
    "birth": _birth(os.getpid()),
  }


def _machine() -> str:
  """Where process ids mean the same: a host since it was started, and a container on it."""
  parts = [socket.gethostname()]
  with contextlib.suppress(OSError):
    parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    parts.append(os.readlink("/proc/self/ns/pid"))
  return " ".join(parts)


def _birth(process: int) -> str:
  """When a process began, which tells it from a later one of the same number; '' if it has ended.

  'unknown' on systems without /proc.
  """
  if not os.path.exists("/proc/self/stat"):
    try:
      os.kill(process, 0)
    except ProcessLookupError:
      return ""
    except PermissionError:
      pass
    return "unknown"
  try:
    # Behind the name, which may hold anything: the state, then 18 numbers, then the time.
    fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
  except OSError:
    return ""
  return "" if fields[0] in "ZX" else fields[19]


def _holder(path: files.Path) -> dict[str, Any] | None:
  """Who is in the file; None if there is none, or what a crash left there says nothing."""
  try:
    holder = json.loads(path.read_text())
    return holder if {"host", "process", "machine", "birth", "started"} <= holder.keys() else None
  except (FileNotFoundError, ValueError, AttributeError):
    return None


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
  return all(one[key] == other[key] for key in ("machine", "process", "birth"))


def _name(holder: Mapping[str, Any]) -> str:
  return f"process {holder['process']} on {holder['host']}, started {holder['started']}"


def _lives(path: files.Path, holder: Mapping[str, Any], patience_s: float) -> bool:
  """Whether a holder runs: at once for one of this machine, else after its next heartbeat."""
  if holder["machine"] == _machine():
    return _birth(holder["process"]) == holder["birth"]
  _log.warning(
    "%s is held by %s: waiting up to %g s to see whether it is alive",
    path.parent,
    _name(holder),
    patience_s,
  )
  before, deadline = _pulse(path), time.monotonic() + patience_s
  while time.monotonic() < deadline:
    time.sleep(min(1.0, patience_s / 10))
    if (now := _pulse(path)) != before:
      return now is not None
  return False


def _pulse(path: files.Path) -> Any:
  """What a heartbeat changes; None if the lock was released."""
  try:
    return path.read_text() if files.is_bucket(path) else path.stat().st_mtime_ns
  except FileNotFoundError:
    return None
