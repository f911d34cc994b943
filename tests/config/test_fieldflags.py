"""Flags follow from the fields of a dataclass."""

import dataclasses

from absl import flags
import pytest

from rlft.config import fieldflags


def option(help_text, **rules):
  default = rules.pop("default", dataclasses.MISSING)
  return dataclasses.field(default=default, metadata={"help": help_text, **rules})


@dataclasses.dataclass(frozen=True)
class Settings:
  name: str = option("what it is called")
  count: int = option("how many", default=3, least=1, most=9)
  rate: float | None = option("how fast", default=None, least=0.0)
  loud: bool = option("heard far away", default=True)


def parse(*arguments):
  values = flags.FlagValues()
  fieldflags.define(Settings, flag_values=values)
  values(["script", *arguments])
  return fieldflags.read(Settings, flag_values=values)


def test_defaults_are_those_of_the_fields():
  assert parse("--name=a") == Settings(name="a", count=3, rate=None, loud=True)


def test_every_type_is_read():
  given = parse("--name=b", "--count=9", "--rate=0.5", "--noloud")
  assert given == Settings(name="b", count=9, rate=0.5, loud=False)


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--count=0", "--count=0: .*in the range"),
    ("--count=10", "--count=10: .*in the range"),
    ("--count=x", "flag --count=x"),
    ("--rate=-1", "--rate=-1: .*non-negative"),
  ],
)
def test_values_out_of_range_are_refused(argument, message):
  with pytest.raises(flags.IllegalFlagValueError, match=message):
    parse("--name=a", argument)


def test_a_field_without_a_default_must_be_given():
  with pytest.raises(flags.IllegalFlagValueError, match="--name must have a value"):
    parse("--count=1")
