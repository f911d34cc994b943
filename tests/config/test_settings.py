"""Settings stored with a checkpoint, and what a resumed run may change."""

import re

import pytest

from rlft.config import fields, stored, tasks
from rlft.config.settings import Config, TaskConfig
from rlft.types import UserError

TASK = TaskConfig(name="tone", prompts="emoji:portrait/train", reward="r", batch_size=32)
RUN = fields.make(Config, pretrained="emoji-sd", workdir="run", task=(TASK,), pretrain_data="emoji")


def test_json_keeps_everything():
  full = fields.replace(RUN, eval=tasks.parse_eval("emoji"), clip_range=1e-3, remat=False)
  assert stored.from_json(stored.to_json(full)) == full
  assert stored.from_json("{}") == Config()


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "cannot be read"),
    ("[]", "cannot be read"),
    ('{"tusk": 1}', "unknown fields (tusk)"),
    ('{"task": [{"name": "a"}]}', "cannot be read"),
    ('{"seed": "one"}', "stored seed=one is not a number"),
  ],
)
def test_a_stored_configuration_that_is_none_is_refused(text, message):
  with pytest.raises(UserError, match=re.escape(message)):
    stored.from_json(text)


@pytest.mark.parametrize(
  "change",
  [
    {"seed": 1},
    {"guidance_scale": 2.0},
    {"eta": 0.5},
    {"sampling_steps": 20},
    {"lora_rank": 4},
    {"task": (fields.replace(TASK, batch_size=64),)},
    {"ema_decay": 0.99},
  ],
)
def test_resume_refuses_another_policy_or_order(change):
  (name,) = change
  remedy = "give the old ones to resume it, or a new --workdir"
  with pytest.raises(UserError, match=rf"\({name}: .* -> .*\): {remedy}"):
    stored.check_resume(RUN, fields.replace(RUN, **change))


def test_what_a_resumed_run_cannot_change():
  """The policy, the order of data, the shape of the state, and what evaluations are paired by."""
  fixed = {name for name, field in fields.leaves(Config).items() if field.metadata.get("fixed")}
  assert fixed == {
    *("advantage", "algorithm", "backend", "compute_dtype", "ema_decay", "eta", "eval"),
    *("eval_seed", "guidance_scale", "image_size", "init_lora", "lora_alpha", "lora_rank"),
    *("max_grad_norm", "microbatch", "moments_dtype", "param_dtype", "pretrain_batch_size"),
    *("pretrain_data", "prompt_history", "sampling_steps", "scheduler", "seed", "task"),
  }


def test_resume_permits_the_rest_and_says_what_changed():
  averaged = fields.replace(RUN, ema_decay=0.9)
  later = fields.replace(
    averaged, workdir="/moved", iterations=2000, checkpoint_every=5, ema_decay=0.99
  )
  assert stored.check_resume(averaged, later) == [
    "iterations: 1000 -> 2000",
    "ema_decay: 0.9 -> 0.99",
    "checkpoint_every: 10 -> 5",
  ]
  assert stored.check_resume(RUN, RUN) == []


def test_resume_permits_another_judge_and_no_other_veto():
  watched, vetoed = (
    fields.replace(RUN, task=(fields.replace(TASK, **change),))
    for change in ({"watch": "oracle-parity"}, {"veto": "jpeg>=-1"})
  )
  (change,) = stored.check_resume(RUN, watched)
  assert change.startswith("task: name=tone,") and change.endswith(",watch=oracle-parity")
  for old, new in ((RUN, vetoed), (watched, vetoed)):
    with pytest.raises(UserError, match="veto=jpeg>=-1"):
      stored.check_resume(old, new)


def test_resume_permits_another_address_of_the_same_model():
  def served(reward):
    return fields.replace(RUN, task=(fields.replace(TASK, reward=reward),))

  old = served("http://a:8000/v2/models/unidet?output=score")
  (change,) = stored.check_resume(old, served("https://b.org/x/v2/models/unidet?output=score"))
  assert "https://b.org" in change
  judged = served("vlm://a:8000/org/judge?answer=no")
  (change,) = stored.check_resume(judged, served("vlms://b.org/org/judge?answer=no"))
  with pytest.raises(UserError):
    stored.check_resume(judged, served("vlm://a:8000/org/other?answer=no"))
  for other in ("http://a:8000/v2/models/owl?output=score", "http://a:8000/v2/models/unidet"):
    with pytest.raises(UserError, match="was started with other settings"):
      stored.check_resume(old, served(other))
