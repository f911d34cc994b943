"""Compiled programs: kept on disk for the next process that needs the same ones, and counted.

A program that is found there computes what it would compute if it were compiled again, to the last
bit; on GPUs more surely so, since a compiler that tries kernels out may choose another one.
"""

from collections.abc import Iterator
import contextlib
import logging
import os

import jax
from jax.experimental.compilation_cache import compilation_cache

from rlft.types import UserError

OFF = "off"
_DIRECTORY = os.path.join("~", ".cache", "rlft", "programs")

_log = logging.getLogger(__name__)


def keep(directory: str) -> None:
  """Has JAX keep what it compiles from here on, and look there first.

  Programs that compile within a second are not kept, see JAX's
  `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`; none are with `JAX_ENABLE_COMPILATION_CACHE=false`.

  Args:
    directory: a local one, which is made, or gs://BUCKET/...; 'off' keeps nothing; '' is what JAX
      was told already (`JAX_COMPILATION_CACHE_DIR`), else one in the user's cache.

  Raises:
    UserError: the directory that was given cannot be written.
  """
  before = jax.config.jax_compilation_cache_dir
  if not jax.config.jax_enable_compilation_cache or (not directory and before is not None):
    return
  path = None if directory == OFF else os.path.expanduser(directory or _DIRECTORY)
  if path and "://" not in path and (wrong := _mistake(path)):
    if directory:
      raise UserError(
        f"--compilation_cache={directory} cannot be written ({wrong}): give another one, or {OFF}"
      )
    _log.warning("compiled programs are not kept: %s cannot be written (%s)", path, wrong)
  elif path != before:
    jax.config.update("jax_compilation_cache_dir", path)
    # JAX looks for the directory once. It says so to the user, who did not ask.
    logging.getLogger(compilation_cache.reset_cache.__module__).setLevel(logging.WARNING)
    compilation_cache.reset_cache()


def _mistake(path: str) -> str:
  """Why a directory cannot be written; '' if it can."""
  try:
    os.makedirs(path, exist_ok=True)
  except OSError as error:
    return error.strerror or type(error).__name__
  return "" if os.access(path, os.W_OK) else "permission denied"


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
  """The names of the programs that are compiled in the block, one for each time."""
  names: list[str] = []

  def listen(event, _, **details):
    if event == "/jax/core/compile/backend_compile_duration":
      names.append(details["fun_name"])

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield names
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
