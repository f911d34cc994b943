"""Whether methods come in a given order."""

import numpy as np

from rlft.evaluation import orderings

JITTER = 0.01 * (-1.0) ** np.arange(12)


def test_pairs_of_figures():
  pairs = orderings.of_values({"a": 1.0, "b": 3.0, "c": 2.0, "d": 2.0})
  assert pairs == [("b", "c"), ("b", "d"), ("b", "a"), ("c", "a"), ("d", "a")]
  assert orderings.of_values({"a": 1.0, "b": 3.0}, lower_is_better=True) == [("a", "b")]


def test_an_order_is_the_same_another_or_not_decided():
  def scores(level, spread=0.0, seeds=3):
    return np.stack([level + spread * (i - 1) + JITTER * (i - 1) for i in range(seeds)])

  found = {"high": scores(0.9), "low": scores(0.5), "any": scores(0.7, spread=1.0)}
  pairs = [("high", "low"), ("low", "high"), ("high", "any"), ("high", "missing")]
  verdicts = [one.verdict for one in orderings.check(pairs, found)]
  # Seeds of `any` differ by more than it is below `high`.
  assert verdicts == ["same", "other", "not decided by these seeds", "not decided by these seeds"]
  lower = [one.verdict for one in orderings.check(pairs[:2], found, lower_is_better=True)]
  assert lower == ["other", "same"]


def test_one_number_of_one_seed_decides_nothing():
  scores = {"a": np.array([[1.0]]), "b": np.array([[2.0]])}
  (found,) = orderings.check([("a", "b")], scores, lower_is_better=True)
  assert found.verdict == orderings.UNDECIDED and found.difference.mean == -1
  times = {"a": np.array([[1.0], [1.1], [0.9]]), "b": np.array([[3.0], [3.2], [2.9]])}
  (found,) = orderings.check([("a", "b")], times, lower_is_better=True)
  assert found.verdict == "same"
