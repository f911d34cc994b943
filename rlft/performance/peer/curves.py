"""What both sides have learnt: curves over images and over seconds, levels reached, the ends."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib

import numpy as np

from rlft.config.settings import EvalConfig
from rlft.evaluation import convergence, protocol, results, seeds, summary
from rlft.evaluation.results import EvalResult
from rlft.evaluation.tables import Table
from rlft.report import figures
from rlft.report.charts import Series
from rlft.report.metrics import METRICS_FILE
from rlft.storage import files
from rlft.types import UserError

SHARES = (0.25, 0.5, 0.75, 1.0)  # of the lesser of both gains: levels that are reached


@dataclasses.dataclass(frozen=True)
class Curve:
  """A training, measured N times on its way.

  Attributes:
    seed: of the training.
    iterations: `[N]`, how many were done.
    images: `[N]`, drawn to train until then.
    seconds: `[N]`, of training until then, without evaluations and saving.
    means: `[N]` by the name of the evaluation.
  """

  seed: int
  iterations: np.ndarray
  images: np.ndarray
  seconds: np.ndarray
  means: Mapping[str, np.ndarray]


Sides = Mapping[str, Sequence[Curve]]  # by name; all measured at the same iterations


def read(workdir: pathlib.Path, *, seed: int, batch_size: int) -> Curve:
  """The curve of a finished training of either side.

  Args:
    workdir: with `eval_history.jsonl` and `metrics.jsonl`.
    seed: of the training.
    batch_size: images of an iteration.

  Raises:
    UserError: iterations that were evaluated are missing in the metrics.
  """
  history = results.read_history(workdir)
  metrics = files.read_jsonl(workdir / METRICS_FILE)
  iterations = np.array([iteration for iteration, _ in history])
  if len(metrics) < iterations.max(initial=0):
    raise UserError(f"{workdir}/{METRICS_FILE} lacks iterations: move the directory away")
  seconds = np.cumsum([0.0, *(line["time/iteration_s"] for line in metrics)])
  means = {name: np.array([found[name].mean for _, found in history]) for name in history[0][1]}
  return Curve(seed, iterations, iterations * batch_size, seconds[iterations], means)


def csv_table(sides: Sides) -> Table:
  """Every measurement."""
  names = list(next(iter(sides.values()))[0].means)
  rows = []
  for side, curves in sides.items():
    for curve in curves:
      for i, iteration in enumerate(curve.iterations):
        numbers = [f"{curve.means[name][i]:.5f}" for name in names]
        where = [f"{curve.seed}", f"{iteration}", f"{curve.images[i]}", f"{curve.seconds[i]:.1f}"]
        rows.append([side, *where, *numbers])
  return Table(["side", "seed", "iteration", "images", "seconds", *names], rows)


def figure(sides: Sides, name: str) -> str:
  """An SVG picture: the curves of an evaluation over images, and over seconds of training."""
  panels = []
  for over in ("images", "seconds"):
    series = [
      Series(side, _mean(curves, over), y.mean(0), y.min(0), y.max(0))
      for side, curves in sides.items()
      for y in [np.array([curve.means[name] for curve in curves])]
    ]
    panels.append((f"{name}, over {over} of training", series))
  return figures.svg(panels, x_label=["images", "seconds"])


def reached(sides: Sides, name: str, *, lower_is_better: bool = False) -> Table:
  """Images and seconds to levels between the start and what both reach, on the mean curves.

  Below, the values at equal images (the end) and at equal time (when the faster side was done).

  Args:
    sides: two.
    name: of the evaluation.
    lower_is_better: of its metric.
  """
  means = {
    side: np.mean([curve.means[name] for curve in curves], axis=0) for side, curves in sides.items()
  }
  over = {
    side: {axis: _mean(curves, axis) for axis in ("images", "seconds")}
    for side, curves in sides.items()
  }
  sign = -1 if lower_is_better else 1
  start = float(np.mean([mean[0] for mean in means.values()]))
  gain = min(float(np.nanmax(sign * (mean - start))) for mean in means.values())
  header = [name]
  header += [f"{side}, {axis}" for axis in ("images", "seconds") for side in sides]
  rows = []
  for share in SHARES if gain > 0 else ():
    level = start + sign * share * gain
    cells = []
    for axis in ("images", "seconds"):
      for side, mean in means.items():
        x = convergence.first_at(over[side][axis], mean, level, lower_is_better=lower_is_better)
        cells.append("never" if x is None else f"{x:,.0f}")
    rows.append([f"{level:.3f}", *cells])
  for axis in ("images", "seconds"):
    least = min(over[side][axis][-1] for side in sides)
    values = [f"{np.interp(least, over[side][axis], mean):.3f}" for side, mean in means.items()]
    blank = [""] * len(sides)
    cells = [*values, *blank] if axis == "images" else [*blank, *values]
    rows.append([f"after {least:,.0f} {axis}", *cells])
  return Table(header, rows)


def final(
  entries: Sequence[EvalConfig],
  base: Mapping[str, EvalResult],
  ends: Mapping[str, Sequence[Mapping[str, EvalResult]]],
) -> Table:
  """Values at the end, with intervals over seeds and prompts, and the first side minus the second.

  Args:
    entries: what was measured.
    base: the base model's results, by the name of the evaluation.
    ends: of both sides, for each seed.
  """
  first, second = ends
  rows = []
  for entry in entries:
    tables = {
      side: protocol.scores(entry, [found[entry.name] for found in each])
      for side, each in ends.items()
    }
    before = protocol.scores(entry, [base[entry.name]])
    values = [seeds.estimate(table) for table in (before, *tables.values())]
    change = seeds.estimate(tables[first], tables[second])
    words = [*map(summary.mean, values), protocol.change_words(change)]
    rows.append([entry.name, *words])
  return Table(["", "base", first, second, f"{first} - {second}"], rows)


def _mean(curves: Sequence[Curve], axis: str) -> np.ndarray:
  """`[N]` images or seconds, means over the seeds."""
  return np.mean([getattr(curve, axis) for curve in curves], axis=0)
