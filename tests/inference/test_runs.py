"""Trained runs, and which of them are one method."""

import json

import pytest

from rlft.config import fields, stored
from rlft.config.settings import Config, EvalConfig, TaskConfig
from rlft.inference import runs
from rlft.types import UserError


def config(**changes):
  task = TaskConfig(name="t", prompts="p", reward="r", batch_size=8)
  return fields.make(Config, **({"task": (task,), "pretrained": "emoji-sd"} | changes))


def run(path, **changes):
  return runs.TrainedRun(path, config(**changes), "iteration_1")


def test_runs_that_differ_in_their_seeds_alone_are_one_method():
  watched = TaskConfig(name="t", prompts="p", reward="r", batch_size=8, watch="oracle-both")
  entry = EvalConfig(name="a", prompts="p", metric="m")
  found = runs.grouped(
    [
      run("x/rl-2", seed=2),
      run("x/weighted", algorithm="reward-weighted"),
      # Where it is kept and how it is watched does not make another method.
      run(
        "x/rl-0", workdir="x/rl-0", eval_every=3, eval=(entry,), task=(watched,), keep_checkpoints=5
      ),
      run("y/rl-3", learning_rate=1.0),
    ]
  )
  assert {name: [one.path for one in group] for name, group in found.items()} == {
    "rl": ["x/rl-0", "x/rl-2"],
    "weighted": ["x/weighted"],
    "rl-3": ["y/rl-3"],
  }


def test_names_of_methods_differ():
  found = runs.grouped(
    [run("x/a"), run("y/a", seed=1, iterations=7), run("z/a", learning_rate=1.0)]
  )
  assert list(found) == ["a", "a (2)", "a (3)"]
  assert list(runs.grouped([run("x/0"), run("x/1", seed=1)])) == ["0"]


def test_the_same_run_twice_is_a_mistake():
  with pytest.raises(UserError, match="a and b are runs with the same settings and --seed=0"):
    runs.grouped([run("a"), run("b")])


def test_opening_a_run(tmp_path):
  with pytest.raises(UserError, match="is no directory of a run"):
    runs.open_run(str(tmp_path))
  (tmp_path / "config.json").write_text(stored.to_json(config(seed=3)))
  with pytest.raises(UserError, match="has no checkpoint yet"):
    runs.open_run(str(tmp_path))
  for name in ("iteration_2", "iteration_10", "iteration_10_task_1", "iteration_11.unreadable"):
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
    marker = {"item_handlers": {}, "metrics": {}}
    (tmp_path / "checkpoints" / name / "_CHECKPOINT_METADATA").write_text(json.dumps(marker))
  found = runs.open_run(str(tmp_path))
  assert (found.config.seed, found.checkpoint) == (3, "iteration_10_task_1")
