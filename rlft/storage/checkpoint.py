"""Checkpoints by Orbax: asynchronous, atomic, and resumed without being asked.

One module wraps Orbax, so that its traps are handled in one place: `latest_step()` may name a save
that is not committed yet (only a fresh manager is asked), a directory that a crash left unreadable
must not stop a run that has an older good one, and restoring needs explicit shardings.
"""

from collections.abc import Mapping
import logging
import os
from pathlib import Path
import re
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from rlft.types import UserError

_log = logging.getLogger(__name__)

_UNREADABLE = ".unreadable"  # after the step's number, in the name of a directory set aside


class Checkpointer:
  """Saves and restores (state, meta) by step in one directory.

  `state` is a pytree of arrays; `meta` is a small JSON-serialisable dict.
  """

  def __init__(self, directory: str | Path, *, keep: int = 2, read_only: bool = False):
    """Opens the directory, and makes it where it is missing.

    Args:
      directory: the checkpoints'.
      keep: newest checkpoints that stay; older ones are deleted after a save.
      read_only: only reads; what looks like the remains of a crash may be the save of a run that
        is going on, and stays.

    Raises:
      UserError: the directory cannot be written.
    """
    self._directory = Path(directory).absolute()
    self._keep = keep
    self._read_only = read_only
    self._saving = 0
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    # Orbax reports each phase of each save through absl, and what fails with pages of tracebacks
    # from its threads; all of it reaches us as exceptions, and a user needs only what we say.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
      return ocp.CheckpointManager(
        self._directory,
        # Named here, since metadata cannot be read before a handler is known.
        item_handlers={
          "state": ocp.PyTreeCheckpointHandler(type_handler_registry=_arrays()),
          "meta": ocp.JsonCheckpointHandler(),
        },
        options=ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
        if self._read_only
        else ocp.CheckpointManagerOptions(
          max_to_keep=self._keep, create=True, cleanup_tmp_directories=True
        ),
      )
    except OSError as error:
      raise UserError(
        f"cannot write checkpoints in {self._directory}: {error.strerror or error}; choose"
        " another --workdir or free some space"
      ) from error

  def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
    """Starts an asynchronous save; a save of the same step that exists already is kept."""
    if step in self._manager.all_steps():
      return
    self.wait()  # So would Orbax; here a failure has the number of the save that failed.
    self._saving = step
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(dict(meta))
        ),
        force=True,
      )
    except (OSError, ValueError) as error:
      raise self._save_error(error) from error

  def wait(self) -> None:
    """Returns when every save so far is committed."""
    try:
      self._manager.wait_until_finished()
    except (OSError, ValueError) as error:
      raise self._save_error(error) from error

  def _save_error(self, error: Exception) -> UserError:
    return UserError(
      f"checkpoint {self._saving} could not be written in {self._directory}"
      f" ({_first_line(error)}); earlier checkpoints are intact: free some space or fix"
      " the directory, then run the same command to resume"
    )

  def restore(self, template: Any) -> tuple[int, Any, dict[str, Any]] | None:
    """The newest readable checkpoint, or None if there is none.

    A directory that cannot be read (half-written by a crash, truncated by a full disk) is renamed
    to `<step>.unreadable` with a warning, and the one before it is tried.

    Args:
      template: a pytree of arrays or `jax.ShapeDtypeStruct`s with shardings.

    Returns:
      (step, state placed as the template says, meta).

    Raises:
      UserError: checkpoints exist and none can be read, or the newest belongs to another model.
    """
    failures = []
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        self._check_shapes(step, template)
        restored = self._manager.restore(
          step,
          args=ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
              item=template,
              restore_args=ocp.checkpoint_utils.construct_restore_args(template),
            )
          ),
        )
      except UserError:
        raise
      except Exception as error:  # Orbax raises a dozen types for a damaged directory.
        failures.append(self._set_aside(step, error))
        continue
      return step, restored["state"], meta["meta"]
    # Also those of an earlier attempt: a run must not start afresh because it was tried twice.
    failures += sorted(path.name for path in self._directory.glob(f"*{_UNREADABLE}"))
    if failures:
      raise UserError(
        f"no checkpoint in {self._directory} can be read ({failures[0]}); delete the directory"
        " to start afresh"
      )
    return None

  def restore_numpy(self) -> tuple[Any, dict[str, Any]] | None:
    """(state as nested dicts of numpy arrays, meta) of the newest checkpoint, on any topology.

    Raises:
      UserError: it cannot be read.
    """
    step = self._manager.latest_step()
    if step is None:
      return None
    try:
      metadata = self._manager.item_metadata(step)["state"]
      tree = getattr(metadata, "tree", metadata)
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeRestore(
            restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
          ),
          meta=ocp.args.JsonRestore(),
        ),
      )
    except Exception as error:  # Orbax raises a dozen types for a damaged directory.
      raise UserError(
        f"checkpoint {step} in {self._directory} cannot be read ({_first_line(error)});"
        " resume the run to write a new one"
      ) from error
    return restored["state"], restored["meta"]

  def _check_shapes(self, step: int, template: Any) -> None:
    """Refuses a checkpoint whose tree differs from the template's: it is another model's."""

    def flat(tree):
      return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
      }

    metadata = self._manager.item_metadata(step)["state"]
    if metadata is None:  # Damaged: the restore itself says how.
      return
    found = flat(getattr(metadata, "tree", metadata))
    expected = flat(template)
    for name in sorted(expected.keys() | found.keys()):
      if expected.get(name) != found.get(name):
        raise UserError(
          f"checkpoint {step} in {self._directory} is of another model: {name} has shape"
          f" {found.get(name, 'nothing')} there, expected {expected.get(name, 'nothing')};"
          " choose another --workdir, or the flags that this run was started with"
        )

  def _set_aside(self, step: int, error: Exception) -> str:
    reason = f"checkpoint {step}: {_first_line(error)}"
    source = self._directory / str(step)
    target = self._directory / f"{step}{_UNREADABLE}"
    _log.warning("%s; moved to %s", reason, target.name)
    self._manager.close()
    if source.exists():
      shutil.rmtree(target, ignore_errors=True)
      source.rename(target)
    self._manager = self._open()
    return reason

  def close(self) -> None:
    """Waits for pending saves and releases Orbax's threads."""
    try:
      self.wait()
    finally:
      self._manager.close()


def _arrays() -> ocp.type_handlers.TypeHandlerRegistry:
  """How arrays are written and read.

  Each replica writes a part only where several processes share the work: to cut arrays, Orbax
  compiles a program for each shape and device, and the first save of emoji-sd took 5 s longer.
  """
  shared = jax.process_count() > 1
  return ocp.type_handlers.create_type_handler_registry(
    (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=shared)),
    (np.ndarray, ocp.type_handlers.NumpyHandler()),
  )


def _first_line(error: Exception) -> str:
  """What an error says, short enough for a message of one line."""
  if code := re.search(r"os_error_code='(\d+)'", str(error)):
    return os.strerror(int(code[1]))
  return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
