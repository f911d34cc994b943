"""Several models on the same prompts and noise: what each scores, and its change from the first.

Everything is by prompt: the images of one prompt are not independent of each other.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from rlft.config.settings import EvalConfig
from rlft.evaluation import protocol, seeds, statistics, summary
from rlft.evaluation.evaluate import EvalSpec
from rlft.evaluation.protocol import Results
from rlft.evaluation.results import EvalResult
from rlft.evaluation.seeds import Estimate
from rlft.evaluation.tables import Table

MEAN_OF_PARTS = "mean of the parts"


@dataclasses.dataclass(frozen=True)
class Model:
  """What was measured of a model.

  Attributes:
    name: in tables.
    results: by evaluation, on test prompts.
    guidance: at which each evaluation was measured.
  """

  name: str
  results: Results
  guidance: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Cell:
  """A model in one evaluation.

  Attributes:
    model: its name.
    guidance: at which it was measured.
    mean: with an interval over prompts.
    change: the mean minus that of the first model, prompt by prompt; None for that one.
    verdict: of the change, see `statistics.verdict`.
    found: share of the images that show what is measured; NaN where that is not known.
    unscored: images, or sets, without a score.
  """

  model: str
  guidance: float
  mean: Estimate
  change: Estimate | None
  verdict: str
  found: float
  unscored: int


@dataclasses.dataclass(frozen=True)
class Row:
  """An evaluation of all models.

  Attributes:
    name, metric, lower_is_better: of the evaluation.
    trained_on: models that were trained on the metric.
    images, prompts: of each model.
    cells: one for each model.
    parts: means by part, one for each model; a part's value is followed by its number of prompts.
  """

  name: str
  metric: str
  lower_is_better: bool
  trained_on: Sequence[str]
  images: int
  prompts: int
  cells: Sequence[Cell]
  parts: Mapping[str, tuple[int, Sequence[float]]]

  def to_json(self) -> dict[str, Any]:
    """For JSON, which has no NaN."""
    return protocol.plain(dataclasses.asdict(self))


def rows(
  evals: Sequence[EvalConfig],
  specs: Sequence[EvalSpec],
  models: Sequence[Model],
  *,
  by: str = "",
  of_parts: bool = False,
) -> list[Row]:
  """The evaluations of all models.

  Args:
    evals: as they were given.
    specs: the same, opened.
    models: at least one.
    by: key of the prompts' metadata for parts; '' for none.
    of_parts: adds the mean of the parts' means.

  Raises:
    UserError: a model was measured on other images.
  """
  found = []
  for entry, spec in zip(evals, specs, strict=True):
    results = [model.results[entry.name] for model in models]
    tables = [protocol.scores(entry, [result]) for result in results]
    first = results[0]
    cells = [
      _cell(model, result, table, None if k == 0 else tables[0])
      for k, (model, result, table) in enumerate(zip(models, results, tables, strict=True))
    ]
    found.append(
      Row(
        entry.name,
        first.metric,
        first.lower_is_better,
        [m.name for m, result in zip(models, results, strict=True) if result.trained_on],
        first.images,
        first.prompts,
        cells,
        parts([table[0] for table in tables], _labels(spec, first.prompts, by), of_parts=of_parts),
      )
    )
  return found


def _cell(model: Model, result: EvalResult, table: np.ndarray, before: np.ndarray | None) -> Cell:
  change = None if before is None else seeds.estimate(table, before)
  verdict = ""
  if change is not None:
    verdict = protocol.verdict(change, lower_is_better=result.lower_is_better)
  guidance, mean = model.guidance[result.name], seeds.estimate(table)
  return Cell(model.name, guidance, mean, change, verdict, result.found, result.unscored)


def _labels(spec: EvalSpec, prompts: int, by: str) -> list[str]:
  """The part to which each prompt belongs; none where prompts do not differ in that."""
  labels = [spec.prompts[place].metadata.get(by) for place in range(prompts)] if by else []
  labels = ["none" if x is None else str(x) for x in labels]
  return labels if len(set(labels)) > 1 else []


def parts(
  scores: Sequence[np.ndarray], labels: Sequence[str], *, of_parts: bool = False
) -> dict[str, tuple[int, list[float]]]:
  """Means over the prompts of each part, in the order in which parts come.

  Args:
    scores: `[P]` of each model; NaN is left out.
    labels: P; none for no parts.
    of_parts: adds the mean of the parts' means, in which each part counts as much.

  Returns:
    The number of prompts, and a mean for each model, by part.
  """
  found = {}
  for label in dict.fromkeys(labels):
    places = np.array([one == label for one in labels])
    means = [statistics.mean(values[places]) for values in scores]
    found[label] = (int(places.sum()), means)
  if of_parts and found:
    columns = zip(*(means for _, means in found.values()), strict=True)
    found[MEAN_OF_PARTS] = (len(labels), [statistics.mean(np.array(one)) for one in columns])
  return found


def table(rows: Sequence[Row]) -> Table:
  """All evaluations and models, a line for each."""
  first = rows[0].cells[0].model
  lines = []
  for row in rows:
    for cell in row.cells:
      notes = [f"{row.images} images", f"{row.prompts} prompts"]
      notes += [f"{cell.unscored} unscored"] if cell.unscored else []
      notes += [] if math.isnan(cell.found) else [f"found in {cell.found:.1%}"]
      lines.append(
        (
          row.name + " (trained on)" * (cell.model in row.trained_on),
          cell.model,
          summary.mean(cell.mean),
          "" if cell.change is None else protocol.change_words(cell.change),
          cell.verdict,
          "lower" if row.lower_is_better else "higher",
          f"{cell.guidance:g}",
          ", ".join(notes),
        )
      )
  change = f"change from {first} [{statistics.LEVEL:.0%}]"
  header = ("evaluation", "model", "mean", change, "", "better", "guidance", "of")
  return Table(header, lines)


def parts_table(row: Row) -> Table:
  """The parts of an evaluation, a line for each, a column for each model."""
  digits = row.cells[0].mean.digits
  lines = [
    (label, str(count), *("not scored" if math.isnan(x) else f"{x:.{digits}f}" for x in means))
    for label, (count, means) in row.parts.items()
  ]
  return Table(("part", "prompts", *(cell.model for cell in row.cells)), lines)
