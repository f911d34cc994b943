"""What evaluations found: intervals, comparisons, and the files and table that hold them.

Every mean comes with a bootstrap interval. Before and after are compared image by image, on the
same prompts and seeds, which is what makes small changes visible: the spread between prompts
cancels.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np
import scipy.special
import scipy.stats

from rlft.storage import files
from rlft.types import UserError

EVAL_FILE = "eval.json"
HISTORY_FILE = "eval_history.jsonl"

LEVEL = 0.95
# A change counts from this share of the standard deviation of the scores before: a tenth of what
# is called a small effect by convention (Cohen's d of 0.2).
EFFECT = 0.02
_SEED = 0  # of all resampling
_CHUNK = 2**22  # resampled values held at once
_FEWEST_DIGITS, _MOST_DIGITS = 4, 9  # shown after the point


@dataclasses.dataclass(frozen=True)
class EvalResult:
  """One metric, measured.

  Attributes:
    name: of the evaluation.
    metric: name of the metric.
    mean: of the scores that are not NaN; NaN if all are.
    low, high: 95 % bootstrap interval of `mean`.
    images: N, how many were sampled.
    prompts: how many different prompts they were sampled for.
    scores: `[N]` float32, or `[N / G]` for a set metric; NaN: could not be scored.
    lower_is_better: direction of improvement.
    trained_on: the metric is also a reward of the run.
  """

  name: str
  metric: str
  mean: float
  low: float
  high: float
  images: int
  prompts: int
  scores: np.ndarray
  lower_is_better: bool = False
  trained_on: bool = False

  @property
  def unscored(self) -> int:
    """How many scores are NaN: images, or sets for a set metric."""
    return int(np.isnan(self.scores).sum())

  @property
  def spread(self) -> float:
    """The standard deviation of the scores that are not NaN; NaN if all are."""
    return _spread(self.scores)

  @property
  def digits(self) -> int:
    """How many digits after the point show a change that counts: 4, more where scores are small."""
    if not self.spread > 0:
      return _FEWEST_DIGITS
    digits = range(_FEWEST_DIGITS, _MOST_DIGITS)
    return next((d for d in digits if 0.5 * 10.0**-d <= EFFECT * self.spread), _MOST_DIGITS)

  @property
  def text(self) -> str:
    """The mean and half the width of its interval, for people."""
    if np.isnan(self.mean):
      return "not scored"
    mean = f"{self.mean:.{self.digits}f}"
    half = (self.high - self.low) / 2
    return mean if np.isnan(half) else f"{mean} ±{half:.{self.digits}f}"

  def summary(self) -> dict[str, Any]:
    """The result without its scores, for JSON: NaN is None."""
    return {
      "mean": files.finite(self.mean),
      "low": files.finite(self.low),
      "high": files.finite(self.high),
      "images": self.images,
      "prompts": self.prompts,
      "metric": self.metric,
      "unscored": self.unscored,
      "lower_is_better": self.lower_is_better,
      "trained_on": self.trained_on,
    }


@dataclasses.dataclass(frozen=True)
class Difference:
  """How a metric changed between two evaluations of the same prompts and seeds.

  Attributes:
    mean: of the pairwise differences after - before; NaN if no pair was scored.
    low, high: its 95 % bootstrap interval, over the pairs.
    relative: `mean` as a share of the size of the mean before; NaN if that is 0.
    verdict: 'better' or 'worse', 'no effect' or 'unclear'; see `verdict`.
  """

  mean: float
  low: float
  high: float
  relative: float
  verdict: str


History = Sequence[tuple[int, Mapping[str, EvalResult]]]


def mean(values: np.ndarray) -> float:
  """The mean of what is not NaN; NaN if there is nothing."""
  values = np.asarray(values, np.float64)
  values = values[~np.isnan(values)]
  return float(values.mean()) if len(values) else float("nan")


def _spread(values: np.ndarray) -> float:
  """The standard deviation of what is not NaN; NaN if there is nothing."""
  values = np.asarray(values, np.float64)
  values = values[~np.isnan(values)]
  if not len(values):
    return float("nan")
  return float(values.std()) if values.min() < values.max() else 0.0  # Not what rounding leaves.


def bootstrap_interval(
  values: np.ndarray, *, seed: int = _SEED, level: float = LEVEL, samples: int = 2000
) -> tuple[float, float]:
  """Bootstrap confidence interval of a mean: expanded percentile method.

  The plain percentile interval is too narrow for few values (it has neither Student's t nor the
  n - 1 of a variance). Its tails alpha / 2 are replaced by Phi(-sqrt(n / (n - 1)) t), with t the
  1 - alpha / 2 quantile of Student's distribution with n - 1 degrees of freedom.
  Source: T. Hesterberg, "What Teachers Should Know About the Bootstrap" (2015).

  Args:
    values: `[N]`, independent; NaN is left out.
    seed: of the resampling.
    level: confidence in (0, 1).
    samples: resamples.

  Returns:
    (low, high); both NaN if there are fewer than two values, which say nothing of their spread.
  """
  values = np.asarray(values, np.float64)
  values = values[~np.isnan(values)]
  count = len(values)
  if count < 2:
    return float("nan"), float("nan")
  t = scipy.special.stdtrit(count - 1, (1 + level) / 2)
  tail = scipy.special.ndtr(-t * np.sqrt(count / (count - 1)))
  low, high = scipy.stats.bootstrap(
    (values,),
    np.mean,
    n_resamples=samples,
    batch=max(_CHUNK // count, 1),
    confidence_level=1 - 2 * tail,
    method="percentile",
    rng=np.random.default_rng(seed),
  ).confidence_interval
  return float(low), float(high)


def paired_difference(before: EvalResult, after: EvalResult) -> Difference:
  """The change of a metric, from its scores on the same prompts and seeds.

  Pairs of which one was not scored are left out, so `mean` need not be the difference of the
  means.

  Raises:
    UserError: the two are not measured on as many images, or not with one metric.
  """
  if before.scores.shape != after.scores.shape or before.metric != after.metric:
    raise UserError(
      f"evaluation {before.name} cannot be compared with its start: {before.metric} on"
      f" {before.images} images before, {after.metric} on {after.images} after;"
      " keep --eval as it was, or give another --workdir"
    )
  pairs = after.scores.astype(np.float64) - before.scores.astype(np.float64)
  change = mean(pairs)
  low, high = bootstrap_interval(pairs)
  compared = np.where(np.isnan(pairs), np.nan, before.scores)
  size = abs(mean(compared))
  # Nor does a change count that is not seen at the digits that are shown.
  least = max(EFFECT * _spread(compared), 0.5 * 10.0**-before.digits)
  found = verdict(change, low, high, least=least, lower_is_better=after.lower_is_better)
  return Difference(change, low, high, change / size if size else float("nan"), found)


def verdict(
  change: float, low: float, high: float, *, least: float, lower_is_better: bool = False
) -> str:
  """What a change is called.

  Args:
    change: of a mean; may be NaN.
    low, high: its interval; may be NaN.
    least: the size from which a change counts, more than 0.
    lower_is_better: direction of improvement.

  Returns:
    'better' or 'worse' if the interval excludes 0 and the change counts; 'no effect' if no change
    in the interval counts; else 'unclear'.
  """
  if (low > 0 or high < 0) and abs(change) >= least:
    return "worse" if (change > 0) == lower_is_better else "better"
  return "no effect" if -least < low and high < least else "unclear"


def append_history(
  workdir: str | os.PathLike[str], iteration: int, results: Mapping[str, EvalResult]
) -> None:
  """Adds an evaluation, with all scores, to `eval_history.jsonl`.

  Replaces what the file has of this iteration and later: a resumed run repeats them.

  Raises:
    UserError: the file is damaged or cannot be written.
  """
  path = pathlib.Path(workdir) / HISTORY_FILE
  kept = files.keep_before(path, iteration)
  entry = {
    "iteration": iteration,
    "results": {
      # Nine digits give back a float32 exactly.
      name: result.summary() | {"scores": [files.finite(f"{score:.9g}") for score in result.scores]}
      for name, result in results.items()
    },
  }
  files.write_atomic(path, "".join(json.dumps(line) + "\n" for line in [*kept, entry]))


def resume_history(workdir: str | os.PathLike[str], iteration: int) -> bool:
  """Drops what `eval_history.jsonl` has of iterations after this one, which a run does again.

  Returns:
    Whether this iteration has been evaluated.

  Raises:
    UserError: the file is damaged or cannot be written.
  """
  kept = files.keep_before(pathlib.Path(workdir) / HISTORY_FILE, iteration + 1)
  return any(entry["iteration"] == iteration for entry in kept)


def read_history(workdir: str | os.PathLike[str]) -> list[tuple[int, dict[str, EvalResult]]]:
  """The evaluations so far as (iteration, result by name), oldest first; empty if none.

  Raises:
    UserError: the file is damaged.
  """
  path = pathlib.Path(workdir) / HISTORY_FILE
  history = []
  for entry in files.read_jsonl(path):
    try:
      results = {
        name: EvalResult(
          name=name,
          metric=result["metric"],
          mean=_nan_if_none(result["mean"]),
          low=_nan_if_none(result["low"]),
          high=_nan_if_none(result["high"]),
          images=result["images"],
          prompts=result["prompts"],
          scores=np.array([_nan_if_none(score) for score in result["scores"]], np.float32),
          lower_is_better=result["lower_is_better"],
          trained_on=result["trained_on"],
        )
        for name, result in entry["results"].items()
      }
      history.append((entry["iteration"], results))
    except (KeyError, TypeError, AttributeError) as error:
      raise UserError(f"{path} holds no evaluations ({error!r}): move the file away") from error
  return history


def _nan_if_none(value: float | None) -> float:
  return float("nan") if value is None else value


def write_eval_json(
  workdir: str | os.PathLike[str],
  before: Mapping[str, EvalResult],
  after: Mapping[str, EvalResult],
  history: History = (),
  config: Mapping[str, Any] | None = None,
) -> None:
  """Writes `eval.json`: results before and after, their difference, and how they developed.

  Args:
    workdir: the run's directory.
    before: of the base model, by name.
    after: of the fine-tuned model, by name.
    history: as `read_history` returns it; only means are written.
    config: the run's settings, for the reader.

  Raises:
    UserError: the results cannot be compared, or the file cannot be written.
  """
  differences = {n: paired_difference(before[n], after[n]) for n in before if n in after}
  content = {
    "before": {name: result.summary() for name, result in before.items()},
    "after": {name: result.summary() for name, result in after.items()},
    "difference": {
      name: {
        "mean": files.finite(d.mean),
        "low": files.finite(d.low),
        "high": files.finite(d.high),
        "relative": files.finite(d.relative),
        "verdict": d.verdict,
      }
      for name, d in differences.items()
    },
    "level": LEVEL,
    "history": [
      {"iteration": iteration, "means": {n: files.finite(r.mean) for n, r in results.items()}}
      for iteration, results in history
    ],
    "config": dict(config or {}),
  }
  path = pathlib.Path(workdir) / EVAL_FILE
  files.write_atomic(path, json.dumps(content, indent=2) + "\n")


def table(before: Mapping[str, EvalResult], after: Mapping[str, EvalResult] | None = None) -> str:
  """A text table for the terminal; with `after`, also the differences and their intervals.

  After a mean stands half the width of its interval.

  Args:
    before: results by name.
    after: results of the fine-tuned model; a name that is missing is left blank.
  """
  header = ["evaluation", "metric", "better", "mean" if after is None else "before"]
  if after is not None:
    header += ["after", "change", f"{LEVEL:.0%} interval", "relative", ""]
  rows = [[*header, "images"]]
  for name, old in before.items():
    row = [name, old.metric, "lower" if old.lower_is_better else "higher", old.text]
    last = old
    if after is not None and name in after:
      last = after[name]
      row += [last.text, *change_texts(old, last)]
    row += [""] * (len(header) - len(row))
    unscored = f", {last.unscored} unscored" if last.unscored else ""
    rows.append([*row, f"{last.images} ({last.prompts} prompts{unscored})"])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    # Numbers to the right, words to the left.
    cells = [
      cell.rjust(width) if 3 <= column <= 7 and column < len(header) else cell.ljust(width)
      for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)


def change_texts(before: EvalResult, after: EvalResult) -> tuple[str, str, str, str]:
  """The change, its interval, its share of the mean before, and its verdict; '' for NaN."""
  change = paired_difference(before, after)
  digits = f"+.{before.digits}f"
  return (
    "" if np.isnan(change.mean) else f"{change.mean:{digits}}",
    "" if np.isnan(change.low) else f"[{change.low:{digits}}, {change.high:{digits}}]",
    "" if np.isnan(change.relative) else f"{change.relative:+.1%}",
    change.verdict,
  )


def when(iteration: int) -> str:
  """What an evaluation after so many iterations is called."""
  if not iteration:
    return "at the start"
  return f"after {iteration} iteration{'s' if iteration > 1 else ''}"


def lines(history: History) -> list[str]:
  """The last evaluations, a line for each: the mean, and how it changed since the first.

  Args:
    history: as `read_history` returns it.
  """
  if not history:
    return []
  (_, start), (iteration, found) = history[0], history[-1]
  width = max(map(len, found))
  texts = []
  for name, result in found.items():
    parts = [result.text]
    if 0 < result.unscored < len(result.scores):
      parts.append(f"{result.unscored} of {len(result.scores)} not scored")
    if result.spread == 0 and len(result.scores) > 1:
      parts.append("the same score for all")
    if len(history) > 1 and name in start:
      change, interval, _, called = change_texts(start[name], result)
      if change:
        parts.append(f"{change} {interval} since the start: {called}")
    texts.append(f"{when(iteration)}: {name:{width}}  {', '.join(parts)}")
  return texts
