"""Scripts of experiments/ as modules."""

from collections.abc import Iterator
import contextlib
import importlib.util
import pathlib
from types import ModuleType

from absl import flags

ROOT = pathlib.Path(__file__).parents[1]


@contextlib.contextmanager
def script(name: str) -> Iterator[ModuleType]:
  """Runs `experiments/NAME.py`, and takes its flags back: others have the same names."""
  spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  importlib.import_module("absl.app")  # Its flags stay.
  before = set(flags.FLAGS)
  spec.loader.exec_module(module)
  added = [*set(flags.FLAGS) - before]
  try:
    yield module
  finally:
    for flag in added:
      delattr(flags.FLAGS, flag)
