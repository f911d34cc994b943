"""What evaluations found, compared, and the files that hold it.

Every mean comes with a bootstrap interval. Before and after are compared image by image, on the
same prompts and seeds, which is what makes small changes visible: the spread between prompts
cancels.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import types
from typing import Any

import numpy as np

from rlft.evaluation import statistics
from rlft.storage import files
from rlft.types import UserError

EVAL_FILE = "eval.json"
HISTORY_FILE = "eval_history.jsonl"
BASE_FILE = "eval_base.json"


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
    found: share of the images that show what is measured; NaN where that is not known.
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
  found: float = float("nan")

  @property
  def unscored(self) -> int:
    """How many scores are NaN: images, or sets for a set metric."""
    return int(np.isnan(self.scores).sum())

  @property
  def spread(self) -> float:
    """The standard deviation of the scores that are not NaN; NaN if all are."""
    return statistics.spread(self.scores)

  @property
  def digits(self) -> int:
    """How many digits after the point are shown."""
    return statistics.digits(self.spread)

  def gain_over(self, before: "EvalResult") -> float:
    """By how much the mean is better than an earlier one, in the metric's direction."""
    change = self.mean - before.mean
    return -change if self.lower_is_better else change

  def to_json(self) -> dict[str, Any]:
    """The whole result for JSON, but for its name; `from_json` gives back every score exactly."""
    # Nine digits say a float32 exactly.
    return self.summary() | {"scores": [files.finite(f"{score:.9g}") for score in self.scores]}

  @classmethod
  def from_json(cls, name: str, content: Mapping[str, Any]) -> "EvalResult":
    """The inverse of `to_json`.

    Raises:
      ValueError, KeyError, TypeError, AttributeError: it is no result.
    """
    return cls(
      name=name,
      metric=content["metric"],
      mean=_nan_if_none(content["mean"]),
      low=_nan_if_none(content["low"]),
      high=_nan_if_none(content["high"]),
      images=content["images"],
      prompts=content["prompts"],
      scores=np.array([_nan_if_none(score) for score in content["scores"]], np.float32),
      lower_is_better=content["lower_is_better"],
      trained_on=content["trained_on"],
      found=_nan_if_none(content.get("found")),
    )

  def summary(self) -> dict[str, Any]:
    """The result without its scores, for JSON: NaN is None; `found` is there where it is known."""
    found = {} if np.isnan(self.found) else {"found": self.found}
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
      **found,
    }


@dataclasses.dataclass(frozen=True)
class Difference:
  """How a metric changed between two evaluations of the same prompts and seeds.

  Attributes:
    mean: of the pairwise differences after - before; NaN if no pair was scored.
    low, high: its bootstrap interval, over the pairs.
    relative: `mean` as a share of the size of the mean before; NaN if that is 0.
    verdict: 'better' or 'worse', 'no effect' or 'unclear'; see `statistics.verdict`.
  """

  mean: float
  low: float
  high: float
  relative: float
  verdict: str


@dataclasses.dataclass(frozen=True)
class BestBase:
  """The base model in one metric, at the guidance at which it is best."""

  guidance: float
  result: EvalResult


History = Sequence[tuple[int, Mapping[str, EvalResult]]]


def paired_difference(
  before: EvalResult, after: EvalResult, *, level: float = statistics.LEVEL
) -> Difference:
  """The change of a metric, from its scores on the same prompts and seeds.

  Pairs of which one was not scored are left out, so `mean` need not be the difference of the
  means.

  Args:
    before: the metric, measured.
    after: the same, measured later.
    level: confidence of the interval in (0, 1).

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
  change = statistics.mean(pairs)
  low, high = statistics.bootstrap_interval(pairs, level=level)
  compared = np.where(np.isnan(pairs), np.nan, before.scores)
  size = abs(statistics.mean(compared))
  return Difference(
    mean=change,
    low=low,
    high=high,
    relative=change / size if size else float("nan"),
    verdict=statistics.verdict(
      change,
      low,
      high,
      # Nor does a change count that is not seen at the digits that are shown.
      least=max(statistics.EFFECT * statistics.spread(compared), 0.5 * 10.0**-before.digits),
      lower_is_better=after.lower_is_better,
    ),
  )


def append_history(
  workdir: str | os.PathLike[str], iteration: int, results: Mapping[str, EvalResult]
) -> None:
  """Adds an evaluation, with all scores, to `eval_history.jsonl`.

  Replaces what the file has of this iteration and later: a resumed run repeats them.

  Raises:
    UserError: the file is damaged or cannot be written.
  """
  path = files.path_of(workdir) / HISTORY_FILE
  kept = files.keep_before(path, iteration)
  entry = {
    "iteration": iteration,
    "results": {name: result.to_json() for name, result in results.items()},
  }
  files.write_atomic(path, "".join(json.dumps(line) + "\n" for line in [*kept, entry]))


def resume_history(workdir: str | os.PathLike[str], iteration: int) -> bool:
  """Drops what `eval_history.jsonl` has of iterations after this one, which a run does again.

  Returns:
    Whether this iteration has been evaluated.

  Raises:
    UserError: the file is damaged or cannot be written.
  """
  kept = files.keep_before(files.path_of(workdir) / HISTORY_FILE, iteration + 1)
  return any(entry["iteration"] == iteration for entry in kept)


def read_history(workdir: str | os.PathLike[str]) -> list[tuple[int, dict[str, EvalResult]]]:
  """The evaluations so far as (iteration, result by name), oldest first; empty if none.

  Raises:
    UserError: the file is damaged.
  """
  path = files.path_of(workdir) / HISTORY_FILE
  history = []
  for entry in files.read_jsonl(path):
    try:
      results = {
        name: EvalResult.from_json(name, result) for name, result in entry["results"].items()
      }
      history.append((entry["iteration"], results))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(f"{path} holds no evaluations ({error!r}): move the file away") from error
  return history


def write_base(workdir: str | os.PathLike[str], best: Mapping[str, BestBase]) -> None:
  """Writes `eval_base.json`: the base model at its best guidance, by evaluation, with all scores.

  Raises:
    UserError: the file cannot be written.
  """
  content = {
    name: {"guidance": base.guidance, **base.result.to_json()} for name, base in best.items()
  }
  files.write_atomic(files.path_of(workdir) / BASE_FILE, json.dumps(content) + "\n")


def read_base(workdir: str | os.PathLike[str]) -> dict[str, BestBase]:
  """What `write_base` wrote; empty if nothing.

  Raises:
    UserError: the file is damaged.
  """
  path = files.path_of(workdir) / BASE_FILE
  if not path.exists():
    return {}
  with files.reading(path):
    text = path.read_text()
  try:
    return {
      name: BestBase(content["guidance"], EvalResult.from_json(name, content))
      for name, content in json.loads(text).items()
    }
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{path} holds no evaluations ({error!r}): move the file away") from error


def _nan_if_none(value: float | None) -> float:
  return float("nan") if value is None else value


def write_eval_json(
  workdir: str | os.PathLike[str],
  before: Mapping[str, EvalResult],
  after: Mapping[str, EvalResult],
  history: History = (),
  config: Mapping[str, Any] | None = None,
  best: Mapping[str, BestBase] = types.MappingProxyType({}),
) -> None:
  """Writes `eval.json`: results before and after, their difference, and how they developed.

  Args:
    workdir: the run's directory.
    before: of the base model, by name.
    after: of the fine-tuned model, by name.
    history: as `read_history` returns it; only means are written.
    config: the run's settings, for the reader.
    best: the base model at its best guidance, by name; the difference to it is written as well.

  Raises:
    UserError: the results cannot be compared, or the file cannot be written.
  """
  content = {
    "before": {name: result.summary() for name, result in before.items()},
    "after": {name: result.summary() for name, result in after.items()},
    "difference": _differences(before, after),
    "level": statistics.LEVEL,
    "history": [
      {"iteration": iteration, "means": {n: files.finite(r.mean) for n, r in results.items()}}
      for iteration, results in history
    ],
    "config": dict(config or {}),
  }
  if best:
    content["best_base"] = {
      name: {"guidance": base.guidance, **base.result.summary()} for name, base in best.items()
    }
    beaten = {name: base.result for name, base in best.items()}
    content["difference_to_best_base"] = _differences(beaten, after)
  path = files.path_of(workdir) / EVAL_FILE
  files.write_atomic(path, json.dumps(content, indent=2) + "\n")


def _differences(
  before: Mapping[str, EvalResult], after: Mapping[str, EvalResult]
) -> dict[str, dict[str, Any]]:
  """The paired differences of what both have, for JSON."""
  found = {name: paired_difference(before[name], after[name]) for name in before if name in after}
  return {
    name: {
      "mean": files.finite(one.mean),
      "low": files.finite(one.low),
      "high": files.finite(one.high),
      "relative": files.finite(one.relative),
      "verdict": one.verdict,
    }
    for name, one in found.items()
  }
