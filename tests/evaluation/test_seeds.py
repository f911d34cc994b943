"""Intervals over training seeds and prompts."""

import numpy as np
import pytest
import scipy.stats

from rlft.evaluation import seeds, statistics

NAN = float("nan")


def table(rng, count, prompts, *, of_seeds, of_prompts, of_both):
  """Normal effects of seeds, of prompts, and of both together; the mean is 0."""
  return (
    of_seeds * rng.normal(size=(count, 1))
    + of_prompts * rng.normal(size=prompts)
    + of_both * rng.normal(size=(count, prompts))
  )


def test_images_of_a_prompt_are_averaged():
  # Two prompts, two images each, twice: a a b b a a b b.
  found = seeds.by_prompt(np.array([1, 2, 3, 4, 5, NAN, 7, 8]), prompts=2, images_per_prompt=2)
  assert found.tolist() == [(1 + 2 + 5) / 3, (3 + 4 + 7 + 8) / 4]
  # A third prompt that came once less, and one without any score.
  assert seeds.by_prompt(np.array([1.0, NAN, 3, 5]), prompts=3).tolist()[::2] == [3.0, 3.0]
  assert np.isnan(seeds.by_prompt(np.array([1.0, NAN, 3, 5]), prompts=3)[1])


def test_one_seed_is_the_paired_bootstrap_over_prompts():
  rng = np.random.default_rng(0)
  before, after = rng.normal(size=(2, 1, 40))
  found = seeds.estimate(after, before)
  assert (found.low, found.high) == statistics.bootstrap_interval((after - before)[0])
  assert found.mean == pytest.approx((after - before).mean())
  alone = seeds.estimate(after)
  assert (alone.low, alone.high) == statistics.bootstrap_interval(after[0])


def test_a_literal():
  # Means of prompts 2 and 3, of seeds 1.5 and 3.5: V = 0.5 / 2 + 2 / 2 = 1.25 and
  # df = 1.25^2 / (0.25^2 + 1^2) = 1.4706. Seeds and prompts only add up here, so a resample is off
  # by -1, 0, 0 or 1 (seeds) and by -0.5, 0, 0 or 0.5 (prompts): -1.5 in one case of 16, more than
  # 2.5 %, and its variance is 0.5 + 0.125.
  found = seeds.estimate(np.array([[1.0, 2], [3, 4]]))
  t = scipy.stats.t.ppf(0.975, 1.4706)
  half = 1.5 * np.sqrt(1.25 / 0.625) * t / 1.95996
  assert found.mean == 2.5
  assert found.high - 2.5 == pytest.approx(half, rel=0.03)
  assert 2.5 - found.low == pytest.approx(half, rel=0.03)


def test_interval_of_many_normal_scores_is_the_closed_form():
  rng = np.random.default_rng(1)
  scores = table(rng, 20, 400, of_seeds=0.1, of_prompts=1, of_both=1)
  before = table(rng, 1, 400, of_seeds=0, of_prompts=1, of_both=0)
  found = seeds.estimate(scores, before)
  pairs = (scores - before).mean(axis=0)
  error = np.sqrt(pairs.var(ddof=1) / 400 + scores.mean(axis=1).var(ddof=1) / 20)
  assert found.mean == pytest.approx(pairs.mean())
  assert found.high - found.mean == pytest.approx(1.97 * error, rel=0.07)
  assert found.mean - found.low == pytest.approx(1.97 * error, rel=0.07)
  assert found.spread == pytest.approx(before.std())
  narrow = seeds.estimate(scores, before, level=0.5)
  assert narrow.high - narrow.low == pytest.approx(2 * 0.675 * error, rel=0.1)


@pytest.mark.parametrize(
  ("count", "of_seeds", "of_prompts", "of_both", "least", "most"),
  [
    (3, 1.0, 0.1, 0.1, 0.92, 0.98),  # three seeds decide: Student's t with 2 degrees of freedom
    (3, 0.0, 1.0, 0.1, 0.92, 0.98),  # prompts decide
    (3, 0.2, 1.0, 1.0, 0.93, 0.995),
    (3, 0.0, 0.0, 1.0, 0.97, 1.0),  # counted twice: wide
    (2, 1.0, 0.1, 0.1, 0.86, 0.93),  # two do not say enough of how far they differ
    (2, 0.0, 1.0, 0.1, 0.92, 0.98),
  ],
)
def test_few_seeds_hold_the_truth_as_often_as_is_said(
  count, of_seeds, of_prompts, of_both, least, most
):
  rng, held = np.random.default_rng(2), 0
  for _ in range(300):
    scores = table(rng, count, 30, of_seeds=of_seeds, of_prompts=of_prompts, of_both=of_both)
    found = seeds.estimate(scores, samples=500)
    held += found.low <= 0 <= found.high
  assert least <= held / 300 <= most


def test_resampling_alone_would_be_too_narrow():
  rng, held = np.random.default_rng(3), 0
  for _ in range(200):
    scores = table(rng, 3, 30, of_seeds=1, of_prompts=0, of_both=0.01)
    low, high = np.quantile(seeds._resampled([scores], 500), [0.025, 0.975])
    held += low <= 0 <= high
  assert held / 200 < 0.85


def test_two_methods_are_compared_prompt_by_prompt():
  rng = np.random.default_rng(4)
  prompts = rng.normal(size=100)  # differ by far more than the methods
  one = prompts + 0.05 * rng.normal(size=(3, 100))
  other = prompts + 0.1 + 0.05 * rng.normal(size=(2, 100))
  found = seeds.estimate(other, one)
  assert 0 < found.low < 0.1 < found.high
  assert seeds.estimate(one, other).mean == pytest.approx(-found.mean)


def test_what_has_no_score_is_left_out():
  scores = np.array([[1.0, 2, NAN, 4], [1, 2, 3, 4]])
  found = seeds.estimate(scores, np.array([[1.0, NAN, 1, 1]]))
  assert found.mean == (0 + 3) / 2
  nothing = seeds.estimate(np.full((2, 3), NAN))
  assert np.isnan([nothing.mean, nothing.low, nothing.high]).all()


def test_without_any_spread_the_interval_has_no_width():
  found = seeds.estimate(np.full((3, 5), 2.0), np.full((1, 5), 1.0))
  assert (found.mean, found.low, found.high) == (1, 1, 1)
  # One number for each seed, as of a time: only the seeds count.
  times = seeds.estimate(np.array([[1.0], [2], [3]]))
  assert times.mean == 2 and times.low < 1 and times.high > 3
  assert np.isnan(seeds.estimate(np.array([[1.0]])).low)


def test_equal_numbers_have_no_width():
  for shape, value in (((2, 3), 0.1), ((3, 10), 0.3)):
    found = seeds.estimate(np.full(shape, value))
    assert found.low == found.mean == found.high == pytest.approx(value)
