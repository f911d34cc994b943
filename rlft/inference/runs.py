"""Trained runs, and which of them are one method with several seeds."""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import itertools
import os
import pathlib
from typing import Any

from rlft.config import fields, stored
from rlft.config.settings import Config, EvaluationSettings, OutputSettings
from rlft.report.run_files import CONFIG_FILE
from rlft.storage import checksums, files, folders
from rlft.types import UserError

# Settings that do not change what is trained.
_ELSEWHERE = {"seed", "eval", "task"}
_ELSEWHERE |= {*fields.leaves(EvaluationSettings), *fields.leaves(OutputSettings)}


@dataclasses.dataclass(frozen=True)
class TrainedRun:
  """A run that has a checkpoint.

  Attributes:
    path: its directory.
    config: its settings.
    checkpoint: name of its newest checkpoint.
  """

  path: str
  config: Config
  checkpoint: str

  @property
  def stamp(self) -> list[str]:
    """Tells its newest checkpoint from that of another run that was in the same place."""
    sums = files.path_of(self.path) / "checkpoints" / self.checkpoint / checksums.FILE
    with files.reading(sums):
      text = sums.read_bytes() if sums.exists() else b""  # Older checkpoints have none.
    return [self.checkpoint, hashlib.sha256(text).hexdigest()]


def is_run(path: str) -> bool:
  """Whether a path is the directory of a run that has begun to save, and no model.

  Raises:
    UserError: what is there cannot be looked at.
  """
  with files.reading(path):
    return (files.path_of(path) / "checkpoints").is_dir()


def check_run(path: str | os.PathLike[str]) -> None:
  """Raises `UserError` if a path is no run's directory."""
  if not (files.path_of(path) / CONFIG_FILE).exists():
    raise UserError(f"{path} is no directory of a run: give one that launch/train.py has made")


def open_run(path: str) -> TrainedRun:
  """Reads what is known of a run without its weights.

  Raises:
    UserError: there is no run, or it has no checkpoint yet.
  """
  check_run(path)
  file = files.path_of(path) / CONFIG_FILE
  with files.reading(file):
    text = file.read_text()
  newest = folders.newest(files.path_of(path) / "checkpoints")
  if newest is None:
    raise UserError(f"{path} has no checkpoint yet: wait for the run's first")
  return TrainedRun(path, stored.from_json(text), folders.name_of(newest))


def grouped(runs: Sequence[TrainedRun]) -> dict[str, list[TrainedRun]]:
  """The runs of each method, by its name: those that differ in nothing but their seeds.

  A method of several runs is called by what the names of their directories begin with.

  Raises:
    UserError: two runs with the same settings have the same seed, too.
  """
  groups: dict[str, list[TrainedRun]] = {}
  for run in runs:
    groups.setdefault(repr(_method(run.config)), []).append(run)
  named: dict[str, list[TrainedRun]] = {}
  for group in groups.values():
    for one, other in itertools.combinations(group, 2):
      if one.config.seed == other.config.seed:
        raise UserError(
          f"{one.path} and {other.path} are runs with the same settings and --seed="
          f"{one.config.seed}: leave one out"
        )
    named[_name([run.path for run in group], named)] = sorted(group, key=lambda r: r.config.seed)
  return named


def _method(config: Config) -> dict[str, Any]:
  """The settings that make a method."""
  settings = {k: v for k, v in fields.flat(config).items() if k not in _ELSEWHERE}
  return settings | {"task": [dataclasses.replace(task, watch="") for task in config.task]}


def _name(paths: Sequence[str], taken: Mapping[str, Any]) -> str:
  """What a method is called; a number is added where that is taken."""
  names = [pathlib.PurePath(path).name for path in paths]
  common = os.path.commonprefix(names)
  if len(names) > 1:
    common = common.rstrip("0123456789-_.") or names[0]
  numbered = (f"{common} ({number})" for number in itertools.count(2))
  return common if common not in taken else next(name for name in numbered if name not in taken)
