"""The values of `--task` and `--eval`: `key=value` pairs joined by commas, and their presets."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from rlft.config.fields import convert, suggestion
from rlft.config.settings import EvalConfig, TaskConfig
from rlft.types import UserError

# The paper's three tasks in the emoji world, in sizes for a few CPU cores. The oracle that judges
# each reward is watched.
TASK_PRESETS: Mapping[str, Sequence[TaskConfig]] = {
  "emoji-skintone": (
    TaskConfig(
      name="skintone",
      prompts="emoji:portrait/train",
      reward="emoji-tone-parity",
      batch_size=64,
      images_per_prompt=16,
      watch="oracle-parity",
    ),
  ),
  "emoji-composition": (
    TaskConfig(
      name="composition",
      prompts="emoji:pair/train",
      reward="emoji-objects",
      batch_size=64,
      watch="oracle-both",
    ),
  ),
  "emoji-preference": (
    TaskConfig(
      name="preference",
      prompts="emoji:preference/train",
      reward="emoji-preference",
      batch_size=64,
      watch="oracle-preference",
    ),
  ),
}


def _held_out(name: str, task: str, metric: str, part: str = "test", **more: Any) -> EvalConfig:
  """An evaluation on test prompts of the emoji world, or on a part of them."""
  prompts, development = f"emoji:{task}/{part}", f"emoji:{task}/development"
  return EvalConfig(name=name, prompts=prompts, metric=metric, development=development, **more)


_SET = {"images": 256, "images_per_prompt": 16}
_PARTS = ("seen", "unseen")  # without withheld things, and with them

EVAL_PRESETS: Mapping[str, Sequence[EvalConfig]] = {
  # The four ground-truth measures, none of which a task is trained on. emoji-sd is best at these
  # guidances on development prompts (launch/compare.py --pretrained=emoji-sd --eval=emoji).
  "emoji": (
    _held_out("parity", "portrait", "oracle-parity", images_per_prompt=16, base_guidance=1.0),
    _held_out("both", "pair", "oracle-both", base_guidance=5.0),
    _held_out("preference", "preference", "oracle-preference", base_guidance=3.0),
    _held_out("presence", "single", "oracle-presence", base_guidance=2.0, guard=True),
  ),
  # What the paper's tables show, in-domain and out-of-domain, by what is trained on, by oracles and
  # by a scorer that nothing is trained on; and what must not be lost.
  "emoji-protocol": (
    _held_out("parity", "portrait", "oracle-parity", **_SET),
    _held_out("skin", "portrait", "oracle-skin", guard=True, **_SET),
    _held_out("parity-gendered", "gendered", "oracle-parity", **_SET),
    _held_out("skin-gendered", "gendered", "oracle-skin", guard=True, **_SET),
    *(
      _held_out(f"{name}-{part}", task, metric, f"test-{part}", images=images)
      for part in _PARTS
      for name, task, metric, images in (
        ("objects", "pair", "emoji-objects", 150),
        ("both", "pair", "oracle-both", 150),
        ("reward", "preference", "emoji-preference", 128),
        ("preference", "preference", "oracle-preference", 128),
        ("likeness", "preference", "oracle-likeness", 128),
      )
    ),
    _held_out("presence", "single", "oracle-presence", images=96, guard=True),
    *(
      _held_out(name, "preference", f"oracle-{name}", images=128, images_per_prompt=8, guard=True)
      for name in ("diversity", "distance")
    ),
  ),
}


def parse_task(text: str) -> tuple[TaskConfig, ...]:
  """The tasks that one `--task=text` stands for.

  Args:
    text: 'name=a,prompts=b,reward=c,batch_size=32', or a preset's name alone or followed by keys
      that override it: 'emoji-skintone,batch_size=32' (or 'preset=emoji-skintone,...'); 'watch='
      takes a preset's watch away.

  Raises:
    UserError: an unknown preset or key, a missing key, or a value of the wrong type.
  """
  return parse("task", text, TaskConfig, TASK_PRESETS)


def parse_eval(text: str) -> tuple[EvalConfig, ...]:
  """The evaluations that one `--eval=text` stands for; see `parse_task`."""
  return parse("eval", text, EvalConfig, EVAL_PRESETS)


def parse(flag: str, text: str, kind: type, presets: Mapping[str, Sequence[Any]]) -> tuple:
  """The entries of a `kind` that one `--flag=text` stands for; see `parse_task`."""
  fields = {field.name: field for field in dataclasses.fields(kind)}
  where = f"--{flag}={text}"
  values: dict[str, Any] = {}
  for position, item in enumerate(text.split(",")):
    key, equals, value = (part.strip() for part in item.partition("="))
    if not equals and position == 0:
      key, value = "preset", key
    elif not equals:
      raise UserError(f"{where}: '{item}' is not key=value (a value cannot hold a comma)")
    if key in values:
      raise UserError(f"{where}: {key} is given twice, remove one")
    if key != "preset" and key not in fields:
      raise UserError(f"{where}: unknown key '{key}', {suggestion(key, ('preset', *fields))}")
    if not value and (key not in fields or fields[key].default != ""):
      raise UserError(f"{where}: {key} has no value, write {key}=...")
    try:
      values[key] = convert(value, fields[key].type if key in fields else str)
    except ValueError as error:
      raise UserError(f"{where}: {key}={value} {error}") from None

  preset = values.pop("preset", None)
  if preset is not None:
    if preset not in presets:
      raise UserError(f"{where}: unknown preset '{preset}', {suggestion(preset, presets)}")
    return tuple(dataclasses.replace(entry, **values) for entry in presets[preset])
  missing = [
    name
    for name, field in fields.items()
    if field.default is dataclasses.MISSING and name not in values
  ]
  if missing:
    raise UserError(f"{where}: add {', '.join(f'{name}=...' for name in missing)}")
  return (kind(**values),)
