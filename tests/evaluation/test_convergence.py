"""When a run had learnt nearly all that it was to learn."""

from evaluation_cases import result
import numpy as np
import pytest

from rlft.evaluation import convergence

PROMPTS = np.linspace(0, 1, 20)


def converged(*gains, lower=False, **how):
  history = [(10 * i, {"a": result(PROMPTS + gain, lower=lower)}) for i, gain in enumerate(gains)]
  return convergence.converged(history, "a", **how)


def test_the_first_evaluation_with_nearly_all_of_the_final_gain():
  assert converged(0, 0.5, 0.94, 0.96, 1.0, 1.0, 1.0) == 30
  assert converged(0, 0.5, 0.94, 0.96, 1.0, 1.0, 1.0, share=0.5) == 10
  # What was more in between counts as reached.
  assert converged(0, 1.2, 1.0, 0.97, 1.0, 1.0, 1.0) == 10
  assert converged(0, -0.5, -0.97, -1.0, -1.0, -1.0, lower=True) == 20


def test_a_run_that_does_not_become_better_does_not_converge():
  assert converged(0, 0.5, -0.1) is None
  assert converged(0, 0.0) is None
  assert converged(0, 1.0, lower=True) is None
  assert converged(0) is None


def test_a_run_that_is_still_rising_has_not_converged():
  assert converged(0, 0.25, 0.5, 0.75, 1.0) is None
  assert converged(0, 0.9, 0.9, 0.9, 1.0) is None
  # What it gained before its last quarter is its own affair.
  assert converged(0, 0.25, 0.5, 1.0, 1.0) == 30


def test_where_a_curve_is_first_at_a_level():
  x, y = np.array([0, 100, 200, 300]), np.array([0.6, 0.5, 0.55, 0.3])
  found = [convergence.first_at(x, y, level, lower_is_better=True) for level in (0.7, 0.6, 0.55)]
  assert found == pytest.approx([0, 0, 50])
  assert convergence.first_at(x, y, 0.4, lower_is_better=True) == pytest.approx(260)
  assert convergence.first_at(x, y, 0.2, lower_is_better=True) is None
  assert convergence.first_at(x, 1 - y, 0.6) == pytest.approx(260)
