"""Rates, intervals and agreement, by hand and beside the project's other estimator."""

import json

import numpy as np
import pytest
import rating_cases

from rlft.evaluation import seeds
from rlft.rating import results
from rlft.rating.votes import Question, Votes

krippendorff = pytest.importorskip("krippendorff")


def votes_of(table, *, again=()):
  """Votes of a table `[raters][prompts]` of 0, 0.5 and 1; None where there is none."""
  answers = {0: "left", 1: "right", 0.5: "tie"}
  rows = [
    (rater, pair, value)
    for rater, row in enumerate(table, start=1)
    for pair, value in enumerate(row)
    if value is not None
  ]
  found = [
    Question(place, rater, place, pair, False, False, answers[value], 2.0)
    for place, (rater, pair, value) in enumerate(rows)
  ]
  return found + [
    Question(900 + k, rater, 900 + k, pair, False, True, answers[value], 2.0)
    for k, (rater, pair, value) in enumerate(again)
  ]


def flat(table):
  table = np.array(table, float)
  raters, prompts = np.indices(table.shape)
  return table.ravel(), prompts.ravel(), raters.ravel()


def test_a_rate(tmp_path):
  study = rating_cases.make_study(tmp_path)
  found = results.find(study, votes_of([[1, 1, 0.5], [1, 0, None]]))
  (rate,) = found.rates
  assert (rate.liked, rate.other, rate.set) == ("tuned", "base", "things")
  assert rate.rate == pytest.approx(3.5 / 5)
  assert (rate.wins, rate.ties, rate.losses, rate.prompts, rate.raters) == (3, 1, 1, 3, 2)
  assert rate.agreement == pytest.approx(0.5)  # Of two prompts with two votes, one.


def test_an_interval_by_hand():
  # Four prompts of one rater: mean 3/4, deviations 1/4, 1/4, 1/4, -3/4, their squares' sum 3/4;
  # V = 4/3 * 3/4 / 16 = 1/16; n = (3/16) / (1/16) = 3, times (1.960 / 3.182)^2 = 1.138.
  low, high = results.interval(np.array([1, 1, 1, 0.0]), np.arange(4), np.zeros(4, int))
  n = 3 * (1.959964 / 3.182446) ** 2
  beta = pytest.importorskip("scipy.stats").beta
  assert low == pytest.approx(beta.ppf(0.025, 0.75 * n, 0.25 * n + 1), abs=1e-5)
  assert high == pytest.approx(beta.ppf(0.975, 0.75 * n + 1, 0.25 * n), abs=1e-5)


def test_intervals_are_about_those_of_the_bootstrap():
  rng = np.random.default_rng(0)
  of_prompt, of_rater = rng.normal(0, 0.8, 60), rng.normal(0, 0.3, (8, 1))
  chances = 1 / (1 + np.exp(-(0.7 + of_prompt + of_rater)))
  table = (rng.random(chances.shape) < chances).astype(float)
  low, high = results.interval(*flat(table))
  other = seeds.estimate(table)
  assert high - low == pytest.approx(other.high - other.low, rel=0.35)
  assert low < table.mean() < high


def test_intervals_hold_their_level():
  """Of studies with 12 raters, 30 prompts and 5 raters a pair, about 95 % contain the truth."""
  rng, held = np.random.default_rng(1), 0
  for _ in range(200):
    of_prompt, of_rater = rng.normal(0, 1, 30), rng.normal(0, 0.5, 12)
    prompts = np.repeat(np.arange(30), 5)
    raters = np.concatenate([rng.choice(12, 5, replace=False) for _ in range(30)])
    chances = 1 / (1 + np.exp(-(of_prompt[prompts] + of_rater[raters])))
    values = (rng.random(150) < chances).astype(float)
    low, high = results.interval(values, prompts, raters)
    held += low <= 0.5 <= high  # By symmetry.
  assert 184 <= held <= 200


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_when_all_agree_the_interval_is_not_empty(value):
  low, high = results.interval(*flat(np.full((3, 20), value)))
  # Clopper and Pearson of 20 of 20: 0.025 ** (1 / 20).
  edge = 0.025 ** (1 / 20)
  assert (low, high) == pytest.approx((edge, 1) if value else (0, 1 - edge))


def test_no_interval_of_a_single_vote():
  assert np.isnan(results.interval(np.ones(1), np.zeros(1, int), np.zeros(1, int))).all()
  assert np.isnan(results.interval(*[np.array([])] * 3)).all()


def test_alpha():
  # By hand: two raters, 4 prompts, 3 of them agreed on; coincidences 0-0: 2, 1-1: 4, 0-1: 1 + 1;
  # n = 8, n_0 = 3, n_1 = 5: alpha = 1 - (8 - 1) * 1 / (3 * 5) = 8 / 15.
  alpha, same = results.agreement(*flat([[0, 1, 1, 0], [0, 1, 1, 1]]))
  assert (alpha, same) == (pytest.approx(8 / 15), 0.75)
  # And by the library's other entrance, with ties and gaps.
  table = [[0, 1, 0.5, 1, np.nan], [0, 1, 1, 0.5, 1], [0.5, 1, 1, 0, 0]]
  values, prompts, raters = flat(table)
  there = ~np.isnan(values)
  alpha, _ = results.agreement(values[there], prompts[there], raters[there])
  expected = krippendorff.alpha(reliability_data=table, level_of_measurement="interval")
  assert alpha == pytest.approx(expected)


def test_no_alpha_where_it_is_not_defined():
  alpha, same = results.agreement(*flat([[1, 1], [1, 1]]))
  assert np.isnan(alpha) and same == 1
  assert np.isnan(results.agreement(*flat([[1, 0]]))).all()
  assert np.isnan(results.agreement(*[np.array([])] * 3)).all()


def test_careless_raters_are_named_and_left_out(tmp_path):
  study = rating_cases.make_study(tmp_path)
  votes = votes_of([[1, 1, 1, 1], [0, 0, 0, 0]], again=[(1, 0, 1), (2, 0, 1), (2, 1, 0)])
  both = results.find(study, votes)
  assert [one.consistent for one in both.raters] == [1, 0.5]
  assert [one.left for one in both.raters] == [0, pytest.approx(5 / 6)]
  # Repetitions are checks and no votes.
  assert both.rates[0].rate == 0.5 and [one.votes for one in both.raters] == [4, 4]
  careful = results.find(study, votes, min_consistency=0.8)
  assert careful.left_out == [2] and careful.rates[0].rate == 1
  assert "Left out because they answered repeated pairs otherwise: 2." in results.markdown(careful)


def test_three_models_and_no_votes(tmp_path):
  study = rating_cases.make_study(tmp_path, names=("base", "tuned", "third"))
  found = results.find(study, [])
  assert [(rate.liked, rate.other) for rate in found.rates] == [
    ("tuned", "base"),
    ("third", "base"),
    ("third", "tuned"),
  ]
  assert "tuned over base: no votes yet." in results.markdown(found)


def test_export(tmp_path):
  study = rating_cases.make_study(tmp_path, checks=0.0)
  votes = Votes(tmp_path / "votes.sqlite", rating_cases.make_plan(study))
  for _ in range(3):
    question = votes.next(1)
    votes.answer(1, question.id, "left" if question.flipped else "right")  # The second: tuned.
  answered = votes.answered()
  votes.close()
  results.write(study, answered, results.find(study, answered))
  header, *rows = (study.directory / "results-votes.csv").read_text().splitlines()
  assert header == "rater,place,set,item,prompt,left,right,answer,preferred,again,seconds"
  assert len(rows) == 3 and all(row.split(",")[8] == "tuned" for row in rows)
  assert {tuple(sorted(row.split(",")[5:7])) for row in rows} == {("base", "tuned")}

  content = json.loads((study.directory / "results.json").read_text())
  assert content["rates"][0]["wins"] == 3 and content["rates"][0]["alpha"] is None
  assert (study.directory / "results.csv").read_text().startswith("comparison,")
  assert (
    "tuned is preferred to base in 100.0 % of 3 votes"
    in (study.directory / "results.md").read_text()
  )
