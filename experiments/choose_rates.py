"""Chooses the learning rate of each method of a scale, by one rule, on development prompts.

    python experiments/choose_rates.py --scale=miniature --workdir=runs/rates

Each method of experiments/miniature.toml is trained on --task for --iterations iterations: at its
own learning rate, at three times and at a third of it, and then on in the better direction until it
gets worse. The seed is one that no table has. The choice is the learning rate at which the *judge*
(the oracle, not the trained reward: a rate that hacks is not good) gains most on development
prompts. The table says what to write into the file; the file itself is not changed.

If killed, the same command goes on. Result: experiments/results/rates.md and rates.csv.
"""

from collections.abc import Callable, Iterator, Sequence
import math
import os
import pathlib
import sys

from absl import flags

from rlft.config import flags as cli
from rlft.evaluation import results
from rlft.evaluation.tables import Table
from rlft.performance.reproduce import runner
from rlft.performance.reproduce import scale as scale_lib
from rlft.performance.reproduce.scale import Experiment, Scale, Variation
from rlft.storage import files

_SCALE = flags.DEFINE_string("scale", "miniature", "the name of a file experiments/NAME.toml")
_TASK = flags.DEFINE_string("task", "preference", "one of its tasks")
_METHODS = flags.DEFINE_string("methods", "", "comma-separated; all if empty")
_ITERATIONS = flags.DEFINE_integer("iterations", 10, "of each training", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", "runs/rates", "directory of the trainings")
_OUTPUT = flags.DEFINE_string("output", "experiments/results", "directory of the result")

_FACTOR = 3
_MOST = 3  # steps in one direction
_SEED = 100  # of no table


def main() -> None:
  scale, task, workdir = scale_lib.load(_SCALE.value), _TASK.value, pathlib.Path(_WORKDIR.value)
  names = [name for name in _METHODS.value.split(",") if name] or list(scale.methods)
  # Trainings of one method differ in the rate only, and so in few of their programs.
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(workdir.absolute() / "cache"))
  rows = []
  for name in names:
    own = Experiment(name, (task,), _SEED).config(scale, workdir).optimizer.learning_rate
    for rate, (judged, reward) in climb(
      own, lambda rate, name=name: _trained(scale, name, task, rate, workdir)
    ):
      rows.append((scale.methods[name].title, rate, judged, reward))
      _write(table(rows))
  print(pathlib.Path(_OUTPUT.value, "rates.md").read_text())


def climb(
  start: float, measure: Callable[[float], tuple[float, float]]
) -> Iterator[tuple[float, tuple[float, float]]]:
  """Measures a rate and its neighbours, and goes on from the best as long as that is at an end.

  Args:
    start: the first rate.
    measure: (the judge's gain, the reward's) at a rate; NaN where training failed.

  Yields:
    (rate, gains) in the order in which they were measured.
  """

  def at(step: int) -> tuple[float, tuple[float, float]]:
    rate = float(f"{start * float(_FACTOR) ** step:.2g}")
    return rate, measure(rate)

  def judged(gains: tuple[float, float]) -> float:
    return -math.inf if math.isnan(gains[0]) else gains[0]

  first = at(0)
  yield first
  for direction in (1, -1):
    best, moved = judged(first[1]), False
    for step in range(1, _MOST + 1):
      found = at(direction * step)
      yield found
      if judged(found[1]) <= best:
        break
      best, moved = judged(found[1]), True
    if moved:
      return


def _trained(
  scale: Scale, name: str, task: str, rate: float, workdir: pathlib.Path
) -> tuple[float, float]:
  """The gains of the judge and of the reward, from before to after; NaN if training failed."""
  own = [f"--learning_rate={rate:g}", f"--iterations={_ITERATIONS.value}", "--eval_every=0"]
  scale = scale.varied(name, task, Variation(own))
  experiment, place = Experiment(name, (task,), _SEED), workdir / f"{rate:g}"
  lines, config = experiment.flags(scale, place), experiment.config(scale, place)
  _say(f"{name} at {rate:g}")
  if why := runner.train(config, lines, say=_say):
    _say(f"failed: {why}")
    return math.nan, math.nan
  history = results.read_history(config.output.workdir)
  (_, before), (_, after) = history[0], history[-1]
  names = [scale_lib.evaluation(task, role) for role in ("oracle", "trained")]
  oracle, trained = (after[name].gain_over(before[name]) for name in names)
  return oracle, trained


def table(rows: Sequence[tuple[str, float, float, float]]) -> Table:
  """What is measured so far; the best rate of each method is marked.

  Args:
    rows: title of a method, rate, the judge's gain and the reward's; NaN where it failed.
  """
  best: dict[str, tuple[float, float]] = {}
  for title, rate, judged, _ in rows:
    if not math.isnan(judged):
      best[title] = max(best.get(title, (judged, rate)), (judged, rate))
  shown = [
    (
      title,
      f"{rate:g}",
      f"{judged:+.4f}",
      f"{reward:+.4f}",
      "chosen" if (judged, rate) == best.get(title) else "",
    )
    for title, rate, judged, reward in rows
  ]
  return Table(("method", "learning rate", "judge's gain", "reward's gain", ""), shown)


def _write(found: Table) -> None:
  output = pathlib.Path(_OUTPUT.value)
  text = (
    f"# Learning rates\n\nMade by `python experiments/choose_rates.py --scale={_SCALE.value}"
    f" --task={_TASK.value} --iterations={_ITERATIONS.value}`: gains on development prompts, seed"
    f" {_SEED}.\n\n{found.markdown()}\n"
  )
  files.write_atomic(output / "rates.md", text)
  files.write_atomic(output / "rates.csv", found.csv())


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
  cli.main(main)
