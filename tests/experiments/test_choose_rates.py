"""The choice of learning rates: by the judge, whatever the reward says, and of what came out."""

import math

import experiment_cases
import numpy as np
import pytest

from rlft.evaluation.results import EvalResult

PROMPTS = np.linspace(0, 1, 40)


def trial(script, rate, gain, *, title="RL", reward=0.0):
  """The judge's gain differs by a little from prompt to prompt, another way at each rate."""
  if math.isnan(gain):
    return script.Trial(title, rate, None)
  noise = 0.02 * np.random.default_rng(int(1e6 * rate)).standard_normal(len(PROMPTS))
  before, after = (
    EvalResult("judge", "oracle-both", s.mean(), s.mean(), s.mean(), 40, 40, s.astype(np.float32))
    for s in (PROMPTS, PROMPTS + gain + noise - noise.mean())
  )
  return script.Trial(title, rate, (before, after), reward)


def test_the_rate_is_the_smallest_that_is_not_worse_by_the_judge():
  with experiment_cases.script("choose_rates") as script:
    trials = [
      trial(script, 1e-5, 0.1, reward=0.5),
      trial(script, 3e-5, 0.2),
      trial(script, 9e-5, 0.202),  # the best, by a hair
      trial(script, 3e-4, math.nan),
      trial(script, 1e-5, math.nan, title="RWR"),
    ]
    lines = script.table(trials).markdown().splitlines()
  assert [line for line in lines if "chosen" in line] == [
    "| RL | 3e-05 | +0.2000 | +0.0000 | chosen |"
  ]


@pytest.mark.parametrize(
  ("best", "measured"),
  [
    (1e-4, [1e-4, 3e-4, 3.3e-5]),
    (9e-4, [1e-4, 3e-4, 9e-4, 2.7e-3]),
    (1.1e-5, [1e-4, 3e-4, 3.3e-5, 1.1e-5, 3.7e-6]),
    # It ends, though the best has not been seen.
    (1e9, [1e-4, 3e-4, 9e-4, 2.7e-3, 8.1e-3, 2.4e-2, 7.3e-2]),
  ],
)
def test_rates_are_followed_to_the_best(best, measured):
  with experiment_cases.script("choose_rates") as script:
    found = script.climb(1e-4, lambda rate: trial(script, rate, -abs(math.log(rate / best))))
    assert [one.rate for one in found] == pytest.approx(measured)


def test_a_rate_that_fails_is_the_worst():
  with experiment_cases.script("choose_rates") as script:
    found = script.climb(
      1e-4, lambda rate: trial(script, rate, math.nan if rate > 2e-4 else 100 * rate)
    )
    assert [one.rate for one in found] == [1e-4, 3e-4, 3.3e-5]
