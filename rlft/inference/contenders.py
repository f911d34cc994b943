"""Models that are compared with each other: how a user names them, and how each draws."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any
import urllib.parse

from rlft.config import fields
from rlft.config.settings import Config
from rlft.inference import runs
from rlft.inference.draw import Drawing
from rlft.types import UserError

DRAWN_BY = ("guidance_scale", "sampling_steps", "eta")
# What may stand behind a model's name and a '?'.
_OPTIONS: Mapping[str, type] = {
  "name": str,
  "guidance_scale": float,
  "sampling_steps": int,
  "eta": float,
  "lora": str,
}


@dataclasses.dataclass(frozen=True)
class Contender:
  """A model, a run or a folder of pictures that is compared.

  Attributes:
    name: in tables; raters never see it.
    source: a path or a model's name.
    drawing: options for drawing that were given for it alone.
  """

  name: str
  source: str
  drawing: Mapping[str, float | str]


def parse(specs: Sequence[str]) -> list[Contender]:
  """The contenders that `--models` names: 'SOURCE' or 'SOURCE?name=...&guidance_scale=...'.

  Raises:
    UserError: an option that is none, or two of one name.
  """
  found: list[Contender] = []
  for spec in specs:
    source, options = _split(spec)
    name = str(options.pop("name", "")) or pathlib.PurePath(source).name
    if name in [one.name for one in found]:
      raise UserError(
        f"--models={spec}: there are two of the name {name}: add ?name=... to tell them apart"
      )
    found.append(Contender(name, source, options))
  return found


def _split(spec: str) -> tuple[str, dict[str, Any]]:
  """A source and the options behind it; '?tokenizer=' and its like belong to the source."""
  source, mark, query = spec.rpartition("?")
  given = [item.partition("=")[::2] for item in query.split("&")]
  if not (mark and given and any(key in _OPTIONS for key, _ in given)):
    return spec, {}
  options = {}
  for key, value in given:
    if key not in _OPTIONS:
      raise UserError(f"--models={spec}: unknown option {key}, {fields.suggestion(key, _OPTIONS)}")
    try:
      options[key] = fields.convert(urllib.parse.unquote(value), _OPTIONS[key])
    except ValueError as error:
      raise UserError(f"--models={spec}: {key}={value} {error}") from None
  return source, options


def config_of(source: str) -> Config | None:
  """The settings of a run; None if this is none."""
  return runs.open_run(source).config if runs.is_run(source) else None


def drawing(one: Contender, contenders: Sequence[Contender], given: Drawing) -> Drawing:
  """How a model draws: as is said for it, for all, by itself, or as the first run does.

  Args:
    one: the model.
    contenders: it is among them.
    given: what is said for all; its model is not looked at, and `pretrained` is for runs alone.

  Raises:
    UserError: a number is out of range.
  """
  like = config_of(one.source)
  is_run = like is not None
  if not is_run:
    configs = (config_of(other.source) for other in contenders)
    like = next((config for config in configs if config is not None), None)
  own = fields.flat(like.policy if like else Config().policy)
  said = {name: getattr(given, name) for name in DRAWN_BY}
  how = {name: own[name] if value is None else value for name, value in said.items()}
  found = dataclasses.replace(
    given,
    model=one.source,
    pretrained=given.pretrained if is_run else "",
    **{**how, **one.drawing},
  )
  fields.check(found, f"--models={one.source}: ")
  return found
