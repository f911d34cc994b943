"""Command line: flags made from the fields of settings, and errors of one line.

A launch script defines its flags, then hands `main` one function without arguments:

    flags.define(Config)
    if __name__ == "__main__":
      flags.main(lambda: run(flags.read(Config)))
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from importlib import metadata
import logging
import os
import platform
import re
import sys
from typing import Any, NoReturn, TypeVar

from absl import app, flags

import rlft
from rlft.config import fields, tasks
from rlft.config.settings import EMOJI, EMOJI_SD, EvalConfig, TaskConfig
from rlft.types import UserError

# Fields that hold several entries, each from a flag of its own.
_REPEATED = {
  "task": (TaskConfig, tasks.parse_task, tasks.TASK_PRESETS),
  "eval": (EvalConfig, tasks.parse_eval, tasks.EVAL_PRESETS),
}
_TEXTS = tuple[str, ...]  # the type of a field whose flag may be given several times
_SHIPPED = (EMOJI_SD, EMOJI)  # names that stand where a path may stand
_TOKENIZER = "?tokenizer="
_LONGEST = 1200  # characters of an error

Settings = TypeVar("Settings")


def define(kind: type, *names: str, flag_values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines a flag for each leaf of a dataclass of settings, or for the named ones only.

  Args:
    kind: see `fields`; a leaf without default is a flag that must be given.
    *names: leaves that the script uses; all if none is named.
    flag_values: where to define them.
  """
  leaves = fields.leaves(kind)
  for name in names or leaves:
    field = leaves[name]
    required = field.default is dataclasses.MISSING
    default = None if required else field.default
    if name in _REPEATED or field.type == _TEXTS:
      flags.DEFINE_multi_string(name, [], _help(field), flag_values=flag_values)
    elif field.type is bool:
      flags.DEFINE_boolean(name, default, _help(field), flag_values=flag_values)
    else:
      flags.DEFINE(
        _Parser(field),
        name,
        default,
        _help(field),
        flag_values,
        serializer=flags.ArgumentSerializer(),
      )
    # --help lists the flags of the script that runs, not those of this module.
    flag_values.register_key_flag_for_module(sys.argv[0], flag_values[name])
    if required:
      flags.mark_flag_as_required(name, flag_values=flag_values)


def read(kind: type[Settings], *, flag_values: flags.FlagValues = flags.FLAGS) -> Settings:
  """A `kind` with the values of the flags that were given; other leaves have their defaults.

  Raises:
    UserError: a `--task` or `--eval` that cannot be read.
  """
  values = {}
  leaves = fields.leaves(kind)
  for name in leaves:
    if name in flag_values and not flag_values[name].using_default_value:
      value = flag_values[name].value
      if name in _REPEATED:
        parse = _REPEATED[name][1]
        value = tuple(entry for text in value for entry in parse(text))
      elif leaves[name].type == _TEXTS:
        path = leaves[name].metadata.get("path")
        value = tuple(os.path.expanduser(text) if path else text for text in value)
      values[name] = value
  return fields.build(kind, values)


class _Parser(flags.ArgumentParser):
  """Reads a flag as its field says; absl writes '--name=value: ' before what is wrong."""

  def __init__(self, field: dataclasses.Field):
    super().__init__()
    self._field = field

  def parse(self, argument: Any) -> Any:
    if not isinstance(argument, str):  # A default.
      return argument
    value = fields.convert(argument, self._field.type)
    if self._field.metadata.get("path"):
      value = _absolute(value)
    if wrong := fields.mistake(value, self._field):
      raise ValueError(wrong)
    return value

  def flag_type(self) -> str:
    return fields.plain(self._field.type).__name__


def _absolute(path: str) -> str:
  """The path of what is there as it is read from other working directories, too.

  A model in one file is followed by its tokenizer, which has a path of its own.
  """
  if _TOKENIZER in path and not os.path.exists(path):
    return _TOKENIZER.join(map(_absolute, path.split(_TOKENIZER)))
  path = os.path.expanduser(path)
  if os.path.exists(path) and path not in _SHIPPED:
    return os.path.abspath(path)
  return path


def _help(field: dataclasses.Field) -> str:
  rules = field.metadata
  bounds = [
    f"{words} {rules[rule]}"
    for rule, words in (("least", ">="), ("above", ">"), ("most", "<="), ("below", "<"))
    if rule in rules
  ]
  if "choices" in rules:
    bounds.append(" or ".join(rules["choices"]))
  text = rules["help"] + (f" ({', '.join(bounds)})" if bounds else "")
  if field.name in _REPEATED:
    kind, _, presets = _REPEATED[field.name]
    keys = (f"{key.name} ({key.metadata['help']})" for key in dataclasses.fields(kind))
    text += f": key=value,... with the keys {', '.join(keys)}; or a preset: {', '.join(presets)}"
  for value, defaults in rules.get("presets", {}).items():
    flags_of = " ".join(f"--{name}={default}" for name, default in defaults.items())
    text += f"; {value} has other defaults: {flags_of}"
  return text


def main(run: Callable[..., None], *, takes_paths: bool = False) -> None:
  """Parses the flags and calls `run`; a user's mistake ends the program with one line and status 2.

  Defines `--version`, too.

  Args:
    run: does the work; what it raises as UserError is printed to stderr as 'error: ...'.
    takes_paths: give it what stands on the command line beside flags, which is else refused.
  """
  if "version" not in flags.FLAGS:
    flags.DEFINE_boolean("version", False, "print the versions of rlft, JAX and Python, and end")
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["version"])
  logging.getLogger("jax._src.xla_bridge").addFilter(_tells_something)
  for library in ("fsspec", "gcsfs"):  # Each file that is opened, and what is raised as well.
    logging.getLogger(library).setLevel(logging.CRITICAL)

  def guarded(argv: Sequence[str]) -> None:
    try:
      run(*([argv[1:]] if takes_paths else []))
    except UserError as error:
      _fail(str(error))

  app.run(guarded, flags_parser=functools.partial(parse, takes_paths=takes_paths))


def parse(
  argv: Sequence[str],
  *,
  flag_values: flags.FlagValues = flags.FLAGS,
  takes_paths: bool = False,
) -> Sequence[str]:
  """absl's parser with its errors in one line; nothing on the command line is ignored.

  A mistake is printed and ends the program with status 2.
  """
  if "--version" in argv:  # Before flags that must be given are asked for.
    python = platform.python_version()
    print(f"rlft {rlft.__version__}, jax {metadata.version('jax')}, Python {python}")
    sys.exit()
  try:
    rest = flag_values(argv)
  except flags.UnrecognizedFlagError as error:
    name, space, value = error.flagname.partition(" ")
    if space and name in flag_values:  # a line of a flagfile is one argument
      _fail(f"'--{error.flagname}': write --{name}={value.strip()}")
    near = fields.suggestion(f"--{name}", (f"--{known}" for known in flag_values), "see --help")
    _fail(f"unknown flag --{name}: {near}")
  except flags.CantOpenFlagFileError as error:
    _fail(f"{str(error).removeprefix('ERROR:: ')}: give a file with one --flag=value a line")
  except flags.Error as error:
    message = str(error).replace(": is ", " is ").replace(": has ", " has ")
    message = re.sub(
      r"^flag (--\w+)=None: .* value other than None\.$", r"\1 is missing: give it", message
    )
    _fail(re.sub(r": \('Non-boolean.*", " is neither true nor false: give one of them", message))
  except RecursionError:  # absl looks for names that are near to an unknown one.
    _fail("unknown flag, with a name longer than any there is: see --help")
  except UnicodeDecodeError as error:
    _fail(f"a flagfile is not text ({error}): give a file with one --flag=value a line")
  if len(rest) > 1 and not takes_paths:
    _fail(f"unexpected argument '{rest[1]}': write options as --flag=value")
  return rest


def _tells_something(record: logging.LogRecord) -> bool:
  """Whether this is not what JAX says on every machine that has no TPU, nor is meant to."""
  return not re.match(
    r"Unable to initialize backend '(tpu': .*libtpu\.so: cannot open|proxy': .* requires)",
    record.getMessage(),
  )


def _fail(message: str) -> NoReturn:
  line = " ".join(message.split())
  if len(line) > _LONGEST:  # It quotes a file; what to do about it stands at the end.
    line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
  print(f"error: {line}", file=sys.stderr)
  sys.exit(2)
