"""Simulated raters of pairs of pictures."""

import numpy as np
import pytest

from rlft.evaluation import raters


def test_raters_follow_the_oracle_as_often_as_bradley_and_terry_say():
  liked = np.full(4000, 0.5)
  shares = raters.preferred(liked, 0.5 - 0.08 * np.log(3), noise=0.08, raters=5)
  # sigmoid(log 3) = 3 / 4; of 20,000 votes, with a standard error of 0.003.
  assert shares.mean() == pytest.approx(0.75, abs=0.01)
  assert set(np.unique(shares * 5).round(6)) <= set(range(6))
  assert raters.preferred(liked, liked, noise=0.08).mean() == pytest.approx(0.5, abs=0.01)
  assert raters.preferred(liked, liked - 9, noise=0.08).min() == 1


def test_raters_have_the_same_luck_whatever_they_are_shown():
  """So a hair's breadth between two methods is not told as a difference."""
  liked = np.linspace(0.3, 0.7, 20_000)
  above, below = (raters.preferred(liked, liked + x, noise=0.08) for x in (-0.001, 0.001))
  assert (above >= below).all() and (above != below).mean() < 0.1
  liked[0] = np.nan  # Nor does one that cannot be judged change the votes on others.
  np.testing.assert_array_equal(raters.preferred(liked, liked - 0.001, noise=0.08)[1:], above[1:])


def test_raters_are_the_same_each_time_and_say_nothing_of_what_has_no_score():
  liked = np.array([[0.1, 0.2, np.nan], [0.3, 0.1, 0.2]])
  other = np.array([0.2, np.nan, 0.1])
  shares = raters.preferred(liked, other, noise=0.1)
  np.testing.assert_array_equal(np.isnan(shares), [[False, True, True], [False, True, False]])
  np.testing.assert_array_equal(shares, raters.preferred(liked, other, noise=0.1))
