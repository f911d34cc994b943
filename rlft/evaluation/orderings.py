"""Whether methods come in the order in which a source has them."""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools

import numpy as np

from rlft.evaluation import seeds
from rlft.evaluation.seeds import Estimate

SAME, OTHER, UNDECIDED = "same", "other", "not decided by these seeds"


@dataclasses.dataclass(frozen=True)
class Order:
  """Two methods, of which a source says that the first is better.

  Attributes:
    better, worse: their names.
    difference: ours, the first minus the second; NaN where one was not measured.
    verdict: `SAME` or `OTHER` if the interval of the difference excludes 0, else `UNDECIDED`.
  """

  better: str
  worse: str
  difference: Estimate
  verdict: str


def of_values(
  values: Mapping[str, float], *, lower_is_better: bool = False
) -> list[tuple[str, str]]:
  """All pairs (better, worse) of names; equals are left out."""
  ordered = sorted(values, key=values.get, reverse=not lower_is_better)
  pairs = itertools.combinations(ordered, 2)
  return [(one, other) for one, other in pairs if values[one] != values[other]]


def check(
  pairs: Sequence[tuple[str, str]],
  scores: Mapping[str, np.ndarray],
  *,
  lower_is_better: bool = False,
) -> list[Order]:
  """Compares pairs (better, worse) with scores.

  Args:
    pairs: what the source says.
    scores: `[S, P]` of each method, see `seeds`; one that is missing decides nothing.
    lower_is_better: direction of the scores.
  """
  found = []
  for better, worse in pairs:
    difference = Estimate(*[float("nan")] * 4)
    if better in scores and worse in scores:
      difference = seeds.estimate(scores[better], scores[worse])
    above, below = difference.low > 0, difference.high < 0
    as_said, reversed_ = (below, above) if lower_is_better else (above, below)
    verdict = SAME if as_said else OTHER if reversed_ else UNDECIDED
    found.append(Order(better, worse, difference, verdict))
  return found
