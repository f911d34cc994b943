from evaluation_cases import result

from rlft.evaluation import summary
from rlft.evaluation.results import BestBase

NAN = float("nan")


def test_small_scores_are_shown_with_more_digits():
  # What counts is 2 % of the standard deviation: of 0.5 that is 0.01, of 5e-5 it is 1e-6.
  assert summary.mean(result([0, 1] * 200)) == "0.5000 ±0.0488"
  assert summary.mean(result([0, 1e-4] * 200)) == "0.000050 ±0.000005"
  assert summary.mean(result([0.5] * 4)) == "0.5000 ±0.0000"


def test_table():
  before = {"a": result([1, 2, NAN]), "long name": result([0.5, 0.5], lower=True, metric="parity")}
  after = {"a": result([2, 3, 4])}
  assert summary.table(before, after).splitlines() == [
    "evaluation  metric  better          before           after   change        95% interval"
    "  relative          images",
    "a           m       higher  1.5000 ±0.5000  3.0000 ±1.0000  +1.0000"
    "  [+1.0000, +1.0000]    +66.7%  better  32 (16 prompts)",
    "long name   parity  lower   0.5000 ±0.0000" + " " * 65 + "32 (16 prompts)",
  ]
  assert summary.table(before).splitlines()[:2] == [
    "evaluation  metric  better            mean  images",
    "a           m       higher  1.5000 ±0.5000  32 (16 prompts, 1 unscored)",
  ]


def test_table_with_the_base_at_its_best():
  before, after = (
    {"a": result([1, 2]), "b": result([1, 2])},
    {"a": result([4, 5]), "b": result([4, 5])},
  )
  best = {"a": BestBase(3.0, result([2, 3]))}
  (
    header,
    first,
    second,
  ) = summary.table(before, after, best).splitlines()
  assert "before            base at its best           after   change" in header
  assert "1.5000 ±0.5000  2.5000 ±0.5000, guidance 3  4.5000 ±0.5000  +2.0000" in first
  assert "1.5000 ±0.5000                              4.5000 ±0.5000  +3.0000" in second


def test_table_without_scores():
  none, one = result([NAN, NAN]), result([2])
  both = {"none": none, "one": one}
  _, *rows = [line.split() for line in summary.table(both, both).splitlines()]
  assert rows == [
    "none m higher not scored not scored unclear 32 (16 prompts, 2 unscored)".split(),
    "one m higher 2.0000 2.0000 +0.0000 +0.0% unclear 32 (16 prompts)".split(),
  ]


def test_lines():
  assert summary.lines([]) == []
  first = {"a": result([0, 1, 0, 1]), "bb": result([NAN, 2, 2, 2]), "c": result([NAN, NAN])}
  assert summary.lines([(0, first)]) == [
    "at the start: a   0.5000 ±0.5000",
    "at the start: bb  2.0000 ±0.0000, 1 of 4 not scored, the same score for all",
    "at the start: c   not scored",
  ]
  then = {"a": result([1, 2, 1, 2]), "bb": result([1, 2, 3, 4]), "new": result([7])}
  assert summary.lines([(0, first), (5, first), (10, then)]) == [
    "after 10 iterations: a    1.5000 ±0.5000, +1.0000 [+1.0000, +1.0000] since the start: better",
    "after 10 iterations: bb   2.5000 ±1.5000, +1.0000 [+0.0000, +2.0000] since the start: unclear",
    "after 10 iterations: new  7.0000",
  ]


def test_fewer_images_that_show_what_is_measured():
  before, after = (
    result([1, 2, 3], lower=True, found=0.96),
    result([1, 1, 1], lower=True, found=0.5),
  )
  shown = "found in 50.0%, before in 96.0%"
  assert f"32 (16 prompts, {shown})" in summary.table({"a": before}, {"a": after})
  assert summary.table({"a": before}).endswith("32 (16 prompts, found in 96.0%)")
  assert summary.lines([(0, {"a": before}), (5, {"a": after})])[0].endswith(shown)
