"""Means with bootstrap intervals, and what a change of one is called."""

import numpy as np
import scipy  # Which imports its modules when they are used: a second of each command.

LEVEL = 0.95
# A change counts from this share of the standard deviation of the scores before: a tenth of what
# is called a small effect by convention (Cohen's d of 0.2).
EFFECT = 0.02
_SEED = 0  # of all resampling
_CHUNK = 2**22  # resampled values held at once
_FEWEST_DIGITS, _MOST_DIGITS = 4, 9  # shown after the point


def mean(values: np.ndarray) -> float:
  """The mean of what is not NaN; NaN if there is nothing."""
  values = _known(values)
  return float(values.mean()) if len(values) else float("nan")


def spread(values: np.ndarray) -> float:
  """The standard deviation of what is not NaN; NaN if there is nothing."""
  values = _known(values)
  if not len(values):
    return float("nan")
  return float(values.std()) if values.min() < values.max() else 0.0  # Not what rounding leaves.


def _known(values: np.ndarray) -> np.ndarray:
  """What is not NaN, in float64."""
  values = np.asarray(values, np.float64)
  return values[~np.isnan(values)]


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
  values = _known(values)
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


def digits(spread: float) -> int:
  """How many digits after the point show a change that counts: 4, more where scores are small.

  Args:
    spread: the scores' standard deviation; may be 0 or NaN.
  """
  if not spread > 0:
    return _FEWEST_DIGITS
  enough = (d for d in range(_FEWEST_DIGITS, _MOST_DIGITS) if 0.5 * 10.0**-d <= EFFECT * spread)
  return next(enough, _MOST_DIGITS)


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
