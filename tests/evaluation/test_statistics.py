import numpy as np
import pytest

from rlft.evaluation import statistics

NAN = float("nan")


def test_interval_of_many_values_is_the_normal_one():
  values = np.random.default_rng(1).normal(3, 2, size=900)
  error = values.std() / 30  # standard error of the mean; 30 = sqrt(900)
  low, high = statistics.bootstrap_interval(values, seed=0)
  # The 2.5 % quantile of 2,000 resamples is itself uncertain by 0.06 standard errors.
  assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
  assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
  narrow = statistics.bootstrap_interval(values, seed=0, level=0.5)
  assert narrow[1] - narrow[0] == pytest.approx(2 * 0.6745 * error, rel=0.1)


def test_interval_of_few_values_holds_the_truth_as_often_as_it_says():
  # 16 values, as of 256 images in sets of 16. The plain percentile method holds it in 92 %.
  rng = np.random.default_rng(0)
  held = 0
  for seed in range(500):
    low, high = statistics.bootstrap_interval(rng.normal(size=16), seed=seed, samples=1000)
    held += low <= 0 <= high
  assert 0.93 <= held / 500 <= 0.97


def test_interval_on_literals():
  # Of two values, Student's t with one degree of freedom is 12.7: the widest there is.
  assert statistics.bootstrap_interval(np.array([0.0, 1.0]), seed=0) == (0.0, 1.0)
  for constant in (0.0, 0.1, 2.5):
    interval = statistics.bootstrap_interval(np.full(7, constant), seed=0)
    assert interval == pytest.approx((constant, constant), rel=1e-15)
  assert np.isnan(statistics.bootstrap_interval(np.array([1.0]), seed=0)).all()
  assert np.isnan(statistics.bootstrap_interval(np.array([NAN, NAN]), seed=0)).all()


def test_interval_leaves_nan_out_and_is_reproducible(monkeypatch):
  values = np.arange(50.0)
  expected = statistics.bootstrap_interval(values, seed=3)
  assert statistics.bootstrap_interval(np.append(values, NAN), seed=3) == expected
  assert statistics.bootstrap_interval(values, seed=4) != expected
  # Resampling in pieces, as for many values, draws the same.
  monkeypatch.setattr(statistics, "_CHUNK", 50 * 70)
  assert statistics.bootstrap_interval(values, seed=3) == expected


@pytest.mark.parametrize(
  ("change", "low", "high", "expected"),
  [
    # Changes count from 0.1.
    (0.3, 0.2, 0.4, "better"),
    (0.1, 0.01, 0.2, "better"),
    (-0.3, -0.4, -0.2, "worse"),
    (0.3, 0.0, 0.6, "unclear"),  # may be nothing
    (0.05, 0.02, 0.2, "unclear"),  # is something; whether enough is not known
    (0.0, -0.2, 0.2, "unclear"),
    (0.02, 0.01, 0.03, "no effect"),  # is something, and too little
    (-0.02, -0.09, 0.05, "no effect"),
    (0.0, 0.0, 0.0, "no effect"),
    (0.5, NAN, NAN, "unclear"),  # a single score
    (NAN, NAN, NAN, "unclear"),
  ],
)
def test_verdicts(change, low, high, expected):
  def called(lower):
    return statistics.verdict(change, low, high, least=0.1, lower_is_better=lower)

  opposite = {"better": "worse", "worse": "better"}
  assert called(False) == expected
  assert called(True) == opposite.get(expected, expected)
