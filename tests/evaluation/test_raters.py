"""Simulated raters of pairs of pictures."""

import numpy as np

from rlft.evaluation import raters


def test_raters_follow_the_oracle_as_often_as_bradley_and_terry_say():
  liked = np.array([[0.5, 0.5, 0.5, np.nan], [0.5, 0.5 - 0.08 * np.log(3), 9.0, 0.5]])
  other = np.array([0.5 - 0.08 * np.log(3), 0.5, 0.5, np.nan])
  # sigmoid(log 3) = 3 / 4.
  expected = [[3 / 4, 1 / 2, 1 / 2, np.nan], [3 / 4, 1 / 4, 1, np.nan]]
  np.testing.assert_allclose(raters.chance(liked, other, noise=0.08), expected)


def test_the_same_pictures_are_preferred_as_often_as_not():
  """Exactly: no draw of luck makes a method better or worse than the base."""
  liked = np.linspace(0, 1, 50)
  assert (raters.chance(liked, liked, noise=0.08) == 0.5).all()
