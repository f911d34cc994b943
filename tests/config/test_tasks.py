"""The values of --task and --eval."""

import dataclasses
import re

import pytest

from rlft.config import tasks
from rlft.types import UserError


def test_presets_expand_and_can_be_overridden():
  (skintone,) = tasks.parse_task("emoji-skintone")
  assert skintone.images_per_prompt == 16
  (small,) = tasks.parse_task("preset=emoji-skintone,batch_size=32")
  assert small == dataclasses.replace(skintone, batch_size=32)
  assert tasks.parse_task("emoji-skintone, batch_size=32") == (small,)
  evals = tasks.parse_eval("emoji")
  assert {entry.name: (entry.prompts, entry.metric) for entry in evals} == {
    "parity": ("emoji:portrait/test", "oracle-parity"),
    "both": ("emoji:pair/test", "oracle-both"),
    "preference": ("emoji:preference/test", "oracle-preference"),
    "presence": ("emoji:single/test", "oracle-presence"),
  }
  assert [entry.images for entry in evals] == [256] * 4
  assert [entry.images for entry in tasks.parse_eval("emoji,images=32")] == [32] * 4


def test_every_preset_is_judged_by_what_it_is_not_trained_on():
  judges = {task.name: task.watch for preset in tasks.TASK_PRESETS.values() for task in preset}
  assert judges == {
    "skintone": "oracle-parity",
    "composition": "oracle-both",
    "preference": "oracle-preference",
  }
  (task,) = tasks.parse_task("emoji-skintone,watch=")
  assert task.watch == ""


def test_a_sum_and_a_veto_are_values():
  (task,) = tasks.parse_task("name=a,prompts=p,reward=0.7*r?x=1&y=2 + .3*s,veto=t?z=1>=0.5")
  assert task.reward == "0.7*r?x=1&y=2 + .3*s" and task.veto == "t?z=1>=0.5"


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("emoji-skinton", "unknown preset 'emoji-skinton', did you mean emoji-skintone?"),
    ("preset=zzz", "unknown preset 'zzz', use one of emoji-composition, emoji-preference"),
    ("name=a,prompts=p,reward=r,bach_size=4", "unknown key 'bach_size', did you mean batch_size?"),
    ("name=a,prompts=p,reward=r,batch_size=4x", "batch_size=4x is not a whole number"),
    (f"name=a,prompts=p,reward=r,batch_size={'9' * 400}", "9 is not a whole number"),
    ("name=a,prompts=p,reward=r,batch_size=", "batch_size has no value"),
    ("name=a,prompts=p,prompts=q,reward=r", "prompts is given twice"),
    ("name=a,prompts=a,b.txt,reward=r", "'b.txt' is not key=value"),
    ("name=a", "add prompts=..., reward=..."),
    ("", "preset has no value"),
  ],
)
def test_a_wrong_task_is_refused(text, message):
  with pytest.raises(UserError, match=re.escape(message)):
    tasks.parse_task(text)
