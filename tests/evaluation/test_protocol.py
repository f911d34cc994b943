"""Which guidance is the base's best, and how far a method is from it."""

import dataclasses
import json

from evaluation_cases import result
import numpy as np
import pytest

from rlft.config.settings import EvalConfig
from rlft.evaluation import protocol, summary, tables
from rlft.types import UserError

NAN = float("nan")


def entry(name, **more):
  return EvalConfig(**({"name": name, "prompts": "p", "metric": "m", "images": 32} | more))


def of_32(scores, **more):
  """A result on 16 prompts, two images each: what `evaluation_cases` says of its size."""
  assert len(scores) in (16, 32)
  return result(scores, **more)


def test_the_best_guidance_is_chosen_by_direction():
  found = {
    1.0: {"up": result([1, 2]), "down": result([3, 4], lower=True), "none": result([NAN, NAN])},
    3.0: {"up": result([2, 3]), "down": result([1, 2], lower=True), "none": result([NAN, NAN])},
    5.0: {"up": result([2, 3]), "down": result([2, 3], lower=True), "none": result([NAN, NAN])},
  }
  base = protocol.Base(found, {})
  assert base.best("up") == 3.0  # the least of equals
  assert base.best("down") == 3.0
  with pytest.raises(UserError, match="--eval=name=none: the metric could score none"):
    base.best("none")


def test_scores_of_images_and_of_sets_become_a_column_for_each_prompt():
  each = of_32(np.arange(32))
  table = protocol.scores(entry("a", images_per_prompt=2), [each, each])
  assert table.shape == (2, 16) and table[0].tolist() == [2 * i + 0.5 for i in range(16)]
  # Without neighbours, the seventeenth image is the second of the first prompt.
  assert protocol.scores(entry("a"), [each])[0].tolist() == [i + 8.0 for i in range(16)]
  sets = protocol.scores(entry("a", images_per_prompt=2), [of_32(np.arange(16))])
  assert sets[0].tolist() == list(range(16))
  with pytest.raises(UserError, match="was measured in two ways"):
    protocol.scores(entry("a"), [each, of_32(np.arange(16))])


@pytest.fixture
def compared():
  rng = np.random.default_rng(0)
  prompts = rng.normal(size=16)
  both = {
    g: {
      "both": of_32(prompts + shift, name="both"),
      "parity": of_32(prompts - shift, name="parity", lower=True),
      "skin": of_32(np.ones(16), name="skin"),
    }
    for g, shift in ((1.0, 0), (3.0, 1), (5.0, 2))
  }
  base = protocol.Base(both, both)
  runs = {
    seed: {
      "both": of_32(prompts + 2.5 + 0.1 * seed, name="both"),
      "parity": of_32(prompts - 1, name="parity", lower=True),
      "skin": of_32(np.linspace(0.8, 0.9, 16), name="skin"),
    }
    for seed in (0, 1, 2)
  }
  method = protocol.Method("rl", 3.0, runs, frozenset({"both"}))
  evals = [entry("skin", guard=True), entry("both"), entry("parity")]
  return protocol.compare(method, base, evals)


def test_a_method_is_compared_with_the_base_at_its_best_guidance(compared):
  skin, both, parity = compared
  assert (both.best_guidance, both.verdict, both.trained_on) == (5.0, "better", True)
  # Seeds are 0.5, 0.6 and 0.7 above the base at its best; prompts do not matter.
  assert both.gain.mean == pytest.approx(0.6) and 0.2 < both.gain.low < 0.5
  assert both.after.mean - both.same.mean == pytest.approx(1.6)
  # Better than the base at the same guidance would not have been enough.
  assert (parity.best_guidance, parity.verdict) == (5.0, "worse")
  assert parity.same.mean == pytest.approx(parity.after.mean)
  assert skin.guard and skin.verdict == "worse" and skin.gain.mean == pytest.approx(-0.15)


def test_what_is_written(compared):
  text = protocol.table(compared)
  assert [row[0] for row in text.rows] == ["both (trained on)", "parity", "skin (guard)"]
  assert text.rows[0][3].endswith(" at 5") and text.rows[0][7] == "better"
  assert text.rows[1][2] == "lower"
  assert text.rows[0][6].startswith("+0.6000 [+0.")
  skin = compared[0].to_json()
  assert json.loads(json.dumps(skin, allow_nan=False))["gain"]["mean"] == skin["gain"]["mean"]


def test_what_could_not_be_scored_is_said():
  nothing = {"a": of_32(np.full(16, NAN), name="a")}
  some = {"a": of_32(np.arange(16), name="a")}
  base = protocol.Base({1.0: some}, {1.0: some})
  (found,) = protocol.compare(protocol.Method("m", 1.0, {0: nothing}), base, [entry("a")])
  assert found.verdict == "unclear" and summary.mean(found.after) == "not scored"
  assert protocol.change_words(found.gain) == "" and found.to_json()["gain"]["mean"] is None
  one = dataclasses.replace(found.best, low=NAN, high=NAN)
  assert summary.mean(one) == "7.5000" and protocol.change_words(one) == "+7.5000"


def test_what_was_not_found_stands_beside_the_measure():
  """Else a model that draws no skin has the parity of those few pictures where it did."""
  before = {"parity": of_32(np.arange(16), name="parity", lower=True, found=0.99)}
  after = {"parity": of_32(np.arange(16), name="parity", lower=True, found=0.31)}
  base = protocol.Base({1.0: before}, {1.0: before})
  found = protocol.compare(protocol.Method("m", 1.0, {0: after}), base, [entry("parity")])
  ((*_, best, _, trained, _, _),) = protocol.table(found).rows
  assert best.endswith("at 1, found in 99.0%") and trained.endswith(", found in 31.0%")


def test_tables_as_markdown_and_csv():
  table = tables.Table(("a", "b"), (("x|y", "1,2"), ("line\nline", "")))
  assert table.markdown().splitlines() == [
    "| a | b |",
    "| --- | --- |",
    "| x\\|y | 1,2 |",
    "| line line |  |",
  ]
  assert table.csv() == 'a,b\nx|y,"1,2"\n"line\nline",\n'
