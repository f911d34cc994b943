"""Fields of settings: help, range, and the one way from text to a typed value.

A dataclass of settings may hold others, its parts; a leaf is a field that is no part. Leaves of all
parts have different names, which are the names of flags and of the stored configuration.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import difflib
import inspect
import math
import pathlib
import types
import typing
from typing import Any, TypeVar

from rlft.types import UserError

_Settings = TypeVar("_Settings")


def option(help_text: str, default: Any = dataclasses.MISSING, **rules: Any) -> Any:
  """A field with its flag's help and rules.

  Args:
    help_text: one line, shown by `--help`.
    default: of the flag; none where a value must be given.
    **rules: `least`, `most` (inclusive) and `above`, `below` (exclusive) bounds; `choices`; `path`
      (a leading `~` stands for the home directory); `fixed`: True if a resumed run must have the
      same value, 'switch' if only zero and non-zero must not be exchanged; `free`: True if a
      resumed run may change this key of a task that is otherwise fixed; `presets`: for values of
      this field (up to a '?') other defaults, by name of any leaf.
  """
  return dataclasses.field(default=default, metadata={"help": help_text, **rules})


def suggestion(word: str, options: Iterable[str], otherwise: str | None = None) -> str:
  """'did you mean ...?' with the nearest of `options`; if none is near, `otherwise` or them all."""
  options = sorted(options)
  near = difflib.get_close_matches(word, options, n=1)
  if near:
    return f"did you mean {near[0]}?"
  return otherwise or f"use one of {', '.join(options)}"


# ---------------------------------------------------------------------------- settings of parts


def leaves(kind: type) -> dict[str, dataclasses.Field]:
  """The leaves of a dataclass of settings and of its parts, by name, in order."""
  found: dict[str, dataclasses.Field] = {}
  for field in dataclasses.fields(kind):
    found |= leaves(field.type) if dataclasses.is_dataclass(field.type) else {field.name: field}
  return found


def build(kind: type[_Settings], values: Mapping[str, Any]) -> _Settings:
  """A `kind` with these leaves; the others have their defaults, or those of a value's preset."""
  for name, field in leaves(kind).items():
    chosen = str(values.get(name)).partition("?")[0]
    values = {**field.metadata.get("presets", {}).get(chosen, {}), **values}
  own = {}
  for field in dataclasses.fields(kind):
    if dataclasses.is_dataclass(field.type):
      own[field.name] = build(field.type, values)
    elif field.name in values:
      own[field.name] = values[field.name]
  return kind(**own)


def flat(settings: Any) -> dict[str, Any]:
  """The values of all leaves by name; the inverse of `build`."""
  found: dict[str, Any] = {}
  for field in dataclasses.fields(settings):
    value = getattr(settings, field.name)
    found |= flat(value) if dataclasses.is_dataclass(field.type) else {field.name: value}
  return found


def make(kind: type[_Settings], **values: Any) -> _Settings:
  """`build`, of keywords.

  Raises:
    TypeError: a name that no leaf has.
  """
  unknown = values.keys() - leaves(kind).keys()
  if unknown:
    raise TypeError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
  return build(kind, values)


def replace(settings: _Settings, **changes: Any) -> _Settings:
  """The settings with some leaves changed, in whichever part they are."""
  return make(type(settings), **(flat(settings) | changes))


# ---------------------------------------------------------------------------- one value


def convert(text: str, kind: Any) -> Any:
  """Reads a value as a user writes it.

  Args:
    text: what came.
    kind: str, int, float (finite), bool ('true' or 'false'), pathlib.Path, a `Literal` of strings,
      or one of these `| None`; of several kinds text, where it may be text. Without annotation
      (`inspect.Parameter.empty`, `Any`, a string) it is text.

  Raises:
    ValueError: the text is none of that kind; the message goes on after 'key=text'.
    TypeError: no text can be of that kind.
  """
  if typing.get_origin(kind) in (typing.Union, types.UnionType):
    kinds = [one for one in typing.get_args(kind) if one is not types.NoneType]
    kind = kinds[0] if len(kinds) == 1 else str if str in kinds else kind
  if typing.get_origin(kind) is typing.Literal:
    choices = typing.get_args(kind)
    if text not in choices:
      raise ValueError(f"is not known: {suggestion(text, choices)}")
    return text
  if kind is bool:
    if text.lower() not in ("true", "false"):
      raise ValueError("is neither true nor false: give one of them")
    return text.lower() == "true"
  if kind in (int, float):
    try:
      value = kind(text)
      finite = math.isfinite(value)
    except (ValueError, OverflowError):  # A whole number may have more digits than any float.
      finite = False
    if not finite:
      raise ValueError(f"is not {'a whole number' if kind is int else 'a number'}: give one")
    return value
  if kind is pathlib.Path:
    return pathlib.Path(text)
  if kind in (str, inspect.Parameter.empty, Any) or isinstance(kind, str):
    return text
  raise TypeError(f"no text can be given for {kind}")


def plain(kind: Any) -> type:
  """int for `int | None`."""
  if isinstance(kind, types.UnionType):
    (kind,) = (one for one in typing.get_args(kind) if one is not types.NoneType)
  return kind


def mistake(value: Any, field: dataclasses.Field) -> str | None:
  """What is wrong with a value by itself: 'is ...: remedy'; None if nothing is."""
  rules, kind = field.metadata, plain(field.type)
  if value is None and kind is not field.type:
    return None
  numbers = {int: int, float: (int, float)}.get(kind)
  if numbers is None:
    if not isinstance(value, kind):
      return f"has the wrong type: give a {kind.__name__}"
  elif not isinstance(value, numbers) or isinstance(value, bool) or not math.isfinite(value):
    return f"is not a number: give a finite {kind.__name__}"
  if "choices" in rules and value not in rules["choices"]:
    return f"is not known: {suggestion(value, rules['choices'])}"
  for rule, words, holds in (
    ("least", "at least", lambda bound: value >= bound),
    ("most", "at most", lambda bound: value <= bound),
    ("above", "greater than", lambda bound: value > bound),
    ("below", "less than", lambda bound: value < bound),
  ):
    if rule in rules and not holds(rules[rule]):
      return f"is out of range: it must be {words} {rules[rule]}"
  return None


def check(settings: Any, where: str = "--") -> None:
  """Checks type and range of every leaf by itself.

  Args:
    settings: a dataclass of settings; those in its tuples (tasks, evaluations) are checked with it.
    where: what to write before a field's name in a message.

  Raises:
    UserError: the first value that is none of its field's.
  """
  values = flat(settings)
  for name, field in leaves(type(settings)).items():
    value = values[name]
    if isinstance(value, tuple):
      for entry in value:
        check(entry, f"--{name}=name={entry.name},...,")
    elif wrong := mistake(value, field):
      raise UserError(f"{where}{name}={value} {wrong}")
