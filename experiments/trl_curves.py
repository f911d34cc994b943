"""Learning curves beside TRL's DDPOTrainer: same model, prompts, reward, guidance and evaluations.

experiments/trl_venv.sh DIRECTORY
python experiments/trl_curves.py --trl_python=DIRECTORY/bin/python --sweep

Trains the composition task of experiments/miniature.toml, with rlft's policy gradient and with TRL
0.23.1. Both train the whole network, on the same number of images of the same prompts in the same
order, scored by the same JAX network in this process. TRL's saved models are measured in the same
way as rlft's.

Neither side has the settings of the other: --sweep chooses them for each side, by the judge on
development prompts, with the same number of trials and a seed of its own (`_OURS`, `_TRL` below).
--rounds=1 chooses the learning rates alone. Without --sweep, the choice of an earlier sweep is
taken, or else the sweep's first settings. Then --seeds runs of each side are trained, and measured
at their end on test prompts.

If killed, the same command goes on: what is finished is not done again, and both trainers go on
from their last saved state (TRL's is saved after each epoch). Run nothing else meanwhile, since
times are measured.

Result: experiments/trl_curves.csv (all measurements), .svg and .md (for experiments/README.md).
Duration: that of 26 trainings, with --sweep and 3 seeds; of 12, with --sweep --rounds=1 --seeds=2.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import shlex
import sys
from typing import Any

from absl import flags

from rlft.config import flags as cli
from rlft.config.settings import Config
from rlft.evaluation import results
from rlft.evaluation.tables import Table
from rlft.inference.kept import stamp
from rlft.parallel import cpu
from rlft.performance.benchmark.contest import cores
from rlft.performance.peer import choice, curves, measuring, training
from rlft.performance.peer.choice import Settings
from rlft.performance.peer.process import Peer
from rlft.performance.reproduce import runner
from rlft.performance.reproduce import scale as scale_lib
from rlft.performance.reproduce.scale import Experiment, Scale
from rlft.storage import files
from rlft.types import UserError

_ROOT = pathlib.Path(__file__).parents[1]
_SIDES = ("rlft", "TRL")
_METHOD = "rl"
_SWEEP_SEED = 100

_WORKDIR = flags.DEFINE_string("workdir", "runs/trl_curves", "directory of all trainings")
_OUTPUT = flags.DEFINE_string(
  "output", str(_ROOT / "experiments" / "trl_curves"), "the results' path without its suffix"
)
_PYTHON = flags.DEFINE_string(
  "trl_python", None, "Python of the environment that experiments/trl_venv.sh makes", required=True
)
_SCALE = flags.DEFINE_string("scale", "miniature", "name of a file experiments/NAME.toml")
_TASK = flags.DEFINE_string("task", "composition", "one of its tasks")
_SEEDS = flags.DEFINE_integer("seeds", 3, "trainings of each side", lower_bound=1)
_SWEEP = flags.DEFINE_boolean("sweep", False, "choose the settings of both sides first")
_ROUNDS = flags.DEFINE_integer(
  "rounds", 0, "settings that --sweep tries, from the first on; 0: all five", lower_bound=0
)
_CHANGES = flags.DEFINE_multi_string(
  "change", [], "a flag of launch/train.py that replaces the file's, e.g. --iterations=20"
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 0, "images of an iteration; 0: the task's", lower_bound=0
)
_SHOWN = ("sweep", "rounds", "seeds", "scale", "task", "change", "batch_size")  # if they are given

# Where the choice starts, and what is tried of each setting in turn: ten trainings of each side.
# Adam's learning rate; how many steps of it an iteration has; the range of the ratio; and of what
# one side alone has, whether it is better without, or as the other has it.
_OURS: tuple[Settings, Mapping[str, Sequence[Any]]] = (
  {
    "learning_rate": 1.5e-4,
    "train_timesteps": 5,
    "clip_range": 1e-3,
    "pretrain_weight": 1.0,
    "ema_decay": 0.9,
  },
  {
    "learning_rate": (5e-5, 5e-4, 1.5e-3),
    "train_timesteps": (3, 6),
    "clip_range": (1e-4, 1e-2),
    "pretrain_weight": (0.0,),
    "ema_decay": (0.0,),
  },
)
# "batches": into how many an epoch's images are cut, with a step for each.
_TRL: tuple[Settings, Mapping[str, Sequence[Any]]] = (
  {
    "train_learning_rate": 1.5e-4,
    "batches": 4,
    "train_clip_range": 1e-3,
    "inner_epochs": 1,
    "max_grad_norm": 1.0,
  },
  {
    "train_learning_rate": (5e-5, 5e-4, 1.5e-3),
    "batches": (1, 16),
    "train_clip_range": (1e-4, 1e-2),
    "inner_epochs": (2,),
    "max_grad_norm": (0.02,),
  },
)


def main() -> None:
  scale = scale_lib.load(_SCALE.value)
  cpu.split_host(scale.cpu_devices)
  workdir = pathlib.Path(_WORKDIR.value)
  trainings = Trainings(scale, _TASK.value, workdir, _CHANGES.value, _BATCH_SIZE.value)
  trainings.check_workdir()
  chosen, tried = _chosen(
    trainings, workdir / "chosen.json", sweep=_SWEEP.value, rounds=_ROUNDS.value
  )
  seeds, failed = range(_SEEDS.value), []
  found: dict[str, dict[int, pathlib.Path]] = {side: {} for side in _SIDES}
  for number, (seed, side) in enumerate([(s, side) for s in seeds for side in _SIDES], 1):
    _say(f"training {number} of {len(seeds) * len(_SIDES)}: {side}, seed {seed}")
    where, why = trainings.train(side, chosen[side], seed)
    if why:
      failed.append(f"{side} with seed {seed}: {why}")
      _say(f"failed: {failed[-1]}")
    else:
      found[side][seed] = where
  if not all(found.values()):
    raise UserError(f"a side has no training that came to its end ({failed[0]}): try --sweep")
  _write(trainings, found, failed, chosen, tried)


class Trainings:
  """Trains either side, each thing once."""

  def __init__(
    self, scale: Scale, task: str, workdir: pathlib.Path, changes: Sequence[str], batch_size: int
  ):
    """Takes what all trainings share; see the flags."""
    self._scale, self._task, self.workdir, self._changes = scale, task, workdir, changes
    self._own = f"batch_size={batch_size}" if batch_size else ""
    self.config = self.experiment(_OURS[0], 0)[1]
    self.judge = scale_lib.evaluation(task, "oracle")

  def check_workdir(self) -> None:
    """Notes what the trainings in the directory are of.

    Raises:
      UserError: others are there.
    """
    about = {
      "base": stamp(self.config.pretrained),
      "flags": self.experiment(_OURS[0], 0)[0],
    }
    about = json.loads(json.dumps(about))
    file = self.workdir / "about.json"
    if not file.exists():
      files.write_atomic(file, json.dumps(about, indent=1) + "\n")
    elif json.loads(file.read_text()) != about:
      raise UserError(
        f"{self.workdir} has trainings of another base model or with other flags: give another"
        " --workdir, or move it away"
      )

  def experiment(self, settings: Settings, seed: int) -> tuple[list[str], Config]:
    """Flags and settings of a run of ours."""
    method = self._scale.methods.get(_METHOD)
    if method is None:
      raise UserError(f"{self._scale.name}.toml: methods has no {_METHOD}: give another --scale")
    own = [*self._changes, *(f"--{name}={value}" for name, value in settings.items())]
    task = ",".join(filter(None, (method.task, self._own)))
    method = dataclasses.replace(method, flags=[*method.flags, *own], task=task)
    scale = dataclasses.replace(self._scale, methods={_METHOD: method})
    one, place = Experiment(_METHOD, (self._task,), seed), self.workdir / "rlft" / _label(settings)
    return one.flags(scale, place), one.config(scale, place)

  def train(self, side: str, settings: Settings, seed: int) -> tuple[pathlib.Path, str]:
    """Trains with a seed, unless that is done.

    Returns:
      Its directory, and '' or why it failed.

    Raises:
      UserError: it was stopped.
    """
    if side == "rlft":
      lines, config = self.experiment(settings, seed)
      return pathlib.Path(config.output.workdir), runner.train(config, lines, say=_say)
    config = self.experiment(_OURS[0], seed)[1]
    where = self.workdir / "trl" / _label(settings) / str(seed)
    why = training.train(
      config,
      trl_options(settings, config.task[0].batch_size),
      where,
      start=functools.partial(Peer, _PYTHON.value),
      measure=lambda folder: self.measurer.network(folder),
      score=lambda images, prompts: self._score(images, prompts),
      cores=cores(),
      say=_say,
    )
    return where, why

  @functools.cached_property
  def measurer(self) -> measuring.Measurer:
    """On development prompts, as runs measure themselves."""
    return measuring.Measurer(self.config, self.config.eval)

  @functools.cached_property
  def _score(self) -> training.Score:
    return training.scorer(self.config)

  def worth(self, side: str, settings: Settings) -> float:
    """The judge's mean at the end of a training with the sweep's seed, of which more is better."""
    where, why = self.train(side, settings, _SWEEP_SEED)
    if why:
      _say(f"failed: {why}")
      return math.nan
    last = results.read_history(where)[-1][1][self.judge]
    return -last.mean if last.lower_is_better else last.mean


def trl_options(settings: Settings, batch_size: int) -> dict[str, Any]:
  """Options of TRL's DDPOConfig.

  Raises:
    UserError: the images cannot be cut into so many batches.
  """
  if batch_size % settings["batches"]:
    raise UserError(
      f"{batch_size} images cannot be cut into {settings['batches']} batches: give another"
      " --batch_size"
    )
  return {
    "train_learning_rate": settings["train_learning_rate"],
    "train_batch_size": batch_size // settings["batches"],
    "train_clip_range": settings["train_clip_range"],
    "train_num_inner_epochs": settings["inner_epochs"],
    "train_max_grad_norm": settings["max_grad_norm"],
  }


def _chosen(
  trainings: Trainings, file: pathlib.Path, *, sweep: bool, rounds: int = 0
) -> tuple[dict[str, Settings], dict[str, list[tuple[Settings, float]]]]:
  """The settings of each side, and what was tried for them; a choice by so many rounds is kept."""
  grids = {
    side: (start, dict(itertools.islice(all_rounds.items(), rounds or None)))
    for side, (start, all_rounds) in zip(_SIDES, (_OURS, _TRL), strict=True)
  }
  kept = json.loads(file.read_text()) if file.exists() else {}
  if sweep and kept.get("rounds") != rounds:
    found = {}
    for side, (start, grid) in grids.items():
      total = 1 + sum(map(len, grid.values()))
      count = iter(range(1, total + 1))

      def worth(settings: Settings, side=side, total=total, count=count) -> float:
        _say(f"sweep of {side}, {next(count)} of {total}: {_label(settings)}")
        return trainings.worth(side, settings)

      found[side] = choice.choose(start, grid, worth)
    tried = {
      side: [(one, files.finite(value)) for one, value in each] for side, (_, each) in found.items()
    }
    chosen = {side: best for side, (best, _) in found.items()}
    kept = {"rounds": rounds, "chosen": chosen, "tried": tried}
    files.write_atomic(file, json.dumps(kept, indent=1) + "\n")
  if kept:
    return kept["chosen"], kept["tried"]
  return {side: start for side, (start, _) in grids.items()}, {side: [] for side in _SIDES}


def _write(
  trainings: Trainings,
  found: Mapping[str, Mapping[int, pathlib.Path]],
  failed: Sequence[str],
  chosen: Mapping[str, Settings],
  tried: Mapping[str, Sequence[tuple[Settings, float | None]]],
) -> None:
  """Measures the ends on test prompts; writes table, figure and text, and prints the text."""
  config, judge = trainings.config, trainings.judge
  batch_size = config.task[0].batch_size
  sides = {
    side: [curves.read(where, seed=seed, batch_size=batch_size) for seed, where in each.items()]
    for side, each in found.items()
  }
  evals = measuring.on_test(config.eval)
  measurer = measuring.Measurer(config, evals)
  _say("measuring on test prompts")
  base = measuring.kept(trainings.workdir / "base_test.json", measurer.base)
  ends = {side: [] for side in _SIDES}
  for side, each in found.items():
    for where in each.values():
      make = (
        functools.partial(measurer.run, where)
        if side == "rlft"
        else functools.partial(measurer.network, training.newest_state(where))
      )
      ends[side].append(measuring.kept(where / "test.json", make))
  output = pathlib.Path(_OUTPUT.value)
  text = section(
    sides,
    judge,
    lower_is_better=base[judge].lower_is_better,
    final=curves.final(evals, base, ends),
    chosen=chosen,
    tried=tried,
    failed=failed,
    flags=trainings.experiment(chosen["rlft"], 0)[0],
    figure=f"{output.name}.svg",
    options=" ".join(flags.FLAGS[name].serialize() for name in _SHOWN if flags.FLAGS[name].present),
  )
  files.write_atomic(output.with_suffix(".csv"), curves.csv_table(sides).csv())
  files.write_atomic(output.with_suffix(".svg"), curves.figure(sides, judge))
  files.write_atomic(output.with_suffix(".md"), text)
  print(f"{text}\nwritten to {output}.csv, .svg and .md")


def section(
  sides: curves.Sides,
  judge: str,
  *,
  lower_is_better: bool,
  final: Table,
  chosen: Mapping[str, Settings],
  tried: Mapping[str, Sequence[tuple[Settings, float | None]]],
  failed: Sequence[str],
  flags: Sequence[str],
  figure: str,
  options: str,
) -> str:
  """The text about a comparison, in Markdown."""
  first = {side: each[0] for side, each in sides.items()}
  starts = " and ".join(f"{one.means[judge][0]:.4f} ({side})" for side, one in first.items())
  counts = ", ".join(f"{len(each)} of {side}" for side, each in sides.items())
  lines = [
    "## Beside TRL's DDPOTrainer",
    f"    python experiments/trl_curves.py --trl_python=path/to/trl/bin/python {options}",
    "TRL 0.23.1 and rlft: the same base model, prompts in the same order, reward and guidance,"
    f" {first['rlft'].images[-1]:,} images; trainings: {counts}. Curves are on development prompts,"
    f" means over seeds, with the same noise for both: at the start the judge says {starts}."
    " Seconds are of training alone, compilation included.",
    f"![{judge} over images and over seconds of training]({figure})",
    curves.reached(sides, judge, lower_is_better=lower_is_better).markdown(),
    "At the end, on test prompts, with intervals over seeds and prompts:",
    final.markdown(),
    "Settings: " + "; ".join(f"{side} {_label(chosen[side], ', ')}" for side in sides) + ".",
    "rlft trains only those sampling steps that `--algorithm` names, if it names some, which TRL"
    " cannot: it trains all, over which rlft's DDPO learned nothing either (results/rates.md)."
    " TRL has its defaults beside these. With `--pretrain_weight` above 0 rlft takes one more step"
    " an iteration on real pictures, which are not among the images that are counted, and with"
    " `--ema_decay` above 0 it is measured by the average of its weights. All of its flags:"
    f" `{shlex.join(one for one in flags if not one.startswith('--workdir='))}`.",
  ]
  rows = [
    [side, _label(settings, ", "), "failed" if value is None else f"{value:.4f}"]
    for side, each in tried.items()
    for settings, value in each
  ]
  if rows:
    lines += [
      "They were chosen by the judge at the end, on development prompts (its sign turned where less"
      " is better), one after the other, by a seed that is not among those above:",
      Table(["", "tried", judge], rows).markdown(),
    ]
  if edges := _at_an_edge(chosen, tried):
    lines.append(
      f"At the edge of what was tried: {', '.join(edges)}. Values beyond may be better still."
    )
  if failed:
    lines.append(f"Not among these, for they failed: {'; '.join(failed)}.")
  return "\n\n".join(lines) + "\n"


def _at_an_edge(
  chosen: Mapping[str, Settings], tried: Mapping[str, Sequence[tuple[Settings, float | None]]]
) -> list[str]:
  """Chosen values that are the smallest or largest of at least three."""
  found = []
  for side, settings in chosen.items():
    for name, value in settings.items():
      values = {one[name] for one, _ in tried[side]}
      if len(values) > 2 and value in (min(values), max(values)):
        found.append(f"{side} {name}={value:g}")
  return found


def _label(settings: Settings, between: str = "_") -> str:
  return between.join(f"{name}={value:g}" for name, value in settings.items())


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
  cli.main(main)
