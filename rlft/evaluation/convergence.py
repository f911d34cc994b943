"""When a run had learnt nearly all that it was to learn, if it had."""

import numpy as np

from rlft.evaluation import results

SHARE = 0.95  # of the gain at the end
STILL = 1 / 4  # of a run, in which one that has converged gets no better


def converged(history: results.History, name: str, *, share: float = SHARE) -> int | None:
  """The first evaluated iteration at which a run had this share of its own final gain.

  Args:
    history: as `results.read_history` returns it.
    name: of the evaluation by which it is judged.
    share: in (0, 1].

  Returns:
    How many iterations were done; None if the end is not better than the start, or is better than
    the last measurement in the first three quarters of the run: then it is still rising.
  """
  points = [(iteration, found[name]) for iteration, found in history if name in found]
  if len(points) < 2:
    return None
  start, end = points[0][1], points[-1][1]
  if results.paired_difference(start, end).verdict != "better":
    return None
  still = points[-1][0] - STILL * (points[-1][0] - points[0][0])
  before = next(found for i, found in reversed(points) if i <= still)
  if results.paired_difference(before, end).verdict == "better":
    return None
  needed = share * (end.mean - start.mean)
  sign = 1 if needed > 0 else -1
  return next(i for i, found in points if sign * (found.mean - start.mean) >= sign * needed)


def first_at(
  x: np.ndarray, y: np.ndarray, level: float, *, lower_is_better: bool = False
) -> float | None:
  """Where a curve is first at a level or better, on straight lines between measurements.

  Args:
    x: `[N]`, increasing.
    y: `[N]`.
    level: a value of `y`.
    lower_is_better: less of `y` is better; else more is.

  Returns:
    A value of `x`; None if the curve is never so good.
  """
  (there,) = np.nonzero(y <= level if lower_is_better else y >= level)
  if not len(there):
    return None
  i = there[0]
  if i == 0:
    return float(x[0])
  share = (level - y[i - 1]) / (y[i] - y[i - 1])
  return float(x[i - 1] + share * (x[i] - x[i - 1]))
