"""Keeps off stderr what Orbax and TensorStore print of a failure beside raising it.

All of it reaches us as exceptions, and a user needs only the line that we make of them.
"""

import functools
import logging
import sys


def silence() -> None:
  """Keeps it off stderr, in this process, from now on."""
  # Each phase of each save, and what fails in Orbax's threads.
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  # Further arrays of a save of which one has failed.
  logging.getLogger("asyncio").addFilter(_is_of_others)
  # TensorStore's threads, which tell a loop that Orbax has closed after the first failure.
  if getattr(sys.unraisablehook, "func", None) is not _hook:
    sys.unraisablehook = functools.partial(_hook, sys.unraisablehook)


def _is_of_others(record: logging.LogRecord) -> bool:
  return "orbax" not in record.getMessage()


def _hook(previous, unraisable) -> None:
  if str(unraisable.exc_value) != "Event loop is closed":
    previous(unraisable)
