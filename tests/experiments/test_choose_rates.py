"""The choice of learning rates: by the judge, whatever the reward says, and of what came out."""

import math

import experiment_cases
import pytest


def test_the_rate_is_that_of_the_best_judge():
  rows = [
    ("RL", 1e-5, 0.1, 0.5),
    ("RL", 3e-5, 0.2, 0.2),
    ("RL", 9e-5, float("nan"), 0.9),
    ("RWR", 1e-5, float("nan"), float("nan")),
  ]
  with experiment_cases.script("choose_rates") as script:
    lines = script.table(rows).markdown().splitlines()
  assert [line for line in lines if "chosen" in line] == [
    "| RL | 3e-05 | +0.2000 | +0.2000 | chosen |"
  ]


@pytest.mark.parametrize(
  ("best", "measured"),
  [
    (1e-4, [1e-4, 3e-4, 3.3e-5]),
    (9e-4, [1e-4, 3e-4, 9e-4, 2.7e-3]),
    (1.1e-5, [1e-4, 3e-4, 3.3e-5, 1.1e-5, 3.7e-6]),
    (1.0, [1e-4, 3e-4, 9e-4, 2.7e-3]),  # it ends, though the best has not been seen
  ],
)
def test_rates_are_followed_to_the_best(best, measured):
  def gains(rate):
    return -abs(math.log(rate / best)), 0.0

  with experiment_cases.script("choose_rates") as script:
    assert [rate for rate, _ in script.climb(1e-4, gains)] == measured


def test_a_rate_that_fails_is_the_worst():
  with experiment_cases.script("choose_rates") as script:
    found = list(script.climb(1e-4, lambda rate: (math.nan if rate > 2e-4 else rate, 0.0)))
  assert [rate for rate, _ in found] == [1e-4, 3e-4, 3.3e-5]
