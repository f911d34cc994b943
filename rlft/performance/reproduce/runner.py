"""Runs trainings that are missing, each in a process of its own, whatever stopped the last one."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import fcntl
import os
import pathlib
import signal
import subprocess
import sys

from rlft.config import fields
from rlft.config.settings import Config
from rlft.evaluation import results
from rlft.performance.reproduce.scale import EXPERIMENTS, config_of
from rlft.storage import files
from rlft.types import UserError

_TRAIN = EXPERIMENTS.parent / "launch" / "train.py"
_FLAGS = "run.flags"  # as it was trained, in the run's directory
_LOCK = "lock"

# (command, what the process has to keep open, its environment) -> its status.
Start = Callable[[Sequence[str], int, dict[str, str]], int]


def finished(config: Config) -> bool:
  """Whether a run has been evaluated at its end, and has written what it leaves."""
  workdir = pathlib.Path(config.output.workdir)
  if not all((workdir / name).exists() for name in (results.EVAL_FILE, "report.html")):
    return False
  history = results.read_history(workdir)
  return bool(history) and history[-1][0] == config.iterations


def done(config: Config) -> bool:
  """Whether a run is finished, and was trained with these settings."""
  return finished(config) and not _changes(config)


def _changes(config: Config) -> list[str]:
  """The settings with which a run was not begun, wherever it lies; none if it was not begun."""
  file = pathlib.Path(config.output.workdir) / _FLAGS
  if not results.read_history(file.parent):
    return []
  try:
    begun = fields.flat(config_of(file.read_text().splitlines(), where=str(file)))
  except (FileNotFoundError, UserError):  # Not begun from here, or by another version.
    return [_FLAGS]
  now = fields.flat(config)
  return [name for name in now if name != "workdir" and now[name] != begun[name]]


def start(command: Sequence[str], kept_open: int, environment: dict[str, str]) -> int:
  """Runs a process to its end; who interrupts this one, lets that one save its state.

  Args:
    command: the process.
    kept_open: a file descriptor that it inherits.
    environment: of the process.

  Returns:
    Its exit status.
  """
  process = subprocess.Popen(
    command, pass_fds=[kept_open], env=environment, stdout=subprocess.DEVNULL
  )
  # By default SIGTERM would end this process and leave the other.
  former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  try:
    return process.wait()
  except BaseException:
    process.terminate()
    process.wait()
    raise
  finally:
    signal.signal(signal.SIGTERM, former)


def train(
  config: Config,
  flags: Sequence[str],
  *,
  say: Callable[[str], None],
  start: Start = start,
) -> str:
  """Starts a run, or goes on with it, unless it is done.

  The directory is locked by whatever trains in it, also by a training that goes on after this
  process was killed: the next start waits for its end.

  Args:
    config: of the run.
    flags: its command line, of which `config` was made.
    say: takes a line about what is done.
    start: runs a process to its end.

  Returns:
    '' if the run is done now, else why it failed.

  Raises:
    UserError: it was stopped.
  """
  workdir = pathlib.Path(config.output.workdir)
  with _locked(workdir, say) as lock:
    if changes := _changes(config):
      return (
        f"the run in {workdir} was begun with other settings ({', '.join(changes)}): move it away,"
        " or give another --workdir"
      )
    if finished(config):
      return ""
    files.write_atomic(workdir / _FLAGS, "\n".join(flags) + "\n")
    environment = dict(os.environ)
    # Runs of one method have the same programs.
    cache = environment.setdefault(
      "JAX_COMPILATION_CACHE_DIR", str(workdir.parent.absolute() / "cache")
    )
    if cache:
      environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    command = [sys.executable, str(_TRAIN), f"--flagfile={workdir / _FLAGS}"]
    status = start(command, lock, environment)
  if status < 0:
    raise UserError(
      f"the run in {workdir} was ended by signal {-status}: the same command goes on from there"
    )
  if status:
    return f"the run in {workdir} ended with status {status}, see above"
  if not finished(config):
    raise UserError(f"the run in {workdir} was stopped: the same command goes on from there")
  return ""


@contextlib.contextmanager
def _locked(workdir: pathlib.Path, say: Callable[[str], None]) -> Iterator[int]:
  """Holds the lock of a run's directory, which is free when all who inherited it have ended."""
  with files.writing(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    lock = open(workdir / _LOCK, "wb")
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      say(f"{workdir} is being trained by another process, which is waited for")
      fcntl.flock(lock, fcntl.LOCK_EX)
    yield lock.fileno()
