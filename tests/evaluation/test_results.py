import json

import numpy as np
import pytest

from rlft.evaluation import results
from rlft.types import UserError

NAN = float("nan")


def result(scores, *, name="a", metric="m", lower=False, trained_on=False):
  scores = np.array(scores, np.float32)
  low, high = results.bootstrap_interval(scores)
  return results.EvalResult(
    name, metric, results.mean(scores), low, high, 32, 16, scores, lower, trained_on
  )


def test_interval_of_many_values_is_the_normal_one():
  values = np.random.default_rng(1).normal(3, 2, size=900)
  error = values.std() / 30  # standard error of the mean; 30 = sqrt(900)
  low, high = results.bootstrap_interval(values, seed=0)
  # The 2.5 % quantile of 2,000 resamples is itself uncertain by 0.06 standard errors.
  assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
  assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
  narrow = results.bootstrap_interval(values, seed=0, level=0.5)
  assert narrow[1] - narrow[0] == pytest.approx(2 * 0.6745 * error, rel=0.1)


def test_interval_of_few_values_holds_the_truth_as_often_as_it_says():
  # 16 values, as of 256 images in sets of 16. The plain percentile method holds it in 92 %.
  rng = np.random.default_rng(0)
  held = 0
  for seed in range(500):
    low, high = results.bootstrap_interval(rng.normal(size=16), seed=seed, samples=1000)
    held += low <= 0 <= high
  assert 0.93 <= held / 500 <= 0.97


def test_interval_on_literals():
  # Of two values, Student's t with one degree of freedom is 12.7: the widest there is.
  assert results.bootstrap_interval(np.array([0.0, 1.0]), seed=0) == (0.0, 1.0)
  for constant in (0.0, 0.1, 2.5):
    interval = results.bootstrap_interval(np.full(7, constant), seed=0)
    assert interval == pytest.approx((constant, constant), rel=1e-15)
  assert np.isnan(results.bootstrap_interval(np.array([1.0]), seed=0)).all()
  assert np.isnan(results.bootstrap_interval(np.array([NAN, NAN]), seed=0)).all()


def test_interval_leaves_nan_out_and_is_reproducible(monkeypatch):
  values = np.arange(50.0)
  expected = results.bootstrap_interval(values, seed=3)
  assert results.bootstrap_interval(np.append(values, NAN), seed=3) == expected
  assert results.bootstrap_interval(values, seed=4) != expected
  # Resampling in pieces, as for many values, draws the same.
  monkeypatch.setattr(results, "_CHUNK", 50 * 70)
  assert results.bootstrap_interval(values, seed=3) == expected


def test_paired_difference_on_literals():
  before, after = result([1, 2, 3, 4]), result([2, 3, 4, 5])
  # Every pair differs by 1, so the interval has no width; the mean before is 2.5.
  change = results.paired_difference(before, after)
  assert change == results.Difference(1.0, 1.0, 1.0, 0.4, "better")
  lower = results.paired_difference(result([1, 2], lower=True), result([2, 3], lower=True))
  assert lower.verdict == "worse"
  back = results.paired_difference(result([2, 3], lower=True), result([1, 2], lower=True))
  assert (back.mean, back.relative, back.verdict) == (-1.0, -0.4, "better")


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
    return results.verdict(change, low, high, least=0.1, lower_is_better=lower)

  opposite = {"better": "worse", "worse": "better"}
  assert called(False) == expected
  assert called(True) == opposite.get(expected, expected)


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
  # Small scores are shown with more digits: 2 % of 5e-5 is 1e-6.
  small = result(np.arange(400) % 2 * 1e-4)
  assert small.digits == 6 and small.text == "0.000050 ±0.000005"
  assert result(np.arange(400) % 2).digits == result(constant).digits == 4


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
  first = {"a": result(scores, lower=True, trained_on=True), "b": result([NAN], name="b")}
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
  (tmp_path / "eval_history.jsonl").write_text('{"iteration": 0, "results": {"a": 1}}\n')
  with pytest.raises(UserError, match="holds no evaluations"):
    results.read_history(tmp_path)


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


def test_table():
  before = {"a": result([1, 2, NAN]), "long name": result([0.5, 0.5], lower=True, metric="parity")}
  after = {"a": result([2, 3, 4])}
  assert results.table(before, after).splitlines() == [
    "evaluation  metric  better          before           after   change        95% interval"
    "  relative          images",
    "a           m       higher  1.5000 ±0.5000  3.0000 ±1.0000  +1.0000"
    "  [+1.0000, +1.0000]    +66.7%  better  32 (16 prompts)",
    "long name   parity  lower   0.5000 ±0.0000" + " " * 65 + "32 (16 prompts)",
  ]
  assert results.table(before).splitlines()[:2] == [
    "evaluation  metric  better            mean  images",
    "a           m       higher  1.5000 ±0.5000  32 (16 prompts, 1 unscored)",
  ]


def test_table_without_scores():
  none, one = result([NAN, NAN]), result([2])
  both = {"none": none, "one": one}
  _, *rows = [line.split() for line in results.table(both, both).splitlines()]
  assert rows == [
    "none m higher not scored not scored unclear 32 (16 prompts, 2 unscored)".split(),
    "one m higher 2.0000 2.0000 +0.0000 +0.0% unclear 32 (16 prompts)".split(),
  ]


def test_lines():
  assert results.lines([]) == []
  first = {"a": result([0, 1, 0, 1]), "bb": result([NAN, 2, 2, 2]), "c": result([NAN, NAN])}
  assert results.lines([(0, first)]) == [
    "at the start: a   0.5000 ±0.5000",
    "at the start: bb  2.0000 ±0.0000, 1 of 4 not scored, the same score for all",
    "at the start: c   not scored",
  ]
  then = {"a": result([1, 2, 1, 2]), "bb": result([1, 2, 3, 4]), "new": result([7])}
  assert results.lines([(0, first), (5, first), (10, then)]) == [
    "after 10 iterations: a    1.5000 ±0.5000, +1.0000 [+1.0000, +1.0000] since the start: better",
    "after 10 iterations: bb   2.5000 ±1.5000, +1.0000 [+0.0000, +2.0000] since the start: unclear",
    "after 10 iterations: new  7.0000",
  ]
