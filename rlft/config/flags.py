"""Command line: flags made from the fields of `Config`, and errors of one line.

A launch script defines its flags, then hands `main` one function without arguments:

    cli.define_flags()
    if __name__ == "__main__":
      cli.main(run)
"""

from collections.abc import Callable, Sequence
import dataclasses
import os
import re
import sys
from typing import NoReturn

from absl import app, flags

from rlft.config import tasks
from rlft.config.settings import EMOJI, EMOJI_SD, Config, EvalConfig, TaskConfig, suggestion
from rlft.types import UserError

_REPEATED = {
  "task": (TaskConfig, tasks.parse_task, tasks.TASK_PRESETS),
  "eval": (EvalConfig, tasks.parse_eval, tasks.EVAL_PRESETS),
}
_DEFINE = {
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
  bool: flags.DEFINE_boolean,
  str: flags.DEFINE_string,
}


def define_flags(*names: str, flag_values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines a flag for each field of `Config`, or for the named fields only.

  Args:
    *names: fields that the script uses; all if none is named.
    flag_values: where to define them.
  """
  fields = {field.name: field for field in dataclasses.fields(Config)}
  for name in names or fields:
    field = fields[name]
    help_text = _help(field)
    if name in _REPEATED:
      flags.DEFINE_multi_string(name, [], help_text, flag_values=flag_values)
    elif choices := field.metadata.get("choices"):
      flags.DEFINE_enum(name, field.default, choices, help_text, flag_values=flag_values)
    else:
      _DEFINE[field.type](name, field.default, help_text, flag_values=flag_values)
    # --help lists the flags of the script that runs, not those of this module.
    flag_values.register_key_flag_for_module(sys.argv[0], flag_values[name])


def _help(field: dataclasses.Field) -> str:
  bounds = [
    f"{words} {field.metadata[rule]}"
    for rule, words in (("least", ">="), ("above", ">"), ("most", "<="), ("below", "<"))
    if rule in field.metadata
  ]
  text = field.metadata["help"] + (f" ({', '.join(bounds)})" if bounds else "")
  if field.name in _REPEATED:
    kind, _, presets = _REPEATED[field.name]
    keys = (f"{key.name} ({key.metadata['help']})" for key in dataclasses.fields(kind))
    text += f": key=value,... with the keys {', '.join(keys)}; or a preset: {', '.join(presets)}"
  return text


def from_flags(flag_values: flags.FlagValues = flags.FLAGS) -> Config:
  """The parsed flags as a `Config`; a field without a flag has its default.

  Raises:
    UserError: a `--task` or `--eval` that cannot be read.
  """
  values = {}
  for field in dataclasses.fields(Config):
    if field.name not in flag_values:
      continue
    value = flag_values[field.name].value
    if field.name in _REPEATED:
      parse = _REPEATED[field.name][1]
      value = tuple(entry for text in value for entry in parse(text))
    elif field.metadata.get("path"):
      value = os.path.expanduser(value)
      # A run is read from other working directories, too; the shipped things are no directories.
      if os.path.isdir(value) and value not in (EMOJI, EMOJI_SD):
        value = os.path.abspath(value)
    values[field.name] = value
  return Config(**values)


def main(run: Callable[[], None]) -> None:
  """Parses the flags and calls `run`; a user's mistake ends the program with one line and status 2.

  Args:
    run: does the work; what it raises as UserError is printed to stderr as 'error: ...'.
  """

  def guarded(_: Sequence[str]) -> None:
    try:
      run()
    except UserError as error:
      _fail(str(error))

  app.run(guarded, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> Sequence[str]:
  """absl's parser with its errors in one line; nothing on the command line is ignored."""
  try:
    rest = flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    name, space, value = error.flagname.partition(" ")
    if space and name in flags.FLAGS:  # a line of a flagfile is one argument
      _fail(f"'--{error.flagname}': write --{name}={value.strip()}")
    near = suggestion(f"--{name}", (f"--{known}" for known in flags.FLAGS), "see --help")
    _fail(f"unknown flag --{name}: {near}")
  except flags.CantOpenFlagFileError as error:
    _fail(f"{str(error).removeprefix('ERROR:: ')}: give a file with one --flag=value a line")
  except flags.Error as error:
    _fail(re.sub(r": (invalid literal|could not convert|\('Non-boolean).*", _wanted, str(error)))
  except UnicodeDecodeError as error:
    _fail(f"a flagfile is not text ({error}): give a file with one --flag=value a line")
  if len(rest) > 1:
    _fail(f"unexpected argument '{rest[1]}': write options as --flag=value")
  return rest


def _wanted(python: re.Match[str]) -> str:
  """What to give, in the place of Python's words for what it cannot convert."""
  kinds = {"invalid": "a whole number", "could": "a number", "('Non": "true or false"}
  return next(f": give {kind}" for word, kind in kinds.items() if python[1].startswith(word))


def _fail(message: str) -> NoReturn:
  print(f"error: {' '.join(message.split())}", file=sys.stderr)
  sys.exit(2)
