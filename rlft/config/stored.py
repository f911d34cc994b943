"""The settings of a run as they are stored with it, and what a resumed run may change."""

from collections.abc import Mapping
import dataclasses
import json
import re
from typing import Any

from rlft.config import fields
from rlft.config.settings import Config, EvalConfig, TaskConfig
from rlft.types import UserError

# Of a model on a server: what stands before its name.
_ADDRESS = re.compile(r"https?://\S*?(?=/v2/models/)|vlms?://[^/?\s]+(?=/)")


def to_dict(config: Config) -> dict[str, Any]:
  """The configuration as JSON can hold it: every setting by the name of its flag."""
  return {
    name: [dataclasses.asdict(entry) for entry in value] if isinstance(value, tuple) else value
    for name, value in fields.flat(config).items()
  }


def to_json(config: Config) -> str:
  """The configuration as one JSON object."""
  return json.dumps(to_dict(config), indent=2)


def from_json(text: str) -> Config:
  """The inverse of `to_json`; a field that is not in `text` has its default.

  Raises:
    UserError: it is no configuration, or has fields that this version does not know.
  """
  kinds = {"task": TaskConfig, "eval": EvalConfig}
  try:
    values = json.loads(text)
    unknown = sorted(values.keys() - fields.leaves(Config).keys())
    if unknown:
      raise UserError(
        f"the stored configuration has unknown fields ({', '.join(unknown)}): "
        "go on with the version of rlft that wrote it"
      )
    for name, kind in kinds.items():
      if name in values:
        values[name] = tuple(kind(**entry) for entry in values[name])
    config = fields.build(Config, values)
  except (ValueError, TypeError, AttributeError, RecursionError) as error:
    raise UserError(
      f"the stored configuration cannot be read ({error}): go on with the version of rlft that "
      "wrote it"
    ) from error
  fields.check(config, "stored ")
  return config


def check_resume(stored: Config, current: Config) -> list[str]:
  """Compares a resumed run's settings with those that its checkpoint was written with.

  Args:
    stored: from the checkpoint.
    current: from the flags.

  Returns:
    One 'name: old -> new' for each permitted change, for the log.

  Raises:
    UserError: a setting differs that is part of the policy, of the order of data or of the shape
      of the state.
  """
  refused, permitted = [], []
  before, now = fields.flat(stored), fields.flat(current)
  for name, field in fields.leaves(Config).items():
    old, new = before[name], now[name]
    if old == new or name == "workdir":
      continue
    fixed = field.metadata.get("fixed", False)
    if fixed == "switch":
      fixed = bool(old) != bool(new)
    elif fixed and isinstance(old, tuple):
      fixed = [_without_free(entry) for entry in old] != [_without_free(entry) for entry in new]
    (refused if fixed else permitted).append(f"{name}: {_shown(old)} -> {_shown(new)}")
  if refused:
    raise UserError(
      f"the run in {current.output.workdir} was started with other settings"
      f" ({'; '.join(refused)}): give the old ones to resume it, or a new --workdir"
    )
  return permitted


def _without_free(entry: TaskConfig | EvalConfig) -> Mapping[str, Any]:
  """The entry without what a resumed run may change: free keys, and the addresses of servers."""
  fixed = [field.name for field in dataclasses.fields(entry) if not field.metadata.get("free")]
  return {name: _ADDRESS.sub("", str(getattr(entry, name))) for name in fixed}


def _shown(value: Any) -> str:
  """A field's value as on the command line."""
  if not isinstance(value, tuple):
    return str(value)
  entries = (
    ",".join(f"{k}={v}" for k, v in dataclasses.asdict(entry).items() if v != "") for entry in value
  )
  return " ".join(entries) or "none"
