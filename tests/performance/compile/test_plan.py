"""The plan of a run, and what it says that it will cost."""

import dataclasses
import pathlib

import pytest
import train_cases

from rlft.config import fields
from rlft.config.settings import Config, EvalConfig, TaskConfig
from rlft.parallel.compiled import compilations
from rlft.parallel.join import ProcessSettings
from rlft.performance.compile import ahead, cost, plan, targets
from rlft.performance.compile.abstract_run import AbstractRun, Call
from rlft.performance.compile.chips import CHIPS
from rlft.performance.compile.table import Result, Row
from rlft.types import UserError


def task(name, batch_size=16, prompts="prompts.txt"):
  return TaskConfig(name=name, prompts=prompts, reward="-", batch_size=batch_size)


def held_out(name, **changes):
  given = {"prompts": "prompts.txt", "metric": "-", "images": 20}
  return EvalConfig(name=name, **(given | changes))


CONFIG = fields.make(
  Config,
  task=(task("a"),),
  eval=(held_out("first"), held_out("same_images"), held_out("other", images=4)),
  pretrained="model",
  workdir="runs/x",
  iterations=10,
  eval_every=4,
  sampling_steps=3,
  train_timesteps=2,
  guidance_scale=1.0,
  pretrain_weight=0.0,
  ema_decay=0.9,
  compute_dtype="float32",
)


# What it costs.


def row(name, flops, times=1, images=16):
  return Row(Call(name, None, (), times, images, {}), Result(flops=flops), 0)


ROWS = [row("encode", 1.0), row("sample", 100.0), row("update", 30.0, times=2), row("average", 0.5)]


def test_work_is_told_apart():
  # Evaluations before 0, 4, 8 and at the end: 20 images are two batches of 16, and 4 are one.
  assert cost.remaining_work(CONFIG, ROWS, 0) == cost.Work(1010.0, 605.0, 4 * 3 * 101.0)
  assert cost.remaining_work(CONFIG, ROWS, 0).total == 1010 + 605 + 1212


def test_a_run_that_goes_on_costs_what_is_left():
  assert cost.remaining_work(CONFIG, ROWS, 7) == cost.Work(303.0, 181.5, 2 * 3 * 101.0)
  assert cost.remaining_work(CONFIG, ROWS, 10).sampling == 0


def test_the_best_base_is_measured_once():
  best = (held_out("own", base_guidance=1.0), held_out("best", base_guidance=3.0))
  config = fields.replace(CONFIG, eval=best, eval_every=0)
  assert cost.remaining_work(config, ROWS, 0).evaluation == (2 * 2 + 2) * 101.0
  assert cost.remaining_work(config, ROWS, 1).evaluation == 2 * 101.0


def test_evaluations_draw_batches_of_the_largest_task():
  config = fields.replace(CONFIG, task=(task("a"), task("b", batch_size=8)), eval_every=0)
  rows = [
    row("encode 16", 1.0),
    row("sample 16", 100.0),
    row("update 16", 30.0),
    row("encode 8", 0.5, images=8),
    row("sample 8", 50.0, images=8),
    row("update 8", 15.0, images=8),
  ]
  found = cost.remaining_work(config, rows, 0)
  assert found == cost.Work(10 * 151.5, 10 * 45.0, 2 * 3 * 101.0)


def test_hours_of_a_chip():
  # 989e12 at 20 % for an hour.
  assert cost.chip_hours(989e12 * 0.2 * 3600, CHIPS["h100"], 0.2) == pytest.approx(1)


def test_the_default_utilisation_is_what_its_source_has():
  seconds = 6.8 * 24 * 3600 * 128
  work = 2048 * (550_000 * 0.53e12 + 850_000 * 2.41e12)
  assert work / (seconds * CHIPS["a100"].flops) == pytest.approx(cost.UTILISATION, rel=0.05)


# The plan.


@pytest.fixture(scope="module")
def run():
  """Whose programs are traced once for all tests."""
  mesh = targets.open_target("cpu:8", 1).mesh
  return AbstractRun.of(CONFIG, mesh, train_cases.tiny_model())


@pytest.fixture
def described(run, tmp_path, monkeypatch):
  """Describes a run of the smallest model in an empty directory."""

  class Run:
    @staticmethod
    def of(config, mesh, model):
      assert mesh == run.mesh
      return dataclasses.replace(run, config=config)

  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(plan, "AbstractRun", Run)
  monkeypatch.setattr(plan, "open_model", lambda *_: None)

  def describe(config=CONFIG, **settings):
    settings = {"dry_run": True, "target": "cpu:8", "cache_dir": ""} | settings
    return plan.describe(config, plan.PlanConfig(**settings))

  return describe


def test_a_plan_says_where_what_and_how_much(described, tmp_path):
  with compilations() as names:
    text = described()
  assert not names and not list(tmp_path.iterdir())
  for words in (
    "cpu:8: 8 devices as 8 x 1 (data x fsdp), 1 process\n",
    "16 images an iteration, 2 a device, of 16 prompts (prompts.txt)\n",
    "iterations   10\n",
    "before, every 4 iterations and after, 24 images each time\n",
    "runs/x: starts afresh\n",
    "every 10 iterations, 0.00 GiB each; the newest 2 stay\n",
    "logs         in its metrics.jsonl and tensorboard/; in the end its report.html\n",
    "missing      prompt file prompts.txt does not exist",
    "| average | 1 | 0.0 GFLOP | at least 0.00, estimated |",
    "Hours are not known, as cpu:8 has no known peak",
  ):
    assert words in text, text


def test_a_plan_goes_on_from_the_newest_checkpoint(described):
  pathlib.Path("runs/x/checkpoints/iteration_7_task_1").mkdir(parents=True)
  pathlib.Path("prompts.txt").write_text("a dog\n")
  text = described(fields.replace(CONFIG, eval=(), eval_every=0))
  assert "runs/x: goes on from iteration 7\n" in text and "missing" not in text
  assert "in its metrics.jsonl; in" in described(fields.replace(CONFIG, tracker="none"))


def test_a_workdir_that_cannot_be_read_is_taken_to_be_new(described):
  pathlib.Path("runs").write_text("a file")
  assert "runs/x: cannot be read from here, a new one is assumed\n" in described()


def test_hours_and_money_of_gpus_that_are_not_here(described, monkeypatch):
  monkeypatch.setattr(targets, "_cuda_plugin", lambda: "")
  text = described(target="h100:8", price_per_chip_hour=2.5, utilisation=0.4)
  assert "8 chips of 989 TFLOP/s in bfloat16, 3.35 TB/s of memory, 450 GB/s to each other" in text
  assert ", estimated, of 55.88 |" in text
  assert "| from here to the end | work | share | chip hours | time | price |" in text
  assert "At 40% of the chips' peak" in text


def test_memory_is_that_of_a_kept_compilation(run, described, tmp_path):
  target = targets.open_target("cpu:8", 1)
  (average,) = (call for call in run.calls() if call.name == "average")
  found = ahead.compile_program(average, target, tmp_path / "kept")
  (line,) = (
    line for line in described(cache_dir="kept").splitlines() if line.startswith("| average")
  )
  assert "estimated" not in line and found.peak > 0 and not found.estimated


def test_what_is_in_a_bucket_is_not_copied_to_be_looked_for(monkeypatch):
  monkeypatch.setattr(plan.catalog, "check_prompts", lambda name: pytest.fail(name))
  config = fields.replace(CONFIG, task=(task("a", prompts="gs://b/p.txt[:-9]"),), eval=())
  assert not list(plan._missing(config, targets.open_target("cpu:8", 1)))


def test_several_processes_need_a_disk_that_all_see(described):
  target = fields.replace(targets.open_target("cpu:8", 1), processes=2)
  assert any("all 2 processes see" in line for line in plan._missing(CONFIG, target))
  bucket = fields.replace(CONFIG, workdir="gs://bucket/x")
  assert not any("2 processes" in line for line in plan._missing(bucket, target))


def test_work_and_time_have_units():
  assert [plan._flop(x) for x in (0, 2e9, 1.5e15, 3e21)] == [
    "0.0 GFLOP",
    "2.0 GFLOP",
    "1.5 PFLOP",
    "3,000.0 EFLOP",
  ]
  assert [plan._time(x) for x in (0.005, 0.5, 26)] == ["0.3 min", "30.0 min", "26.0 h"]


@pytest.mark.parametrize(
  ("settings", "config", "words"),
  [
    ({"target": "cpu:8"}, {"task": (task("a", batch_size=12),)}, "cannot be divided among 8"),
    ({"architecture": "sd2-base"}, {}, "either --pretrained or --architecture"),
    ({"target": "h100"}, {}, "--target=h100 is not known"),
    ({}, {"pretrained": "gs://b/m"}, "--pretrained=gs://b/m would be copied to this machine"),
    ({}, {"init_lora": "s3://b/l"}, "--init_lora=s3://b/l would be .* in its place --lora_rank"),
  ],
)
def test_mistakes(described, settings, config, words):
  with pytest.raises(UserError, match=words):
    described(fields.replace(CONFIG, **config), **settings)


def test_flags_of_a_plan_are_refused_without_one():
  plan.check_used(plan.PlanConfig())
  plan.check_used(plan.PlanConfig(dry_run=True, target="h100:8"))
  with pytest.raises(UserError, match="--target has no effect on a training: give --dry_run too"):
    plan.check_used(plan.PlanConfig(target="h100:8"))


@pytest.mark.parametrize(
  "given",
  [{"coordinator": "a:1"}, {"num_processes": 4}, {"process_id": 0}, {"process_timeout_s": 9}],
)
def test_flags_of_processes_are_refused_with_a_plan(given):
  processes, (name,) = ProcessSettings(**given), given
  plan.check_used(plan.PlanConfig(), processes)
  plan.check_used(plan.PlanConfig(dry_run=True), ProcessSettings())
  with pytest.raises(UserError, match=f"--{name} has no effect on --dry_run, .* with --target"):
    plan.check_used(plan.PlanConfig(dry_run=True), processes)
