"""What is trained at a scale."""

import pathlib

import pytest
import reproduce_cases as cases

from rlft.performance.reproduce import paper
from rlft.performance.reproduce import reproduce as reproduce_lib
from rlft.performance.reproduce import scale as scale_lib
from rlft.performance.reproduce.scale import Experiment
from rlft.run import checks
from rlft.types import UserError

WORKDIR = pathlib.Path("runs")


def test_flags_of_an_experiment():
  scale = cases.scale()
  one = Experiment("raft", ("preference",), 2)
  config = one.config(scale, WORKDIR)
  assert one.name == "raft-preference-2" and config.output.workdir == "runs/raft-preference-2"
  assert (config.seed, config.algorithm.algorithm, config.pretrained) == (2, "raft", "emoji-sd")
  (task,) = config.task
  # The method's key stands above the task's.
  assert (task.name, task.batch_size, task.images_per_prompt) == ("preference", 8, 4)
  assert [entry.name for entry in config.eval] == ["preference-trained", "preference-oracle"]


def test_several_tasks_are_trained_jointly():
  scale = cases.scale()
  one = Experiment("rl", ("skintone", "composition"), 0)
  config = one.config(scale, WORKDIR)
  assert one.name == "rl-joint-0" and len(config.task) == 2 and len(config.eval) == 4
  assert config.iterations == 2  # what it has of its own there
  assert Experiment("rl", ("skintone",), 0).config(scale, WORKDIR).iterations == 4


def test_keys_of_a_task_are_changed():
  assert scale_lib._changed("preset,a=1,b=2", "b=3", "", "c=4,a=5") == "preset,a=5,b=3,c=4"


def test_seeds_are_done_one_after_the_other():
  found = scale_lib.experiments([("a", ("t",)), ("b", ("t",)), ("a", ("t",))], range(2))
  assert [one.name for one in found] == ["a-t-0", "b-t-0", "a-t-1", "b-t-1"]


def test_each_table_needs_its_runs_once():
  scale = cases.scale(methods=cases.CONTENT["methods"] | {"x": {"title": "X", "tables": ["T1"]}})

  def names(*sections):
    return [one.name for one in reproduce_lib.plan(scale, sections, 1)]

  ours = ["refl", "raft", "draft", "rwr", "rl", "x"]
  assert names("T1", "T2") == [f"{name}-preference-0" for name in ours]
  assert names("T3") == [f"{name}-skintone-0" for name in ("raft", "rwr", "rl")]
  assert names("T5")[-1] == "rl-joint-0" and len(names("T5")) == 4
  assert "rl-alone-preference-0" in names("hacking")
  assert set(names("curves")) == set(names("T1", "T3", "T4", "T5"))


def test_mistakes_in_a_scale():
  with pytest.raises(UserError, match="tiny.toml has an unknown key eval: did you mean evals"):
    cases.scale(eval=[])
  with pytest.raises(UserError, match="tiny.toml: add base"):
    scale_lib.parse("tiny", {k: v for k, v in cases.CONTENT.items() if k != "base"})
  with pytest.raises(UserError, match="tiny.toml: methods.rl has an unknown key flag"):
    cases.scale(methods={"rl": {"title": "RL", "flag": []}})
  with pytest.raises(UserError, match="methods.rl: on.joint has an unknown key iterations"):
    cases.scale(methods={"rl": {"title": "RL", "on": {"joint": {"iterations": 3}}}})
  with pytest.raises(UserError, match="tiny.toml: tasks.a is no table"):
    cases.scale(tasks={"a": 1})
  with pytest.raises(UserError, match="methods has no nothing: add it, or leave its tables out"):
    Experiment("nothing", ("preference",), 0).flags(cases.scale(), WORKDIR)
  broken = cases.scale(flags=["--iterations=many"])
  with pytest.raises(UserError, match="tiny.toml: rl on preference: .*iterations=many"):
    Experiment("rl", ("preference",), 0).config(broken, WORKDIR)
  with pytest.raises(UserError, match="--scale=huge: there is no huge.toml in .*: use miniature"):
    scale_lib.load("huge")


def test_the_miniature_has_all_that_the_tables_need():
  scale = scale_lib.load("miniature")
  evals = {entry.name for entry in scale.protocol()}
  for table in paper.TABLES.values():
    assert {column.measure for column in table.columns} <= evals
    assert table.on == () or set(table.on) <= scale.tasks.keys()
  found = reproduce_lib.plan(scale, reproduce_lib._SECTIONS, 1)
  configs = {one.name: one.config(scale, WORKDIR) for one in found}
  assert len(configs) >= 14
  for config in configs.values():
    checks.validate_settings(config)
    # Decided by development prompts alone, while it is trained.
    assert config.eval and all("/development" in entry.prompts for entry in config.eval)
    assert config.evaluation.eval_every and all(task.watch for task in config.task)
