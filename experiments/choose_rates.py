"""Chooses the learning rate of each method of a scale, by one rule, on development prompts.

    python experiments/choose_rates.py --scale=miniature --workdir=runs/rates

Each method of experiments/miniature.toml is trained on --task for as long as the tables train it,
at its own rate and at three times as much, and on upwards until its judge gains no more; if three
times was no better, downwards by thirds in the same way; with a seed that no table has. Chosen is
the smallest rate whose *judge* (the oracle, not the trained reward: a rate that hacks is not good)
is not surely worse, on development prompts, than at the best rate: of rates that cannot be told
apart the smallest, which other seeds bear best.
The table says what to write into the file; nothing is changed in it.

Killed, the same command goes on. Result: experiments/results/rates.md and rates.csv.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import math
import os
import pathlib
import shlex
import sys

from absl import flags

from rlft.config import flags as cli
from rlft.evaluation import results
from rlft.evaluation.results import EvalResult
from rlft.evaluation.tables import Table
from rlft.performance.reproduce import runner
from rlft.performance.reproduce import scale as scale_lib
from rlft.performance.reproduce.scale import Experiment, Scale, Variation
from rlft.storage import files

_SCALE = flags.DEFINE_string("scale", "miniature", "the name of a file experiments/NAME.toml")
_TASK = flags.DEFINE_string("task", "preference", "one of its tasks")
_METHODS = flags.DEFINE_string("methods", "", "comma-separated; all if empty")
_WORKDIR = flags.DEFINE_string("workdir", "runs/rates", "directory of the trainings")
_OUTPUT = flags.DEFINE_string("output", "experiments/results", "directory of the result")

_FACTOR = 3
_MOST = 6  # steps in one direction
_SEED = 100  # of no table


@dataclasses.dataclass(frozen=True)
class Trial:
  """A rate that was tried.

  Attributes:
    title: of the method.
    rate: the learning rate.
    judged: by the judge, before and after; None if the training failed.
    reward: the gain of what it is trained on.
  """

  title: str
  rate: float
  judged: tuple[EvalResult, EvalResult] | None
  reward: float = math.nan

  @property
  def gain(self) -> float:
    """The judge's; NaN if the training failed."""
    return math.nan if self.judged is None else self.judged[1].gain_over(self.judged[0])


def main() -> None:
  scale, task, workdir = scale_lib.load(_SCALE.value), _TASK.value, pathlib.Path(_WORKDIR.value)
  names = [name for name in _METHODS.value.split(",") if name] or list(scale.methods)
  # Trainings of one method differ in the rate only, and so in few of their programs.
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(workdir.absolute() / "cache"))
  trials: list[Trial] = []
  for name in names:
    own = Experiment(name, (task,), _SEED).config(scale, workdir).optimizer.learning_rate
    for trial in climb(own, lambda rate, name=name: _trained(scale, name, task, rate, workdir)):
      trials.append(trial)
      _write(table(trials), scale, names)
  print(pathlib.Path(_OUTPUT.value, "rates.md").read_text())


def climb(start: float, measure: Callable[[float], Trial]) -> Iterator[Trial]:
  """Measures a rate and higher ones while they are better; if the first of them is not, lower ones.

  Args:
    start: the first rate.
    measure: trains at a rate.

  Yields:
    Trials in the order in which they were made.
  """

  def at(step: int) -> Trial:
    return measure(float(f"{start * float(_FACTOR) ** step:.2g}"))

  def judged(trial: Trial) -> float:
    return -math.inf if math.isnan(trial.gain) else trial.gain

  first = at(0)
  yield first
  for direction in (1, -1):
    best, moved = judged(first), False
    for step in range(1, _MOST + 1):
      found = at(direction * step)
      yield found
      if judged(found) <= best:
        break
      best, moved = judged(found), True
    if moved:
      return


def _trained(scale: Scale, name: str, task: str, rate: float, workdir: pathlib.Path) -> Trial:
  """What a training at a rate came to, from before to after."""
  scale = scale.varied(name, task, Variation([f"--learning_rate={rate:g}", "--eval_every=0"]))
  experiment, place = Experiment(name, (task,), _SEED), workdir / f"{rate:g}"
  lines, config = experiment.flags(scale, place), experiment.config(scale, place)
  title = scale.methods[name].title
  _say(f"{name} at {rate:g}")
  if why := runner.train(config, lines, say=_say):
    _say(f"failed: {why}")
    return Trial(title, rate, None)
  history = results.read_history(config.output.workdir)
  (_, before), (_, after) = history[0], history[-1]
  oracle, trained = (scale_lib.evaluation(task, role) for role in ("oracle", "trained"))
  reward = after[trained].gain_over(before[trained])
  return Trial(title, rate, (before[oracle], after[oracle]), reward)


def chosen(trials: Sequence[Trial]) -> Trial | None:
  """The smallest rate of those that are not surely worse than the best one by the judge."""
  there = [trial for trial in trials if trial.judged]
  if not there:
    return None
  best = max(there, key=lambda trial: trial.gain)
  told = (
    (trial, results.paired_difference(trial.judged[1], best.judged[1]).verdict) for trial in there
  )
  return min((trial for trial, verdict in told if verdict != "better"), key=lambda one: one.rate)


def table(trials: Sequence[Trial]) -> Table:
  """What is measured so far; the rate of each method that is chosen is marked."""
  by_title: dict[str, list[Trial]] = {}
  for trial in trials:
    by_title.setdefault(trial.title, []).append(trial)
  picked = {title: chosen(group) for title, group in by_title.items()}
  shown = []
  for trial in trials:
    gains = f"{trial.gain:+.4f}", f"{trial.reward:+.4f}"
    mark = "chosen" if trial is picked[trial.title] else ""
    shown.append((trial.title, f"{trial.rate:g}", *gains, mark))
  return Table(("method", "learning rate", "judge's gain", "reward's gain", ""), shown)


def _write(found: Table, scale: Scale, names: Sequence[str]) -> None:
  output = pathlib.Path(_OUTPUT.value)
  line = ["python", "experiments/choose_rates.py", f"--scale={scale.name}", f"--task={_TASK.value}"]
  if names != list(scale.methods):
    line.append(f"--methods={','.join(names)}")
  text = (
    f"# Learning rates\n\nMade by `{shlex.join(line)}`: gains on development prompts, seed {_SEED}."
    f" Chosen is the smallest rate of those that are not surely worse by the judge than the best."
    f"\n\n{found.markdown()}\n"
  )
  files.write_atomic(output / "rates.md", text)
  files.write_atomic(output / "rates.csv", found.csv())


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
  cli.main(main)
