"""Advantages on literals."""

import pytest

from rlft.algorithms import advantages

NAN = float("nan")


def test_history_of_each_prompt():
  history = advantages.PromptHistory(length=4, minimum=2)
  # One reward each: too few, so the batch's mean 2 and std 1 serve.
  first = history.advantages(["a", "b"], [1.0, 3.0], clip=10.0)
  assert first == pytest.approx([-1.0, 1.0], rel=1e-5)
  # 'a' has 1, 5: mean 3, std 2. 'b' has 3, 3: no spread.
  second = history.advantages(["a", "b"], [5.0, 3.0], clip=10.0)
  assert second == pytest.approx([1.0, 0.0], rel=1e-5)
  assert history.advantages(["a"], [NAN], clip=10.0) == [0.0]
  assert history.state() == {"a": [1.0, 5.0], "b": [3.0, 3.0]}


def test_history_forgets_and_resumes():
  history = advantages.PromptHistory(length=2, minimum=2)
  for reward in (100.0, 1.0, 3.0):
    history.advantages(["a"], [reward], clip=10.0)
  other = advantages.PromptHistory(length=2, minimum=2)
  other.restore(history.state())
  # The newest two of 1, 3, 5: mean 4, std 1.
  assert other.advantages(["a"], [5.0], clip=10.0) == pytest.approx([1.0], rel=1e-5)
  assert history.advantages(["a"], [5.0], clip=10.0) == pytest.approx([1.0], rel=1e-5)
