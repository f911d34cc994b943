"""The experiment that compares two ways of giving credit: flags, crossings, files."""

import json
import pathlib

import experiment_cases
import numpy as np
import pytest

from rlft.evaluation.results import EvalResult
from rlft.types import UserError

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def experiment():
  with experiment_cases.script("credit_assignment") as module:
    yield module


def test_flags_of_a_run(experiment):
  base = (ROOT / "experiments" / "emoji_skintone.flags").read_text().splitlines()
  lines, task, name = experiment.run_flags(
    base, "leave-one-out", pathlib.Path("w"), eval_images=32, seed=2, iterations=5
  )
  assert name == "parity" and task.images_per_prompt > 1
  flags = dict(line.removeprefix("--").partition("=")[::2] for line in lines)
  assert len(flags) == len(lines)
  assert flags["task"].endswith(f",reward={task.reward}?credit=leave-one-out")
  assert (flags["workdir"], flags["seed"], flags["iterations"]) == ("w", "2", "5")
  assert "metric=oracle-parity,images=32,images_per_prompt=16" in flags["eval"]
  assert {"pretrained", "sampling_steps", "clip_range"} <= flags.keys()
  with pytest.raises(UserError, match="has 2 tasks"):
    experiment.run_flags([*base, "--task=emoji-skintone"], "set", pathlib.Path("w"), eval_images=32)


def test_what_is_written(experiment, tmp_path, capsys):
  def result(mean):
    scores = np.full(16, mean, np.float32)
    return EvalResult("parity", "oracle-parity", mean, mean, mean, 256, 16, scores, True)

  def history(*means):
    return [(10 * i, result(mean)) for i, mean in enumerate(means)]

  runs = {
    ("set", 0): history(0.6, 0.5, 0.5),
    ("set", 1): history(0.6, 0.6, 0.5),
    ("leave-one-out", 0): history(0.6, 0.4, 0.3),
    ("leave-one-out", 1): history(0.6, 0.4, 0.2),
  }
  experiment.write(tmp_path, runs, [0.5, 0.1], batch_size=64)
  summary = json.loads((tmp_path / "credit_assignment.json").read_text())
  reached = {name: found["reached"] for name, found in summary["credits"].items()}
  # On the mean curves 0.6, 0.55, 0.5 and 0.6, 0.4, 0.25, of 0, 640 and 1280 images.
  assert [one["images"] for one in reached["set"]] == pytest.approx([1280, None, 1280])
  assert [one["images"] for one in reached["leave-one-out"]] == pytest.approx([320, None, 320])
  assert reached["set"][0]["each"] == pytest.approx([640, 1280])
  assert reached["set"][2]["parity"] == pytest.approx(0.5)  # The lowest that both reach.
  assert summary["credits"]["leave-one-out"]["last_parity_mean"] == pytest.approx(0.25)
  rows = (tmp_path / "credit_assignment.csv").read_text().splitlines()
  assert len(rows) == 1 + 4 * 3 and rows[2] == "set,0,10,640,0.50000,0.50000,0.50000,0"
  page = (tmp_path / "credit_assignment.html").read_text()
  assert page.count("<svg") == 1 and "leave-one-out" in page
  assert "leave-one-out         0.500                 320" in capsys.readouterr().out
