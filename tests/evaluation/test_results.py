import json

from evaluation_cases import result
import numpy as np
import pytest

from rlft.evaluation import results
from rlft.types import UserError

NAN = float("nan")


def test_paired_difference_on_literals():
  before, after = result([1, 2, 3, 4]), result([2, 3, 4, 5])
  # Every pair differs by 1, so the interval has no width; the mean before is 2.5.
  change = results.paired_difference(before, after)
  assert change == results.Difference(1.0, 1.0, 1.0, 0.4, "better")
  lower = results.paired_difference(result([1, 2], lower=True), result([2, 3], lower=True))
  assert lower.verdict == "worse"
  back = results.paired_difference(result([2, 3], lower=True), result([1, 2], lower=True))
  assert (back.mean, back.relative, back.verdict) == (-1.0, -0.4, "better")


def test_an_interval_without_zero_is_not_enough_for_better():
  # Scores 0 and 1 have the standard deviation 0.5: 0.01 and more counts, 2 % of it.
  before = np.arange(400) % 2
  tiny = np.where(np.arange(400) % 4, 0.00003, 0)  # seen for certain, and yet nothing
  change = results.paired_difference(result(before), result(before + tiny))
  assert change.low > 0 and change.verdict == "no effect"
  for factor, expected in ((0.9, "no effect"), (1.1, "better")):
    after = result(before + factor * 0.01)
    assert results.paired_difference(result(before), after).verdict == expected
  same = result([1, 2, 3])
  assert results.paired_difference(same, same).verdict == "no effect"


def test_what_rounds_to_zero_is_not_better():
  # Without any spread before, the digits decide; what counts is never shown as 0.
  constant = np.full(16, 0.5)
  for change, expected in ((0.00004, "no effect"), (0.00006, "better")):
    found = results.paired_difference(result(constant), result(constant + change))
    assert found.verdict == expected
    assert (f"{found.mean:+.4f}" == "+0.0000") == (expected == "no effect")


def test_paired_difference_needs_several_pairs():
  mixed = results.paired_difference(result([0, 0, 0, 0]), result([1, -1, 1, -1]))
  assert mixed.verdict == "unclear" and np.isnan(mixed.relative)
  one = results.paired_difference(result([0]), result([1]))
  assert one.mean == 1.0 and one.verdict == "unclear"


def test_pairing_finds_a_change_that_the_separate_intervals_hide():
  rng = np.random.default_rng(0)
  prompts = rng.normal(size=200)  # prompts differ by far more than the model changed
  before, after = result(prompts), result(prompts + 0.05 + 0.05 * rng.normal(size=200))
  assert before.low < after.mean < before.high
  assert results.paired_difference(before, after).verdict == "better"


def test_paired_difference_leaves_out_what_one_side_could_not_score():
  change = results.paired_difference(result([1, NAN, 3, 8]), result([2, 5, 5, NAN]))
  # Pairs (1, 2) and (3, 5): mean 1.5, of a mean before of 2.
  assert (change.mean, change.relative) == (1.5, 0.75)
  assert np.isnan(results.paired_difference(result([NAN] * 2), result([1, 2])).mean)


def test_paired_difference_refuses_another_measurement():
  with pytest.raises(UserError, match="keep --eval as it was"):
    results.paired_difference(result([1, 2]), result([1, 2, 3]))
  with pytest.raises(UserError, match="keep --eval as it was"):
    results.paired_difference(result([1, 2]), result([1, 2], metric="other"))


def test_history_gives_back_every_score(tmp_path):
  assert results.read_history(tmp_path) == []
  scores = np.append(np.random.default_rng(0).normal(size=20).astype(np.float32), np.nan)
  first = {
    "a": result(scores, lower=True, trained_on=True, found=0.75),
    "b": result([NAN], name="b"),
  }
  results.append_history(tmp_path, 0, first)
  results.append_history(tmp_path, 10, {"a": result(scores)})
  (zero, back), (ten, _) = results.read_history(tmp_path)
  assert (zero, ten) == (0, 10)
  np.testing.assert_array_equal(back["a"].scores, scores)
  assert back["a"].scores.dtype == np.float32
  for name, one in first.items():
    assert back[name].summary() == one.summary()
  assert np.isnan(back["b"].mean) and back["b"].unscored == 1


def test_history_of_a_resumed_run_has_each_iteration_once(tmp_path):
  for iteration in (0, 10, 20, 30):
    results.append_history(tmp_path, iteration, {"a": result([1, 2])})
  with open(tmp_path / "eval_history.jsonl", "a") as file:
    file.write('{"iteration": 40, "resu')
  results.append_history(tmp_path, 20, {"a": result([3, 4])})
  history = results.read_history(tmp_path)
  assert [(iteration, found["a"].mean) for iteration, found in history] == [
    (0, 1.5),
    (10, 1.5),
    (20, 3.5),
  ]


def test_a_damaged_history_is_a_user_error(tmp_path):
  good = {"iteration": 0, "results": {"a": result([1, 2]).to_json()}}
  text = json.dumps(good).replace('"scores": [', '"scores": ["x", ')
  for damaged in ('{"iteration": 0, "results": {"a": 1}}', text):
    (tmp_path / "eval_history.jsonl").write_text(f"{damaged}\n")
    with pytest.raises(UserError, match="holds no evaluations"):
      results.read_history(tmp_path)


def test_the_base_at_its_best_is_kept(tmp_path):
  assert results.read_base(tmp_path) == {}
  results.write_base(tmp_path, {"a": results.BestBase(3.0, result([1, NAN, 0.1]))})
  back = results.read_base(tmp_path)["a"]
  assert back.guidance == 3.0 and back.result.metric == "m"
  np.testing.assert_array_equal(back.result.scores, np.float32([1, NAN, 0.1]))
  results.write_eval_json(
    tmp_path, {"a": result([0, 0, 0])}, {"a": result([2, 2, 2])}, best={"a": back}
  )
  got = json.loads((tmp_path / "eval.json").read_text())
  assert got["best_base"]["a"]["guidance"] == 3.0
  assert got["difference"]["a"]["mean"] == 2.0
  # Of the two pairs that were scored: 2 - (1 + 0.1) / 2.
  assert got["difference_to_best_base"]["a"]["mean"] == pytest.approx(1.45)
  (tmp_path / "eval_base.json").write_text("{}x")
  with pytest.raises(UserError, match="holds no evaluations"):
    results.read_base(tmp_path)


def test_eval_json(tmp_path):
  before = {"a": result([1, 2, 3, NAN]), "b": result([NAN, NAN], name="b")}
  after = {"a": result([2, 3, 4, 9])}
  history = [(0, before), (7, after)]
  results.write_eval_json(tmp_path, before, after, history, {"seed": 3})

  def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")

  got = json.loads((tmp_path / "eval.json").read_text(), parse_constant=refuse)
  assert got["before"]["a"]["mean"] == 2.0
  assert got["before"]["a"]["unscored"] == 1
  assert (got["before"]["a"]["images"], got["before"]["a"]["metric"]) == (32, "m")
  assert got["before"]["b"]["mean"] is None and got["before"]["b"]["low"] is None
  assert got["after"]["a"]["mean"] == 4.5
  assert got["difference"] == {
    "a": {"mean": 1.0, "low": 1.0, "high": 1.0, "relative": 0.5, "verdict": "better"}
  }
  assert got["history"] == [
    {"iteration": 0, "means": {"a": 2.0, "b": None}},
    {"iteration": 7, "means": {"a": 4.5}},
  ]
  assert got["config"] == {"seed": 3}
