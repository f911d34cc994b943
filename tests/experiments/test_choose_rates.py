"""The choice of learning rates: by the judge, whatever the reward says, and of what came out."""

import experiment_cases


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
