"""Results of evaluations, made of their scores."""

import numpy as np

from rlft.evaluation import results, statistics


def result(scores, *, name="a", metric="m", lower=False, trained_on=False, found=float("nan")):
  scores = np.array(scores, np.float32)
  low, high = statistics.bootstrap_interval(scores)
  return results.EvalResult(
    name, metric, statistics.mean(scores), low, high, 32, 16, scores, lower, trained_on, found
  )
