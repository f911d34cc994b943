"""Checkpoints by Orbax: asynchronous, atomic, and resumed without being asked.

One class wraps Orbax, so that its traps are handled in one place: `latest_step()` may name a save
that is not committed yet (only a fresh manager is asked), a save may be committed and yet not be
readable (each is opened before an older one is deleted), a directory that a crash left unreadable
must not stop a run that has an older good one, and restoring needs explicit shardings.

Orbax believes what it finds in a file. So each checkpoint has sums of its files, written before it
is committed and compared before anything of it is read. And Orbax takes another process's save for
the remains of a crash: so one process, that of a run's which is first, holds the directory.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import errno
import logging
import os
import re
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from rlft.parallel import processes
from rlft.storage import checksums, files, folders, orbax_noise
from rlft.storage.checksums import DamagedError
from rlft.storage.lock import Lock
from rlft.types import UserError

_log = logging.getLogger(__name__)

_UNREADABLE = ".unreadable"  # at the end of the name of a directory set aside
# What Orbax writes when it commits: nothing is restored from it.
_LATE = ("_CHECKPOINT_METADATA", "commit_success.txt")
_SUMMED = "has_checksums"  # in meta: a checkpoint without them has lost them
# What the system says where a file is missing, or another kind of thing is in its place.
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_PAUSES_S = (0.2, 1.0)  # before files are read again that could not be read


class Checkpointer:
  """Saves and restores (state, meta) by iteration in one directory.

  `state` is a pytree of arrays; `meta` is a small JSON-serialisable dict.
  """

  def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2, read_only: bool = False):
    """Opens the directory, and makes it where it is missing.

    Args:
      directory: the checkpoints'.
      keep: newest checkpoints that stay; older ones are deleted when a later one was opened.
      read_only: only reads; what looks like the remains of a crash may be the save of a run that
        is going on, and stays.

    Raises:
      UserError: the directory cannot be written, or another process writes there.
    """
    self._shown = os.fspath(directory)
    self._keep = keep
    self._read_only = read_only
    # A save that has not been opened again, and its tree with all arrays but one left out.
    self._saved: tuple[int, Any] | None = None
    self._step = 0  # of the newest save, also of one that failed and has not ended yet
    self._sums = ""  # as written for it, on the first process
    # What may be raised in writing. TensorStore's errors are ValueErrors.
    self._failures = files.errors(self._shown), ValueError
    orbax_noise.silence()
    self._lock = None if read_only else self._hold()
    try:
      with self._writing():
        self._directory, self._link = folders.opened(self._shown, make=not read_only)
      self._manager = self._open()
    except BaseException:
      if self._lock:
        self._lock.release()
      raise

  def _hold(self) -> Lock | None:
    """Holds the directory, on the first of the run's processes."""
    lock = None
    with processes.together():
      if jax.process_index() == 0:
        path = files.path_of(self._shown)
        lock = Lock(path.with_name(f"{path.name}.lock"))
    return lock

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except files.errors(self._shown) as error:
      raise UserError(
        f"cannot write checkpoints in {self._shown}: {_first_line(error)}; choose"
        " another --workdir or free some space"
      ) from error

  def _open(self) -> ocp.CheckpointManager:
    with self._writing():
      return ocp.CheckpointManager(
        self._directory,
        # Named here, since metadata cannot be read before a handler is known.
        item_handlers={
          "state": ocp.PyTreeCheckpointHandler(type_handler_registry=_arrays()),
          "meta": ocp.JsonCheckpointHandler(),
        },
        options=ocp.CheckpointManagerOptions(
          read_only=self._read_only,
          create=not self._read_only,
          cleanup_tmp_directories=not self._read_only,
          save_interval_steps=0 if self._read_only else 1,
          step_name_format=folders.Names(),
          # Called on the first process when all of them have written, before the commit.
          async_options=ocp.AsyncOptions(post_finalization_callback=self._write_sums),
        ),
      )

  def save(self, iteration: int, state: Any, meta: Mapping[str, Any], *, task: int = 0) -> None:
    """Starts an asynchronous save; one of the same place that exists already is kept.

    Args:
      iteration: iterations done.
      state: the arrays.
      meta: what else there is.
      task: tasks done of the iteration that follows.

    Raises:
      UserError: it, or the save before it, failed; or another run took the directory over.
    """
    step = folders.step_of(iteration, task)
    if step in self._manager.all_steps():
      return
    self.wait()  # So would Orbax; here a failure has the name of the save that failed.
    with processes.together():
      if self._lock is not None:
        self._lock.check()
    self._saved, self._step = (step, _smallest_alone(state)), step
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave({**meta, _SUMMED: True})
        ),
        force=True,
      )
    except Exception as error:
      self._saved = None
      if not isinstance(error, self._failures) or processes.is_collective(error):
        raise
      raise self._save_error(step, error) from error

  def wait(self) -> None:
    """Returns when every save so far is committed and was opened again; then deletes older ones.

    Raises:
      UserError: a save failed or cannot be read; those before it are intact.
    """
    if self._saved is None:
      return
    step, probe = self._saved
    try:
      self._manager.wait_until_finished()
    except self._failures as error:
      _raise_if_collective(error)
      raise self._save_error(step, error) from error
    finally:
      self._saved = None
    try:
      self._compare_sums(step)
      self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeRestore(
            item=probe,
            restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), probe),
          ),
          meta=ocp.args.JsonRestore(),
        ),
      )
    except Exception as error:  # Orbax raises a dozen types for what it cannot read.
      _raise_if_collective(error)
      raise UserError(
        f"checkpoint {folders.name_of(step)} was written in {self._shown} and cannot be read"
        f" ({_first_line(error)}); earlier checkpoints are intact: see whether the file system"
        " keeps what is written, or choose another --workdir"
      ) from error
    try:
      for old in sorted(self._manager.all_steps())[: -self._keep]:
        self._manager.delete(old)
    except files.errors(self._shown) as error:
      raise self._save_error(step, error) from error

  def _write_sums(self) -> None:
    """Writes the sums of the files of the save that goes on; raises OSError."""
    name = folders.name_of(self._step)
    # Orbax commits by giving the directory its name, or in a bucket by a file in it.
    names = (path.name for path in folders.entries(self._directory))
    found = next(one for one in names if one == name or one.startswith(f"{name}.orbax"))
    self._sums = checksums.write(self._directory / found, apart_from=_LATE)

  def _compare_sums(self, step: int) -> None:
    """Raises DamagedError if the sums on the disk are not those that were written."""
    found = (self._directory / folders.name_of(step) / checksums.FILE).read_bytes()
    if jax.process_index() == 0 and found != self._sums.encode():
      raise DamagedError(f"{checksums.FILE} is not as it was written")

  def _check_sums(self, step: int) -> bool:
    """Whether all files are known to be as they were written; the processes share the work.

    Raises:
      DamagedError: one is not, on every process.
      UserError: one cannot be read for now, on every process: that says nothing of what is in it.
    """
    damaged = unread = None
    try:
      # Only this is done again: what Orbax does, all processes do in step.
      summed = _persistently(lambda: self._compare(step))
      if not summed and self._meta(step).get(_SUMMED):
        raise DamagedError(f"{checksums.FILE} is missing")
      if not summed:
        _log.warning(
          "checkpoint %s has no checksums, since an older version wrote it: taken as it is",
          folders.name_of(step),
        )
    except Exception as own:  # Orbax raises a dozen types for what it cannot read.
      _raise_if_collective(own)
      if _is_of_the_system(own):
        unread = self._unread_error(step, own)
      else:
        damaged = UserError(_first_line(own))
    # What could not be read goes first: no process may set aside what another could not look at.
    processes.raise_together(unread)
    try:
      processes.raise_together(damaged)
    except UserError as agreed:
      raise DamagedError(str(agreed)) from agreed
    return summed

  def _compare(self, step: int) -> bool:
    """Compares this process's part of a checkpoint's files with their sums; False if it has none.

    Raises:
      DamagedError: a file is not as it was written, is missing, or is of another kind.
      OSError: one cannot be read.
    """
    directory = self._directory / folders.name_of(step)
    part = jax.process_index(), jax.process_count()
    try:
      # Not `exists`, which is False in a bucket that does not answer, too.
      if not any(path.name == checksums.FILE for path in folders.entries(directory)):
        return False
      checksums.check(directory, apart_from=_LATE, part=part)
      return True
    except (DamagedError, OSError) as error:
      if isinstance(error, DamagedError) or _is_of_the_system(error):
        raise
      raise DamagedError(_first_line(error)) from error
    except Exception as error:  # Libraries of buckets have no common base class.
      raise OSError(errno.EIO, _first_line(error)) from error

  def _unread_error(self, step: int, error: Exception) -> UserError:
    return UserError(
      f"checkpoint {folders.name_of(step)} in {self._shown} could not be read"
      f" ({_first_line(error)}) and is left as it is: see to the file system, then run the same"
      " command again"
    )

  def _meta(self, step: int) -> dict[str, Any]:
    return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

  def _save_error(self, step: int, error: Exception) -> UserError:
    return UserError(
      f"checkpoint {folders.name_of(step)} could not be written in {self._shown}"
      f" ({_first_line(error)}); earlier checkpoints are intact: free some space or fix"
      " the directory, then run the same command to resume"
    )

  def restore(
    self, template: Any, check: Callable[[dict[str, Any]], None] = lambda meta: None
  ) -> tuple[int, Any, dict[str, Any]] | None:
    """The newest checkpoint that is as it was written, or None if there is none.

    One that is not (half-written by a crash, truncated by a full disk, with a flipped bit) is
    renamed to `<name>.unreadable` with a warning, and the one before it is tried.

    Args:
      template: a pytree of arrays or `jax.ShapeDtypeStruct`s with shardings.
      check: is given meta before the arrays are looked at, and raises UserError if they belong to
        another run.

    Returns:
      (iterations done, state placed as the template says, meta).

    Raises:
      UserError: checkpoints exist and none can be read; the newest belongs to another model, or
        the file system fails to read it, which is left as it is.
    """
    failures = []
    for step in sorted(self._manager.all_steps(), reverse=True):
      whole = False
      try:
        whole = self._check_sums(step)
        meta = self._meta(step)
        meta.pop(_SUMMED, None)
        check(meta)
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
      except Exception as error:  # Orbax raises a dozen types for what it cannot read.
        _raise_if_collective(error)
        # Of a bucket TensorStore does not say whether it is the object; but the sums were right.
        if _is_of_the_system(error) or (whole and files.is_bucket(self._shown)):
          raise self._unread_error(step, error) from error
        failures.append(self._set_aside(step, error))
        continue
      return folders.iteration_of(step), restored["state"], meta
    # Also those of an earlier attempt: a run must not start afresh because it was tried twice.
    names = (path.name for path in folders.entries(self._directory))
    failures += sorted(name for name in names if name.endswith(_UNREADABLE))
    if failures:
      raise UserError(
        f"no checkpoint in {self._shown} can be read ({failures[0]}); delete the directory"
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
      self._check_sums(step)
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
    except UserError:
      raise
    except Exception as error:  # Orbax raises a dozen types for what it cannot read.
      _raise_if_collective(error)
      raise UserError(
        f"checkpoint {folders.name_of(step)} in {self._shown} cannot be read"
        f" ({_first_line(error)}); resume the run to write a new one"
      ) from error
    restored["meta"].pop(_SUMMED, None)
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
          f"checkpoint {folders.name_of(step)} in {self._shown} is of another model: {name} has"
          f" shape {found.get(name, 'nothing')} there, expected {expected.get(name, 'nothing')};"
          " choose another --workdir, or the flags that this run was started with"
        )

  def _set_aside(self, step: int, error: Exception) -> str:
    reason = f"checkpoint {folders.name_of(step)}: {_first_line(error)}"
    source = self._directory / folders.name_of(step)
    target = self._directory / f"{folders.name_of(step)}{_UNREADABLE}"
    _log.warning("%s; moved to %s", reason, target.name)
    self._manager.close()
    if jax.process_index() == 0:
      target.rmtree(missing_ok=True)
      source.rename(target)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("set aside")
    self._manager = self._open()
    return reason

  def close(self) -> None:
    """Waits for pending saves, releases Orbax's threads, and lets others have the directory."""
    with contextlib.ExitStack() as stack:
      if self._lock:
        stack.callback(self._lock.release)
      if self._link:
        stack.callback(self._link.cleanup)
      stack.callback(self._close_manager)
      self.wait()

  def _close_manager(self) -> None:
    try:
      self._manager.close()
    except self._failures as error:  # It raises again what was raised when a save was waited for.
      _raise_if_collective(error)
      raise self._save_error(self._step, error) from error


def _raise_if_collective(error: Exception) -> None:
  """Lets an error go on that says nothing of files: another process is gone, say."""
  if processes.is_collective(error):
    raise error


def _smallest_alone(state: Any) -> Any:
  """The tree with placeholders for all arrays but the smallest, and that without its values."""
  leaves, tree = jax.tree.flatten(state)
  smallest = min(leaves, key=lambda leaf: leaf.size)
  alone = [
    jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if leaf is smallest else ocp.PLACEHOLDER
    for leaf in leaves
  ]
  return jax.tree.unflatten(tree, alone)


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


def _persistently(do: Callable[[], bool]) -> bool:
  """Does something that reads, again after an error that a network's file system may get over.

  Raises:
    OSError: the last time, too.
  """
  for pause in _PAUSES_S:
    try:
      return do()
    except OSError as error:
      _log.warning("%s: trying again", _first_line(error))
      time.sleep(pause)
  return do()


def _is_of_the_system(error: Exception) -> bool:
  """Whether an error is of reading, and says nothing of what is in the file."""
  if isinstance(error, OSError) and error.errno is None:  # Of a bucket: a refusal, for example.
    return not isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
  code = error.errno if isinstance(error, OSError) else _code(error)
  return code is not None and code not in _GONE


def _code(error: Exception) -> int | None:
  """The system's number of an error of TensorStore, which is a ValueError."""
  found = re.search(r"os_error_code='(\d+)'", str(error))
  return int(found[1]) if found else None


def _first_line(error: Exception) -> str:
  """What an error says, short enough for a message of one line."""
  if (code := _code(error)) is not None:
    return os.strerror(code)
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
