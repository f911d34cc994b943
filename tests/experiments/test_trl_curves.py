"""The experiment beside TRL: what both sides are told, what is chosen, what is written."""

import json
import pathlib

import experiment_cases
import numpy as np
import pytest

from rlft import catalog
from rlft.evaluation.tables import Table
from rlft.performance.peer import curves
from rlft.performance.reproduce import scale
from rlft.types import UserError

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def experiment():
  with experiment_cases.script("trl_curves") as module:
    yield module


def trainings(experiment, workdir, *changes):
  return experiment.Trainings(scale.load("miniature"), "composition", workdir, changes, 16)


def test_flags_of_a_run(experiment, tmp_path):
  ours = trainings(experiment, tmp_path, "--iterations=2")
  lines, config = ours.experiment({"learning_rate": 1e-3, "train_timesteps": 7}, 4)
  assert config.optimizer.learning_rate == 1e-3 and config.algorithm.train_timesteps == 7
  assert (config.iterations, config.seed, config.task[0].batch_size) == (2, 4, 16)
  where = tmp_path / "rlft" / "learning_rate=0.001_train_timesteps=7" / "rl-composition-4"
  assert config.output.workdir == str(where) and f"--workdir={where}" in lines
  assert ours.judge in [entry.name for entry in config.eval]


def test_every_trial_of_ours_can_be_trained(experiment, tmp_path):
  start, rounds = experiment._OURS
  for changed in [{}, *({name: value} for name, each in rounds.items() for value in each)]:
    _, config = trainings(experiment, tmp_path).experiment(start | changed, 0)
    catalog.make_algorithm(config.algorithm).check(config.policy, config.task)


def test_a_workdir_has_trainings_of_one_kind(experiment, tmp_path):
  for _ in range(2):
    trainings(experiment, tmp_path).check_workdir()
  with pytest.raises(UserError, match="with other flags"):
    trainings(experiment, tmp_path, "--iterations=2").check_workdir()


def test_options_of_trl(experiment):
  settings, rounds = experiment._TRL
  assert experiment.trl_options(settings, 128) == {
    "train_learning_rate": 1.5e-4,
    "train_batch_size": 32,
    "train_clip_range": 1e-3,
    "train_num_inner_epochs": 1,
    "train_max_grad_norm": 1.0,
  }
  with pytest.raises(UserError, match="12 images cannot be cut into 16 batches"):
    experiment.trl_options({**settings, "batches": 16}, 12)
  # Neither side is tried more often.
  tried = [sum(map(len, rounds.values())) for _, rounds in (experiment._OURS, experiment._TRL)]
  assert tried[0] == tried[1]
  assert all(grid[0].keys() == grid[1].keys() for grid in (experiment._OURS, experiment._TRL))


def test_a_choice_is_kept(experiment, tmp_path):
  class Worth:
    asked = 0

    def worth(self, side, settings):
      self.asked += 1
      if side == "rlft":
        return settings["train_timesteps"] / 6
      return float("nan") if settings["inner_epochs"] == 2 else -settings["train_learning_rate"]

  file, asked = tmp_path / "chosen.json", Worth()
  starts, none = experiment._chosen(asked, file, sweep=False)
  assert starts["TRL"] == experiment._TRL[0] and not none["TRL"] and not asked.asked
  for sweep in (True, True, False):
    chosen, tried = experiment._chosen(asked, file, sweep=sweep)
    assert chosen["rlft"]["train_timesteps"] == 6 and chosen["TRL"]["train_learning_rate"] == 5e-5
    assert asked.asked == 20 and [1 for _, value in tried["TRL"] if value is None]
  assert json.loads(file.read_text())["chosen"] == chosen
  # Of another number of rounds there is none yet; the first is of learning rates.
  chosen, tried = experiment._chosen(asked, file, sweep=True, rounds=1)
  assert chosen["rlft"] == experiment._OURS[0] and chosen["TRL"]["train_learning_rate"] == 5e-5
  assert [len(each) for each in tried.values()] == [4, 4]


def test_the_text(experiment):
  iterations = np.arange(2)
  sides = {
    side: [curves.Curve(0, iterations, iterations * 16, iterations * 2.0, {"j": np.array(means)})]
    for side, means in (("rlft", [0.25, 0.75]), ("TRL", [0.25, 0.5]))
  }
  text = experiment.section(
    sides,
    "j",
    lower_is_better=False,
    final=Table(["", "base"], [["j", "0.2 ±0.1"]]),
    chosen={"rlft": {"a": 1e-3}, "TRL": {"b": 2}},
    tried={
      "rlft": [({"a": 1e-3}, 0.7), ({"a": 1e-4}, 0.6), ({"a": 1e-5}, 0.5)],
      "TRL": [({"b": 2}, None), ({"b": 1}, 0.4), ({"b": 3}, 0.4)],
    },
    failed=["TRL with seed 1: epoch 0: why"],
    flags=["--seed=0", "--workdir=somewhere"],
    figure="f.svg",
    options="--sweep --seeds=1",
  )
  assert "/bin/python --sweep --seeds=1\n" in text
  assert "16 images; trainings: 1 of rlft, 1 of TRL." in text
  assert "0.2500 (rlft) and 0.2500 (TRL)" in text
  assert "| 0.500 | 8 | 16 | 1 | 2 |" in text and "| j | 0.2 ±0.1 |" in text
  assert "Settings: rlft a=0.001; TRL b=2." in text
  assert "All of its flags: `--seed=0`." in text
  assert "| rlft | a=0.001 | 0.7000 |" in text and "| TRL | b=2 | failed |" in text
  assert "At the edge of what was tried: rlft a=0.001." in text
  assert "for they failed: TRL with seed 1: epoch 0: why." in text
