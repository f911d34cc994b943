"""Means with intervals that hold for other training seeds and other prompts.

The scores of a method are a table `[S, P]`: a row for each training seed, a column for each
held-out prompt. A prompt comes with its noise and is the same in all rows and in all tables, so
seeds and prompts are crossed, and tables can be compared prompt by prompt.
"""

import dataclasses

import numpy as np
import scipy

from rlft.evaluation import statistics

_SEED = 0  # of all resampling


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean, or a difference of means.

  Attributes:
    mean: over seeds and prompts; NaN if no prompt was scored with every seed.
    low, high: its interval; NaN where nothing says how uncertain it is.
    spread: standard deviation over prompts of the scores (of a difference: of those before).
  """

  mean: float
  low: float
  high: float
  spread: float

  @property
  def digits(self) -> int:
    """How many digits after the point are shown."""
    return statistics.digits(self.spread)


def by_prompt(scores: np.ndarray, *, prompts: int, images_per_prompt: int = 1) -> np.ndarray:
  """Means over the images of each prompt, which are not independent of each other.

  Args:
    scores: `[N]`, those of a prompt's images one after the other; after the last prompt, the first
      comes again (see `evaluate.EvalSpec`). NaN is left out.
    prompts: P, how many different prompts there are.
    images_per_prompt: neighbours with one prompt; 1 for scores of sets.

  Returns:
    `[P]`; NaN where none of a prompt's images has a score.
  """
  scores = np.asarray(scores, np.float64)
  places = np.arange(len(scores)) // images_per_prompt % prompts
  scored = ~np.isnan(scores)
  sums = np.bincount(places, np.where(scored, scores, 0), minlength=prompts)
  counts = np.bincount(places, scored, minlength=prompts)
  return np.where(counts, sums / np.maximum(counts, 1), np.nan)


def estimate(
  scores: np.ndarray,
  before: np.ndarray | None = None,
  *,
  level: float = statistics.LEVEL,
  samples: int = 2000,
) -> Estimate:
  """The mean of a table, or of one table minus another, by a hierarchical bootstrap.

  Seeds are drawn with replacement in each table, then prompts, the same for all seeds and tables.
  With few seeds, resampling alone is too narrow (three seeds would be held by their own extremes).
  So the distances of the resampled means from the mean are stretched: their standard deviation to
  the unbiased one, and their tails to those of Student's t,

      V  = var(prompts' means) / P + sum over tables of var(seeds' means) / S     (each with n - 1)
      df = V^2 / (sum of the squared terms over their n - 1)                      (Satterthwaite)

  which counts what seeds and prompts do together twice, and is wide rather than narrow. A table of
  one seed adds no term: the interval then holds for that seed only. Where all tables have one, this
  is the paired bootstrap over prompts of `statistics.bootstrap_interval`.
  Sources: A. B. Owen, "The pigeonhole bootstrap" (2007); F. E. Satterthwaite (1946).

  Args:
    scores: `[S, P]`; prompts that have no score (NaN) with some seed, or before, are left out.
    before: `[S', P]` of the same prompts; S' = 1 for a base model, which has no seeds.
    level: confidence in (0, 1).
    samples: resamples.
  """
  tables = [np.asarray(scores, np.float64)]
  if before is not None:
    tables.append(-np.asarray(before, np.float64))
  whole = np.all([np.isfinite(table).all(axis=0) for table in tables], axis=0)
  tables = [table[:, whole] for table in tables]
  columns = np.sum([table.mean(axis=0) for table in tables], axis=0)
  spread = statistics.spread(tables[-1].mean(axis=0))
  if not len(columns):
    return Estimate(*[float("nan")] * 3, spread)
  mean = float(columns.mean())
  if all(len(table) == 1 for table in tables):
    return Estimate(mean, *statistics.bootstrap_interval(columns, level=level), spread)
  groups = [columns, *(table.mean(axis=1) for table in tables)]
  groups = [group for group in groups if len(group) > 1]
  terms = np.array([group.var(ddof=1) / len(group) for group in groups])
  freedom = np.array([len(group) - 1 for group in groups])
  # Of equal numbers their rounding is left.
  if np.sqrt(terms.sum()) <= 1e-12 * max(np.abs(table).max() for table in tables):
    return Estimate(mean, mean, mean, spread)
  degrees = terms.sum() ** 2 / np.sum(terms**2 / freedom)
  drawn = _resampled(tables, samples) - mean
  tail = (1 - level) / 2
  stretch = np.sqrt(terms.sum()) / drawn.std()
  stretch *= scipy.special.stdtrit(degrees, tail) / scipy.special.ndtri(tail)
  low, high = mean + stretch * np.quantile(drawn, [tail, 1 - tail])
  return Estimate(mean, float(low), float(high), spread)


def _resampled(tables: list[np.ndarray], samples: int) -> np.ndarray:
  """`[samples]` means of the summed tables, each of seeds and prompts drawn anew."""
  rng = np.random.default_rng(_SEED)

  def shares(count: int) -> np.ndarray:
    drawn = rng.integers(count, size=(samples, count)) + count * np.arange(samples)[:, None]
    return np.bincount(drawn.ravel(), minlength=samples * count).reshape(samples, count) / count

  of_prompts = shares(tables[0].shape[1])
  return sum(np.sum(shares(len(table)) @ table * of_prompts, axis=1) for table in tables)
