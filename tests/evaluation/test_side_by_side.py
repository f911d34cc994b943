"""Several models on the same prompts: literals."""

from evaluation_cases import result
import numpy as np
import pytest

from rlft.config.settings import EvalConfig
from rlft.evaluation import side_by_side
from rlft.evaluation.evaluate import EvalSpec
from rlft.types import JaxReward, Prompt

NAN = float("nan")


def rows(*scores, labels=None, lower=False, of_parts=False):
  """One evaluation, whose scores are those of 16 prompts with 2 images each."""
  models = [
    side_by_side.Model(f"m{k}", {"a": result(one, lower=lower)}, {"a": 3.0})
    for k, one in enumerate(scores)
  ]
  labels = labels or [None] * 16
  prompts = [Prompt(str(i), {"tag": x} if x else {}) for i, x in enumerate(labels)]
  spec = EvalSpec("a", JaxReward("m", lambda *_: None), prompts, 32, 2)
  entry = EvalConfig("a", "p", "m", images=32, images_per_prompt=2)
  (row,) = side_by_side.rows([entry], [spec], models, by="tag", of_parts=of_parts)
  return row


def test_changes_are_by_prompt():
  base = np.arange(32) / 32
  # The two images of a prompt move apart: no prompt's mean moves.
  apart = base + np.tile([0.5, -0.5], 16)
  first, second, third = rows(base, apart, base + 0.25).cells
  assert (first.change, first.verdict) == (None, "")
  assert second.change.mean == pytest.approx(0) and second.verdict == "no effect"
  assert third.change.mean == pytest.approx(0.25) == third.change.low and third.verdict == "better"
  assert first.mean.mean == pytest.approx(base.mean())
  (_, worse) = rows(base, base + 0.25, lower=True).cells
  assert worse.verdict == "worse"


def test_parts():
  scores = np.repeat([1.0, 2.0, 3.0, NAN] * 4, 2)
  labels = ["x", "y", "y", "z"] * 4
  row = rows(scores, scores + 1, labels=labels, of_parts=True)
  assert {name: count for name, (count, _) in row.parts.items()} == {
    "x": 4, "y": 8, "z": 4, side_by_side.MEAN_OF_PARTS: 16
  }  # fmt: skip
  assert row.parts["x"][1] == [1, 2] and row.parts["y"][1] == [2.5, 3.5]
  assert np.isnan(row.parts["z"][1]).all()
  # (1 + 2.5) / 2: a part without scores is left out.
  assert row.parts[side_by_side.MEAN_OF_PARTS][1] == [1.75, 2.75]
  lines = side_by_side.parts_table(row).rows
  assert lines[0] == ("x", "4", "1.0000", "2.0000") and lines[2][2:] == ("not scored",) * 2
  assert row.cells[0].unscored == 8 and row.to_json()["parts"]["z"] == [4, [None, None]]
  assert rows(scores).parts == {}


def test_the_table():
  table = side_by_side.table([rows(np.ones(32), np.ones(32) + 1)])
  assert table.header[3] == "change from m0 [95%]"
  assert table.rows[0] == (
    "a", "m0", "1.0000 ±0.0000", "", "", "higher", "3", "32 images, 16 prompts"
  )  # fmt: skip
  assert table.rows[1][1:5] == ("m1", "2.0000 ±0.0000", "+1.0000 [+1.0000, +1.0000]", "better")
