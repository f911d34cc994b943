"""What was trained and measured, as the tables look at it."""

from collections.abc import Mapping
import dataclasses
import functools
import math

import numpy as np

from rlft.config.settings import Config, EvalConfig
from rlft.evaluation import convergence, protocol, raters, results
from rlft.evaluation.protocol import Base, Results
from rlft.performance.reproduce import paper
from rlft.performance.reproduce.paper import Column, PaperTable, Row
from rlft.performance.reproduce.scale import Scale
from rlft.report import metrics
from rlft.storage import files
from rlft.types import UserError


@dataclasses.dataclass(frozen=True)
class Trained:
  """A run that is finished.

  Attributes:
    config: its settings.
    results: on the test prompts.
  """

  config: Config
  results: Results

  @functools.cached_property
  def history(self) -> results.History:
    """Its own evaluations."""
    return results.read_history(self.config.output.workdir)

  @functools.cached_property
  def metrics(self) -> list[dict]:
    """Its iterations."""
    return files.read_jsonl(files.path_of(self.config.output.workdir) / metrics.METRICS_FILE)

  @property
  def images(self) -> int:
    """Drawn in an iteration."""
    return sum(task.batch_size for task in self.config.task)

  def seconds(self, iterations: float) -> float:
    """Seconds of drawing, scoring and learning in so many iterations, without compilation.

    That many times the median, without the first: in a run that was started again, others compile,
    too.
    """
    times = [row.get("time/iteration_s") or math.nan for row in self.metrics]
    return iterations * float(np.nanmedian(times[1:] or times))

  def reaches(self, name: str, level: float, *, lower_is_better: bool) -> float | None:
    """Iterations until an evaluation of its own is at a level, between two on a straight line."""
    points = [(iteration, found[name].mean) for iteration, found in self.history if name in found]
    x, y = np.array(points).reshape(-1, 2).T
    return convergence.first_at(x, y, level, lower_is_better=lower_is_better)


@dataclasses.dataclass(frozen=True)
class Findings:
  """All of it.

  Attributes:
    scale: what was to be trained.
    base: the base model.
    evals: of the protocol, by name.
    runs: by method and tasks, then by seed.
    measured: directory of what the base model was measured.
    chosen: of the best of several of the base model's images, each measure at the base model's
      best guidance for it; None if there is no such row.
  """

  scale: Scale
  base: Base
  evals: Mapping[str, EvalConfig]
  runs: Mapping[tuple[str, tuple[str, ...]], Mapping[int, Trained]]
  measured: files.Path
  chosen: Results | None = None

  def of(self, row: Row) -> list[Trained]:
    """The runs of a row, by seed."""
    return list(self.runs.get((row.method, row.tasks), {}).values())

  def rows(self, table: PaperTable) -> dict[str, Row]:
    """The paper's rows, and those of methods that the scale adds."""
    rows = {**table.rows, **self.added(table.name, table.on)}
    if table is paper.T1 and self.chosen is not None:
      best = Row(f"base, best of {self.scale.best_of} by the trained reward", chosen=True)
      rows = {paper.BASE: rows.pop(paper.BASE), paper.BEST_OF: best, **rows}
    return rows

  def added(self, part: str, on: tuple[str, ...]) -> dict[str, Row]:
    """The rows of methods that the scale adds to a part of the results, trained on some tasks."""
    titles = {name: method.title for name, method in self.scale.added(part).items()}
    return {name: Row(title, name, on) for name, title in titles.items()}

  def guidance(self, column: Column) -> float:
    """The base model's best for a column's measure."""
    self._entry(column)
    return self.base.best(column.measure)

  def lower_is_better(self, column: Column) -> bool:
    """The direction of a column; raters' votes go up."""
    return not column.rated and self._at_best(column).lower_is_better

  def scores(self, column: Column, row: Row) -> np.ndarray | None:
    """`[S, P]`, see `rlft.evaluation.seeds`; None if nothing of the row is there."""
    entry, at_best = self._entry(column), self._at_best(column)
    if row.chosen:
      found = [self.chosen[column.measure]] if column.measure in self.chosen else []
    elif row.method:
      found = [run.results[column.measure] for run in self.of(row)]
    else:
      found = [at_best]
    if not found:
      return None
    if column.rated:
      found = [self._rated(one, at_best) for one in found]
    return protocol.scores(entry, found)

  def _rated(self, one: results.EvalResult, base: results.EvalResult) -> results.EvalResult:
    """How likely raters are to prefer each picture to the base's of the same prompt and noise."""
    shares = raters.chance(one.scores, base.scores, noise=self.scale.rater_noise)
    return dataclasses.replace(one, scores=shares)

  def _entry(self, column: Column) -> EvalConfig:
    if column.measure not in self.evals:
      raise UserError(
        f"{self.scale.name}.toml: evals measure no {column.measure}, which a table shows: add it,"
        " or leave the table out with --only"
      )
    return self.evals[column.measure]

  def _at_best(self, column: Column) -> results.EvalResult:
    return self.base.test[self.guidance(column)][column.measure]
