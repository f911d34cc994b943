"""The experiment that compares runs in bfloat16 with runs in float32: flags and table."""

import pathlib

import experiment_cases
import numpy as np
import pytest

from rlft.evaluation.results import EvalResult

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def experiment():
  with experiment_cases.script("bf16") as module:
    yield module


def test_flags_of_a_run(experiment):
  base = (ROOT / "experiments" / "emoji_bf16.flags").read_text().splitlines()
  lines = experiment.run_flags(base, "bfloat16-state", pathlib.Path("w"), seed=2, iterations=30)
  found = dict(line.removeprefix("--").partition("=")[::2] for line in lines)
  assert len(found) == len(lines)
  assert (found["workdir"], found["seed"], found["iterations"]) == ("w", "2", "30")
  types = {"compute_dtype": "bfloat16", "param_dtype": "bfloat16", "moments_dtype": "bfloat16"}
  assert types.items() <= found.items()
  assert {"task", "eval", "learning_rate", "clip_range"} <= found.keys()


def test_table(experiment, tmp_path):
  def outcome(end, deviation, after):
    def result(mean):
      scores = np.full(4, mean, np.float32)
      return EvalResult("preference", "oracle", mean, mean, mean, 4, 4, scores)

    rewards = np.concatenate([np.full(20, 1.0), np.full(20, end)])
    return experiment.Outcome(rewards, np.full(40, deviation), result(0.25), result(after))

  runs = {
    ("float32", 0): outcome(2.0, 0.0, 0.5),
    ("float32", 1): outcome(4.0, 1e-7, 0.5),
    ("bfloat16", 0): outcome(3.0, 0.0, 0.5),
    ("bfloat16", 1): outcome(4.0, 2e-6, 0.75),
  }
  rows = [line.strip("| ").split(" | ") for line in experiment.write(tmp_path, runs).splitlines()]
  found = {(row[0], row[1]): row[2:] for row in rows[2:]}
  # Seeds at 2 and 4 have a standard deviation of sqrt(2); 3.5 is 0.5 / sqrt(2) of it above 3.
  expected = ["3.5000", "3.0000 4.0000", "+0.5000 (+0.35 deviations)", "2.0e-06"]
  assert found["bfloat16", "reward, last 20"] == expected
  assert found["float32", "reward, last 20"][0] == "3.0000"
  assert found["bfloat16", "held out, after"][:3] == ["0.6250", "0.5000 0.7500", "+0.1250"]
  lines = (tmp_path / "bf16.csv").read_text().splitlines()
  assert len(lines) == 1 + 4 * 4
  assert lines[-1] == "bfloat16,1,40,4.00000,2.00e-06"
