"""Flags made from the fields of a dataclass, for scripts with settings of their own.

Each field carries its help text in its metadata; its type and default become the flag's. `Config`,
with its tasks and presets, has rlft/config/flags.py.
"""

import dataclasses
import sys
import types
import typing

from absl import flags

_DEFINE = {
  bool: flags.DEFINE_boolean,
  float: flags.DEFINE_float,
  int: flags.DEFINE_integer,
  str: flags.DEFINE_string,
}


def define(kind: type, *, flag_values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines a flag for each field of `kind`; one without a default is required.

  Args:
    kind: a dataclass; fields are str, int, float, bool or one of these or None, and have metadata
      `help` and perhaps `least` and `most`, inclusive bounds of a number.
    flag_values: where to define them.
  """
  for field in dataclasses.fields(kind):
    required = field.default is dataclasses.MISSING
    bounds = {"least": "lower_bound", "most": "upper_bound"}
    _DEFINE[_plain(field.type)](
      field.name,
      None if required else field.default,
      field.metadata["help"],
      flag_values=flag_values,
      **{bounds[rule]: field.metadata[rule] for rule in bounds if rule in field.metadata},
    )
    # --help lists the flags of the script that runs, not those of this module.
    flag_values.register_key_flag_for_module(sys.argv[0], flag_values[field.name])
    if required:
      flags.mark_flag_as_required(field.name, flag_values=flag_values)


def read(kind: type, *, flag_values: flags.FlagValues = flags.FLAGS) -> typing.Any:
  """A `kind` with the values of the parsed flags."""
  return kind(**{field.name: flag_values[field.name].value for field in dataclasses.fields(kind)})


def _plain(annotation: typing.Any) -> type:
  """int for `int | None`."""
  if isinstance(annotation, types.UnionType):
    (annotation,) = (part for part in typing.get_args(annotation) if part is not types.NoneType)
  return annotation
