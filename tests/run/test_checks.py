"""What is refused before a run starts, and with which words."""

import os
import re

import pytest

from rlft.config import fields, tasks
from rlft.config.settings import Config, EvalConfig, TaskConfig
from rlft.run import checks
from rlft.types import UserError

TASK = TaskConfig(name="tone", prompts="emoji:portrait/train", reward="r", batch_size=32)


@pytest.fixture
def run(tmp_path) -> Config:
  """A run that passes every check."""
  return fields.make(
    Config,
    pretrained="emoji-sd",
    workdir=str(tmp_path / "run"),
    task=(TASK,),
    pretrain_data="emoji",
  )


def refusal(check, *args, **kwargs) -> str:
  """The message of the UserError that `check` raises: one line."""
  with pytest.raises(UserError) as caught:
    check(*args, **kwargs)
  message = str(caught.value)
  assert "\n" not in message
  return message


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"pretrained": ""}, "--pretrained is missing: give a model directory"),
    ({"workdir": ""}, "--workdir is missing: give a directory"),
    ({"task": ()}, "--task is missing: give at least one"),
    ({"iterations": 0}, "--iterations=0 is out of range: it must be at least 1"),
    ({"seed": -1}, "--seed=-1 is out of range"),
    ({"seed": 2**32}, "--seed=4294967296 is out of range: it must be less than 4294967296"),
    ({"seed": 1.5}, "--seed=1.5 is not a number: give a finite int"),
    ({"learning_rate": float("nan")}, "--learning_rate=nan is not a number"),
    ({"learning_rate": -1.0}, "--learning_rate=-1.0 is out of range: it must be greater than 0"),
    ({"eta": 0.0}, "--eta=0.0 is out of range: it must be greater than 0"),
    ({"eta": 1.5}, "--eta=1.5 is out of range: it must be at most 1"),
    ({"guidance_scale": 0.0}, "--guidance_scale=0.0 is out of range"),
    ({"ema_decay": 1.0}, "--ema_decay=1.0 is out of range: it must be less than 1"),
    ({"fsdp": 0}, "--fsdp=0 is out of range"),
    ({"max_nan_share": 1.1}, "--max_nan_share=1.1 is out of range: it must be at most 1"),
    ({"compute_dtype": "bfloat"}, "--compute_dtype=bfloat is not known: did you mean bfloat16?"),
    ({"train_timesteps": 60}, "--train_timesteps=60 is more than --sampling_steps=50"),
    ({"prompt_history_min": 33}, "--prompt_history_min=33 is more than --prompt_history=32"),
    ({"pretrain_data": ""}, "--pretrain_weight=1.0 needs data: give --pretrain_data=emoji"),
    ({"lora_alpha": 8.0}, "--lora_alpha=8.0 has no effect without LoRA"),
    ({"eval_every": 5}, "--eval_every=5 has nothing to evaluate"),
    ({"advantage": "group"}, "with --advantage=group and images_per_prompt=1 every advantage is 0"),
    ({"task": (TASK, TASK)}, "two of --task have the name tone"),
    ({"pretrained": "/no/such/model"}, "--pretrained=/no/such/model is not a directory: give a"),
    ({"pretrained": "org/name"}, "--pretrained=org/name is not a directory here, and as a hub's"),
    ({"pretrained": "org/name@a/unet"}, "--pretrained=org/name@a/unet is not a directory: give"),
    ({"pretrained": os.path.dirname(__file__)}, "has no model_index.json"),
    ({"pretrain_data": "/no/such/folder"}, "--pretrain_data=/no/such/folder has no metadata.jsonl"),
    ({"workdir": "s3://bucket/run"}, "--workdir=s3://bucket/run is no directory, nor in a bucket"),
    ({"workdir": __file__}, "cannot be written to ("),
    ({"workdir": f"{__file__}/run"}, "cannot be written to ("),
  ],
)
def test_a_wrong_setting_is_refused(run, change, message):
  wrong = fields.replace(run, **change)
  assert message in refusal(checks.validate, wrong)
  assert not os.path.exists(run.output.workdir)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"name": "a/b"}, "--task=name=a/b: use letters, digits"),
    ({"batch_size": 1}, "batch_size=1 is out of range: it must be at least 2"),
    ({"images_per_prompt": 0}, "images_per_prompt=0 is out of range"),
    (
      {"batch_size": 40, "images_per_prompt": 16},
      "batch_size=40 is not a multiple of images_per_prompt=16: use batch_size=48 or 32",
    ),
    ({"prompts": "emoji:portrait/trian"}, "unknown split 'trian'"),
    ({"prompts": "nowhere.txt"}, "prompt file nowhere.txt does not exist"),
  ],
)
def test_a_wrong_task_setting_is_refused(run, change, message):
  wrong = fields.replace(run, task=(fields.replace(TASK, **change),))
  assert message in refusal(checks.validate, wrong)
  assert not os.path.exists(run.output.workdir)


def test_an_evaluation_that_does_not_divide_is_refused(run):
  entry = EvalConfig(name="e", prompts="emoji:pair/test", metric="m", images=10)
  entry = fields.replace(entry, images_per_prompt=16)
  message = refusal(checks.validate, fields.replace(run, eval=(entry,)))
  assert "images=10 is not a multiple of images_per_prompt=16: use images=16" in message


def test_validate_creates_the_working_directory(run):
  checks.validate(run)
  assert os.listdir(run.output.workdir) == []
  checks.validate(run)


def test_sizes_must_divide_among_devices(run):
  checks.validate_devices(fields.replace(run, fsdp=4), device_count=8, process_count=2)
  check = checks.validate_devices
  assert "--fsdp=4 does not divide the 6 devices" in refusal(
    check, fields.replace(run, fsdp=4), device_count=6, process_count=1
  )
  assert "batch_size=32 cannot be divided among 3 devices" in refusal(
    check, run, device_count=3, process_count=1
  )
  assert "--pretrain_batch_size=100 is not a multiple of the 8 devices" in refusal(
    check, fields.replace(run, pretrain_batch_size=100), device_count=8, process_count=1
  )
  # 32 images on 4 processes are 8 each, but the 16 images of a prompt belong together.
  sets = fields.replace(run, task=(fields.replace(TASK, images_per_prompt=16),))
  check(sets, device_count=8, process_count=2)
  assert "use batch_size=64" in refusal(check, sets, device_count=8, process_count=4)


def test_set_rewards_need_sets():
  checks.validate_sets(TASK, [])
  checks.validate_sets(fields.replace(TASK, images_per_prompt=16), ["r"])
  message = "r scores the images of a prompt as a set: give images_per_prompt, e.g. 16"
  assert message in refusal(checks.validate_sets, TASK, ["r"])


@pytest.mark.parametrize("preset", tasks.TASK_PRESETS)
def test_every_preset_passes_the_checks(preset, run):
  everything = fields.replace(run, task=tasks.parse_task(preset), eval=tasks.parse_eval("emoji"))
  checks.validate(everything)
  checks.validate_devices(everything, device_count=8, process_count=1)


def test_pictures_that_are_not_used_are_said_not_to_be(run, caplog):
  checks.warn_if_unused(fields.replace(run, pretrain_data="emoji", pretrain_weight=1.0))
  assert not caplog.text
  checks.warn_if_unused(fields.replace(run, pretrain_data="emoji", pretrain_weight=0.0))
  assert "--pretrain_data=emoji is not used, as --pretrain_weight is 0" in caplog.text


@pytest.mark.parametrize(
  ("norm", "bound", "said"), [(0.3, 0.1, True), (0.1, 0.3, False), (9, 0, False)]
)
def test_weights_without_effect_are_said_to_have_none(run, caplog, norm, bound, said):
  run = fields.replace(run, max_grad_norm=float(bound))
  checks.warn_if_bounded(run, {"grad_norm": norm})
  assert ("--max_grad_norm=0.1: a factor of their losses" in caplog.text) == said
  caplog.clear()
  checks.warn_if_bounded(run, {"grad_norm": 0.0, "pretrain/grad_norm": norm})
  assert ("--max_grad_norm=0.1: --pretrain_weight=1 does not change" in caplog.text) == said


@pytest.mark.parametrize(
  ("times", "processes", "said"),
  [
    ({"time/update_s/a": 16.0, "time/update_s/b": 40.0}, 1, r"time/update_s/b\) takes 40 s"),
    ({"time/sample_s/a": 67.0, "time/update_s/a": 18.0}, 2, r"time/sample_s/a\) takes 67 s"),
    ({"time/sample_s/a": 67.0, "time/update_s": 99.0}, 1, None),
  ],
)
def test_a_run_that_stops_too_slowly_for_a_spot_machine_says_so(caplog, times, processes, said):
  checks.warn_if_slow_to_stop(times, processes)
  assert re.search(said, caplog.text) if said else not caplog.text
