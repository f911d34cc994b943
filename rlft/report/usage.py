"""usage.jsonl: what a run takes, whole over all of its starts: a line for each process.

Beside `metrics.jsonl`, whose lines say nothing of compilation and evaluations, nor of work that a
crash has lost.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import datetime
from importlib import metadata
import json
import os
import pathlib
import platform
import re
import resource
import shlex
import subprocess
import sys
import threading
import time
from typing import Any

import jax

import rlft
from rlft.storage import files
from rlft.types import UserError

USAGE_FILE = "usage.jsonl"

_EVERY_S = 30.0  # What a process that is killed leaves uncounted at most.
_LIBRARIES = ("jax", "flax", "optax", "numpy")


class Usage:
  """Keeps this process's line up to date, from a thread of its own.

  On a run of several processes only one may write.
  """

  def __init__(self, workdir: str | os.PathLike[str], *, since: float):
    """Writes the first version of the line.

    Args:
      workdir: the run's directory.
      since: `time.monotonic()` when the process began to work.

    Raises:
      UserError: the file is damaged or cannot be written.
    """
    self._path, self._since = files.path_of(workdir) / USAGE_FILE, since
    self._earlier, self._about = files.read_jsonl(self._path), _about()
    self._write()
    self._end = threading.Event()
    self._thread = threading.Thread(target=self._beat, daemon=True)
    self._thread.start()

  def _beat(self) -> None:
    while not self._end.wait(_EVERY_S):
      self._try()

  def _try(self) -> None:
    try:
      self._write()
    except UserError:  # A disk that is full stops the run where it writes what is needed.
      pass

  def _write(self) -> None:
    line = {"seconds": round(time.monotonic() - self._since, 1), **self._about, **_peaks()}
    content = "".join(json.dumps(entry) + "\n" for entry in (*self._earlier, line))
    files.write_atomic(self._path, content)

  def close(self) -> None:
    """Writes the line for the last time; raises nothing."""
    self._end.set()
    self._thread.join()
    self._try()

  def __enter__(self) -> "Usage":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


def _about() -> dict[str, Any]:
  """What does not change while a process lives."""
  device = jax.devices()[0]
  return {
    "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "command": shlex.join(["python", *sys.argv]),
    "device": device.device_kind,
    "devices": jax.device_count(),
    "processes": jax.process_count(),
    "cores": os.cpu_count(),
    "python": platform.python_version(),
    "versions": {"rlft": rlft.__version__} | {name: metadata.version(name) for name in _LIBRARIES},
    "commit": _commit(),
  }


def _commit() -> str:
  """The commit of rlft's own repository, with '+' if files differ from it; '' without one."""
  root = pathlib.Path(rlft.__file__).parents[1]
  if not (root / ".git").exists():
    return ""

  def git(*arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()

  try:
    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "-s", "-uno") else "")
  except (OSError, subprocess.SubprocessError):
    return ""


def _peaks() -> dict[str, int]:
  """The most memory in use so far, in bytes: of this host's process, and of its fullest device."""
  found = {"peak_host_bytes": peak_host_bytes()}
  used = [(one.memory_stats() or {}).get("peak_bytes_in_use", 0) for one in jax.local_devices()]
  return found | ({"peak_device_bytes": max(used)} if any(used) else {})


def peak_host_bytes() -> int:
  """The most memory that this process has had so far, in bytes."""
  # On Linux, what rusage says is at least what the process had that started this one.
  if sys.platform == "linux":
    status = pathlib.Path("/proc/self/status").read_text()
    if found := re.search(r"^VmHWM:\s*(\d+) kB", status, re.M):
      return int(found[1]) * 1024
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a run has taken so far.

  Attributes:
    starts: how many processes, one after the other.
    seconds: of wall clock, all starts together.
    device_hours: seconds times devices, in hours.
    hardware: of each start, without repetitions.
    versions: of the last start: name and version.
    commits: of rlft, without repetitions, oldest first; may be empty.
    peak_host_bytes, peak_device_bytes: the most of any start; 0 where that is not known.
    command: of the last start.
  """

  starts: int
  seconds: float
  device_hours: float
  hardware: tuple[str, ...]
  versions: Mapping[str, str]
  commits: tuple[str, ...]
  peak_host_bytes: int
  peak_device_bytes: int
  command: str


def read_cost(workdir: str | os.PathLike[str]) -> Cost | None:
  """The cost of a run; None where its directory does not say it.

  Raises:
    UserError: the file is damaged.
  """
  return cost(files.read_jsonl(files.path_of(workdir) / USAGE_FILE))


def first_start(workdir: str | os.PathLike[str]) -> str:
  """When a run was first started, as ISO 8601 has it; '' where its directory does not say it.

  Raises:
    UserError: the file is damaged.
  """
  lines = files.read_jsonl(files.path_of(workdir) / USAGE_FILE)
  return lines[0].get("started", "") if lines else ""


def cost(lines: Sequence[Mapping[str, Any]]) -> Cost | None:
  """Sums up the lines of usage.jsonl; what is missing in one is survived."""
  if not lines:
    return None
  last = lines[-1]

  def most(key: str) -> int:
    return max(line.get(key, 0) for line in lines)

  return Cost(
    starts=len(lines),
    seconds=sum(line.get("seconds", 0) for line in lines),
    device_hours=sum(line.get("seconds", 0) * line.get("devices", 1) for line in lines) / 3600,
    hardware=tuple(dict.fromkeys(map(_hardware, lines))),
    versions={"Python": last.get("python", "?"), **last.get("versions", {})},
    commits=tuple(dict.fromkeys(line["commit"] for line in lines if line.get("commit"))),
    peak_host_bytes=most("peak_host_bytes"),
    peak_device_bytes=most("peak_device_bytes"),
    command=last.get("command", ""),
  )


def _hardware(line: Mapping[str, Any]) -> str:
  """For example '8 x TPU v6 lite, 2 processes' or '2 x cpu, 4 cores'."""
  parts = [f"{line.get('devices', '?')} x {line.get('device', '?')}"]
  if line.get("processes", 1) > 1:
    parts.append(f"{line['processes']} processes")
  if line.get("device") == "cpu":
    parts.append(f"{line.get('cores', '?')} cores")
  return ", ".join(parts)
