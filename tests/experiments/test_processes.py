"""What experiments/processes.py compares, and how it says it."""

import experiment_cases
import numpy as np
import pytest


@pytest.fixture(scope="module")
def processes():
  with experiment_cases.script("processes") as module:
    yield module


def test_a_difference_is_relative_to_the_largest_number(processes):
  assert processes.relative([1.0, 4.0], [1.1, 4.0]) == pytest.approx(0.1 / 4)
  assert processes.relative(np.zeros(2), np.zeros(2)) == 0
  assert processes.relative(np.zeros((0, 3)), np.zeros((0, 3))) == 0


def test_each_reward_and_the_parameters_are_compared(processes, monkeypatch):
  def metrics(mean):
    return [
      {
        f"reward/{task}/{what}": mean if task == "remote" and what == "std" else 0.5
        for task in processes.TASKS
        for what in ("mean", "std", "min", "max")
      }
    ]

  runs = {"one": (metrics(0.5), [2.0, 1.0]), "other": (metrics(0.4), [2.0, 1.5])}
  monkeypatch.setattr(processes.cases, "metrics", lambda workdir: runs[workdir][0])
  monkeypatch.setattr(
    processes.cases,
    "final_state",
    lambda workdir: {"params": {"a": np.array(runs[workdir][1]), "b": np.ones(2)}},
  )
  assert processes.compared("one", "other") == pytest.approx([0, 0, 0.1 / 0.5, 0, 0.5 / 2])


def test_the_table_has_a_row_for_each_variant(processes):
  lines = processes.page({"full": [0, 1e-7, 2.4e-7, 0, 3e-6]}).splitlines()
  assert lines[-1] == "| full | 0e+00 | 1e-07 | 2e-07 | 0e+00 | 3e-06 |"
