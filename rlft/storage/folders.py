"""Folders of checkpoints: their names, which Orbax knows by a number, and what holds them all.

That number is a checkpoint's step: it has the iterations and the tasks that are done in it.
"""

from collections.abc import Iterator
import datetime
import os
import re
import tempfile

from etils import epath
import orbax.checkpoint as ocp

from rlft.storage import files

_TASKS = 1000  # more than a run has
_NAMED_BY_ITERATION = _TASKS * 2**32  # the steps below are those of names that were plain numbers


def step_of(iteration: int, task: int) -> int:
  """The step after the first `task` tasks of what follows `iteration` iterations."""
  return _NAMED_BY_ITERATION + iteration * _TASKS + task


def iteration_of(step: int) -> int:
  """Iterations done; of a name that was a plain number, its units of work."""
  return step if step < _NAMED_BY_ITERATION else (step - _NAMED_BY_ITERATION) // _TASKS


def name_of(step: int) -> str:
  """`iteration_7`, and `iteration_7_task_1` for a save after the first task of what follows it.

  Names used to be plain numbers, of units of work. Such a checkpoint is resumed, and is older than
  those that have their iteration in their name.
  """
  if step < _NAMED_BY_ITERATION:
    return str(step)
  task = step % _TASKS
  return f"iteration_{iteration_of(step)}" + (f"_task_{task}" if task else "")


def _step_named(name: str) -> int | None:
  """The inverse of `name_of`; None for what is no checkpoint."""
  found = re.fullmatch(r"(\d+)|iteration_(\d+)(?:_task_(\d+))?", name)
  if found is None:
    return None
  number, done, task = found.groups(default="0")
  return int(number) if found[1] else step_of(int(done), int(task))


def newest(directory: str | os.PathLike[str]) -> int | None:
  """The step of the newest whole checkpoint, which says how far a run came; None without one."""
  path, link = opened(os.fspath(directory), make=False)
  steps = [found.step for found in Names().find_all(path)]
  if link:
    link.cleanup()
  return max(steps, default=None)


class _Found(ocp.path.step.Metadata):
  """A checkpoint, for Orbax, which would else read a time from a file that may be damaged."""

  @property
  def commit_timestamp(self) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(0, tz=datetime.UTC)  # Nothing is kept by its age.


class Names(ocp.path.step.NameFormat):
  """Names of checkpoints, for Orbax."""

  def build_name(self, step: int) -> str:
    return name_of(step)

  def find_all(self, base_path: epath.PathLike) -> Iterator[_Found]:
    for path in entries(epath.Path(base_path)):
      step = _step_named(path.name)
      if step is not None and ocp.path.step.is_path_finalized(path):
        yield _Found(step=step, path=path)

  def find_step(self, base_path: epath.PathLike, step: int) -> _Found:
    path = epath.Path(base_path) / name_of(step)
    if not path.exists():
      raise ValueError(f"there is no {path}")
    return _Found(step=step, path=path)


def entries(directory: epath.Path) -> list[epath.Path]:
  """What is in the directory; a bucket has none before something is in it."""
  try:
    return list(directory.iterdir())
  except FileNotFoundError:
    return []


def opened(directory: str, *, make: bool) -> tuple[epath.Path, tempfile.TemporaryDirectory | None]:
  """The directory under a name that the libraries do not misread, and what holds that name.

  Orbax makes a pattern of the name, without escaping it, to find what each process wrote of a save:
  where brackets are in it a save ends without its parts, in silence. TensorStore takes a backslash
  for a slash, Orbax 'gs:/' and epath '/gs/' for a bucket, and none takes bytes that are not UTF-8.

  Args:
    directory: a path, or the address of a bucket.
    make: make the directory where it is missing.

  Raises:
    OSError: it cannot be made.
  """
  if files.is_bucket(directory):
    return epath.Path(directory), None
  path = os.path.abspath(directory)
  if re.fullmatch(r"(?!/(gs|s3|az|hf)/)[\w/. -]*", path):
    return epath.Path(path), None
  if make:
    os.makedirs(path, exist_ok=True)
  holder = tempfile.TemporaryDirectory(prefix="rlft-")
  link = os.path.join(holder.name, "checkpoints")
  os.symlink(path, link, target_is_directory=True)
  return epath.Path(link), holder
