"""Trained models against their base model at its best, with what they may have lost beside it.

docs/protocol.md says which prompts, guidance and noise are used for what. Here is what is made of
the scores: which guidance is the base's best for a metric, and how far a method is from it.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from rlft.config.settings import EvalConfig
from rlft.evaluation import seeds, statistics, summary
from rlft.evaluation.results import EvalResult
from rlft.evaluation.seeds import Estimate
from rlft.evaluation.tables import Table
from rlft.storage import files
from rlft.types import UserError

Results = Mapping[str, EvalResult]  # by the name of the evaluation


@dataclasses.dataclass(frozen=True)
class Base:
  """The base model's results by guidance scale.

  Attributes:
    development: of every guidance that is considered, on the development prompts.
    test: of those that are some metric's best, or a method's own, on the test prompts.
  """

  development: Mapping[float, Results]
  test: Mapping[float, Results]

  def best(self, name: str) -> float:
    """The guidance at which a metric is best on the development prompts; the least of equals.

    Raises:
      UserError: the metric could score nothing.
    """
    return best_guidance(self.development, name)


@dataclasses.dataclass(frozen=True)
class Method:
  """What the runs found that differ in nothing but their seeds.

  Attributes:
    name: for tables.
    guidance: at which they were trained, and are measured.
    runs: their test results by training seed.
    trained_on: evaluations whose metric is a reward of the runs.
  """

  name: str
  guidance: float
  runs: Mapping[int, Results]
  trained_on: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A method and the base in one metric, on the same test prompts with the same noise.

  Attributes:
    method: name of the method.
    measure: name of the evaluation.
    metric: name of its metric.
    lower_is_better: direction of the metric.
    guard: the metric is not to become worse, rather than to be improved.
    trained_on: it is a reward of the method.
    best_guidance: of the base, for this metric.
    best, same, after: the base at its best guidance, the base at the method's, the method.
    gain: the method minus the base at its best guidance, prompt by prompt.
    verdict: of the gain, see `statistics.verdict`.
    found_best, found_after: the shares of the images that show what is measured; NaN where that is
      not known.
  """

  method: str
  measure: str
  metric: str
  lower_is_better: bool
  guard: bool
  trained_on: bool
  best_guidance: float
  best: Estimate
  same: Estimate
  after: Estimate
  gain: Estimate
  verdict: str
  found_best: float
  found_after: float

  def to_json(self) -> dict[str, Any]:
    """For JSON, which has no NaN."""
    return plain(dataclasses.asdict(self))


def plain(value: Any) -> Any:
  """A value as JSON can hold it: None for numbers that are not finite."""
  if isinstance(value, dict):
    return {key: plain(one) for key, one in value.items()}
  if isinstance(value, list | tuple):
    return [plain(one) for one in value]
  return files.finite(value) if isinstance(value, float) else value


def swept(
  measure: Callable[[str, float, Sequence[str]], Results],
  names: Sequence[str],
  scales: Sequence[float],
  *,
  also: Sequence[float] = (),
) -> Base:
  """Measures a model at all scales on development prompts, and on test prompts as far as needed.

  Args:
    measure: measures the named evaluations of a split ('development' or 'test') at a guidance.
    names: of the evaluations.
    scales: guidance scales that are considered.
    also: further ones at which all is measured on test prompts.

  Raises:
    UserError: a metric could score nothing.
  """
  development = {scale: measure("development", scale, names) for scale in scales}
  best = {name: best_guidance(development, name) for name in names}
  test = {}
  for scale in sorted({*best.values(), *also}):
    wanted = [name for name in names if scale in also or best[name] == scale]
    test[scale] = measure("test", scale, wanted)
  return Base(development, test)


def best_guidance(development: Mapping[float, Results], name: str) -> float:
  """The guidance at which a metric's mean is best; the least of equals.

  Raises:
    UserError: the metric could score nothing.
  """
  means = {guidance: found[name].mean for guidance, found in sorted(development.items())}
  means = {guidance: mean for guidance, mean in means.items() if not math.isnan(mean)}
  if not means:
    raise UserError(
      f"--eval=name={name}: the metric could score none of the base model's images: see whether it"
      " can score these prompts at all"
    )
  lower = next(iter(development.values()))[name].lower_is_better
  return (min if lower else max)(means, key=means.get)


def scores(entry: EvalConfig, found: Sequence[EvalResult]) -> np.ndarray:
  """The table `[S, P]` of an evaluation: a row for each seed, a column for each prompt.

  Args:
    entry: the evaluation.
    found: what it found with each seed, the same images each time.

  Raises:
    UserError: the results are not of the same images.
  """
  first = found[0]
  for other in found:
    if (other.metric, other.scores.shape) != (first.metric, first.scores.shape):
      raise UserError(
        f"evaluation {first.name} was measured in two ways ({first.metric} on {first.images}"
        f" images, {other.metric} on {other.images}): measure again with another --output"
      )
  # A set has one score.
  each = entry.images_per_prompt if len(first.scores) == first.images else 1
  return np.stack(
    [seeds.by_prompt(one.scores, prompts=one.prompts, images_per_prompt=each) for one in found]
  )


def compare(method: Method, base: Base, evals: Sequence[EvalConfig]) -> list[Comparison]:
  """A method against the base, in every evaluation."""
  found = []
  for entry in evals:
    name = entry.name
    after = scores(entry, [results[name] for results in method.runs.values()])
    guidance = base.best(name)
    best, same = (scores(entry, [base.test[g][name]]) for g in (guidance, method.guidance))
    example = base.test[guidance][name]
    gain = seeds.estimate(after, best)
    estimates = [seeds.estimate(table) for table in (best, same, after)]
    found.append(
      Comparison(
        method.name,
        name,
        example.metric,
        example.lower_is_better,
        entry.guard,
        name in method.trained_on,
        guidance,
        *estimates,
        gain,
        verdict(gain, lower_is_better=example.lower_is_better),
        example.found,
        float(np.mean([results[name].found for results in method.runs.values()])),
      )
    )
  return found


def verdict(change: Estimate, *, lower_is_better: bool) -> str:
  """What a change is called, as in the report of a run; see `statistics.verdict`."""
  least = max(statistics.EFFECT * change.spread, 0.5 * 10.0**-change.digits)
  if math.isnan(least):
    return "unclear"
  return statistics.verdict(
    change.mean, change.low, change.high, least=least, lower_is_better=lower_is_better
  )


def change_words(change: Estimate) -> str:
  """A difference and its interval."""
  if math.isnan(change.mean):
    return ""
  digits = f"+.{change.digits}f"
  text = f"{change.mean:{digits}}"
  if math.isnan(change.low):
    return text
  return f"{text} [{change.low:{digits}}, {change.high:{digits}}]"


def _found(share: float) -> str:
  """Of how many images a measure is made that cannot be made of all."""
  return "" if math.isnan(share) else f", found in {share:.1%}"


def table(comparisons: Sequence[Comparison]) -> Table:
  """The comparisons of one method, guards last."""
  rows = []
  for one in sorted(comparisons, key=lambda one: one.guard):
    marks = " (trained on)" * one.trained_on + " (guard)" * one.guard
    rows.append(
      (
        one.measure + marks,
        one.metric,
        "lower" if one.lower_is_better else "higher",
        f"{summary.mean(one.best)} at {one.best_guidance:g}{_found(one.found_best)}",
        summary.mean(one.same),
        summary.mean(one.after) + _found(one.found_after),
        change_words(one.gain),
        one.verdict,
      )
    )
  header = (
    "evaluation",
    "metric",
    "better",
    "base, best guidance",
    "base, same guidance",
    "after",
    f"gain over the best [{statistics.LEVEL:.0%}]",
    "",
  )
  return Table(header, tuple(rows))


def sweep(base: Base) -> Table:
  """The base model: on development prompts by guidance, the best in bold; that on test prompts."""
  names = next(iter(base.development.values()))
  rows = []
  for name in names:
    best = base.best(name)
    means = {guidance: summary.mean(found[name]) for guidance, found in base.development.items()}
    cells = (f"**{mean}**" if guidance == best else mean for guidance, mean in means.items())
    rows.append((name, *cells, summary.mean(base.test[best][name])))
  scales = (f"{guidance:g}" for guidance in base.development)
  return Table(("evaluation", *scales, "test, at the best"), rows)


def flat(rows: Sequence[Mapping[str, Any]]) -> Table:
  """Comparisons as `Comparison.to_json` returns them, a column for each number."""
  flattened = []
  for row in rows:
    cells: dict[str, Any] = {}
    for key, value in row.items():
      parts = value if isinstance(value, dict) else {"": value}
      cells |= {f"{key}_{part}".rstrip("_"): one for part, one in parts.items()}
    flattened.append({key: "" if one is None else str(one) for key, one in cells.items()})
  header = tuple(flattened[0]) if flattened else ()
  return Table(header, [tuple(cells.values()) for cells in flattened])
