"""What is made of both sides' measurements, on literals."""

import json
import math

from evaluation_cases import result
import numpy as np
import pytest

from rlft.config.settings import EvalConfig
from rlft.evaluation import results
from rlft.performance.peer import choice, curves, measuring
from rlft.types import UserError


def curve(seed, means, seconds):
  iterations = np.arange(len(means)) * 2
  return curves.Curve(seed, iterations, iterations * 8, np.array(seconds), {"j": np.array(means)})


SIDES = {
  "a": [curve(0, [0.1, 0.5, 0.9], [0, 10, 20]), curve(1, [0.1, 0.3, 0.7], [0, 10, 20])],
  "b": [curve(0, [0.1, 0.1, 0.5], [0, 20, 40])],
}


def test_a_curve_is_read(tmp_path):
  for epoch, mean in ((0, 0.25), (2, 0.5)):
    results.append_history(tmp_path, epoch, {"j": result(np.full(4, mean))})
  lines = [{"iteration": i, "time/iteration_s": 1.5 + i} for i in range(2)]
  (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
  found = curves.read(tmp_path, seed=3, batch_size=8)
  assert (found.seed, found.images.tolist(), found.seconds.tolist()) == (3, [0, 16], [0, 4.0])
  assert found.means["j"].tolist() == [0.25, 0.5]
  (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
  with pytest.raises(UserError, match="lacks iterations"):
    curves.read(tmp_path, seed=3, batch_size=8)


def test_levels_that_are_reached():
  # Mean curves 0.1, 0.4, 0.8 and 0.1, 0.1, 0.5 at 0, 16 and 32 images: the lesser gain is 0.4.
  table = curves.reached(SIDES, "j")
  assert table.header == ["j", "a, images", "b, images", "a, seconds", "b, seconds"]
  assert table.rows == [
    ["0.200", "5", "20", "3", "25"],
    ["0.300", "11", "24", "7", "30"],
    ["0.400", "16", "28", "10", "35"],
    ["0.500", "20", "32", "12", "40"],
    ["after 32 images", "0.800", "0.500", "", ""],
    ["after 20 seconds", "", "", "0.800", "0.100"],
  ]


def test_levels_where_less_is_better_or_nothing_was_learnt():
  falling = {"a": [curve(0, [0.5, 0.4], [0, 1])], "b": [curve(0, [0.5, 0.3], [0, 2])]}
  rows = curves.reached(falling, "j", lower_is_better=True).rows
  assert rows[3] == ["0.400", "16", "8", "1", "1"]
  assert [row[0] for row in curves.reached(falling, "j").rows] == [
    "after 16 images",
    "after 1 seconds",
  ]


def test_files():
  lines = curves.csv_table(SIDES).csv().splitlines()
  assert lines[0] == "side,seed,iteration,images,seconds,j" and len(lines) == 1 + 3 * 3
  assert lines[6] == "a,1,4,32,20.0,0.70000"
  picture = curves.figure(SIDES, "j")
  assert picture.count('class="t"') == 2
  assert ">images</text>" in picture and ">seconds</text>" in picture


def test_values_at_the_end():
  entry = EvalConfig("a", "p", "m", images=20)
  prompts = np.linspace(0, 1, 20)
  base, ends = (
    {"a": result(prompts)},
    {
      "ours": [{"a": result(prompts + 0.5)}, {"a": result(prompts + 0.5)}],
      "theirs": [{"a": result(prompts + 0.25)}],
    },
  )
  (row,) = curves.final([entry], base, ends).rows
  assert row[0] == "a" and row[1].startswith("0.5000 ±")
  assert row[2].startswith("1.0000 ±") and row[3].startswith("0.7500 ±")
  assert row[4] == "+0.2500 [+0.2500, +0.2500]"


def test_settings_are_chosen_one_after_the_other():
  worth = {(1, 1): 0.2, (2, 1): 0.5, (4, 1): math.nan, (2, 3): 0.5, (2, 5): 0.4}
  asked = []

  def value(settings):
    asked.append(tuple(settings.values()))
    return worth[asked[-1]]

  best, tried = choice.choose({"x": 1, "y": 1}, {"x": (1, 2, 4), "y": (3, 5)}, value)
  assert best == {"x": 2, "y": 1}
  assert asked == list(worth) and len(tried) == 5


def test_test_prompts_of_development_prompts():
  entry = EvalConfig("a", "emoji:pair/development", "m")
  assert measuring.on_test([entry])[0].prompts == "emoji:pair/test"
  with pytest.raises(UserError, match="no development prompts"):
    measuring.on_test([EvalConfig("a", "emoji:pair/test", "m")])


def test_what_is_measured_is_kept(tmp_path):
  made = []

  def make():
    made.append(1)
    return {"a": result(np.linspace(0, 1, 5))}

  found = [measuring.kept(tmp_path / "test.json", make) for _ in range(2)]
  assert len(made) == 1
  np.testing.assert_array_equal(found[1]["a"].scores, np.linspace(0, 1, 5, dtype=np.float32))
