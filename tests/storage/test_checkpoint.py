"""Checkpoints: what was saved comes back, whatever a crash or a full disk left beside it."""

import errno
import logging
import os
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.parallel import processes, sharding
from rlft.parallel.compiled import compilations
from rlft.storage import checkpoint, checksums
from rlft.storage.checkpoint import Checkpointer
from rlft.types import UserError


def state(value):
  """A tree as the trainer's: a nested dict whose names may hold slashes, and a None."""
  return {
    "params": {
      "a/b": {"kernel": jax.random.normal(jax.random.key(0), (64, 64)) + value},
      "bias": jnp.arange(3.0) + value,
    },
    "count": jnp.asarray(7, jnp.int32),
    "ema": None,
  }


def save(folder, *steps, keep=2):
  """Saves `state(step)` for each step."""
  checkpointer = Checkpointer(folder, keep=keep)
  for step in steps:
    checkpointer.save(step, state(float(step)), {"step": step})
  checkpointer.close()


def restore(folder, template=None):
  checkpointer = Checkpointer(folder)
  try:
    return checkpointer.restore(state(0.0) if template is None else template)
  finally:
    checkpointer.close()


def assert_equal(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back(tmp_path):
  meta = {"third": 1 / 3, "nan": float("nan"), "list": [1, None], "text": "é"}
  checkpointer = Checkpointer(tmp_path)
  assert checkpointer.restore(state(0.0)) is None
  checkpointer.save(3, state(0.1), meta)
  checkpointer.wait()
  step, found, found_meta = checkpointer.restore(state(0.0))
  checkpointer.close()
  assert step == 3
  assert_equal(found, state(0.1))
  assert found["count"].dtype == jnp.int32 and found["ema"] is None
  assert np.isnan(found_meta.pop("nan")) and np.isnan(meta.pop("nan"))
  assert found_meta == meta


def test_the_state_is_placed_as_the_template_says(tmp_path):
  save(tmp_path, 1)
  mesh = sharding.make_mesh(4)
  template = sharding.put(state(0.0), sharding.parameters(mesh, state(0.0)))
  _, found, _ = restore(tmp_path, template)
  kernel = found["params"]["a/b"]["kernel"]
  assert [shard.data.shape for shard in kernel.addressable_shards] == [(16, 64)] * 8
  assert found["params"]["bias"].sharding == template["params"]["bias"].sharding
  assert_equal(found, state(1.0))


# The second is too deep for the JSON reader of every Python; that of 3.13 follows 2,000 levels.
@pytest.mark.parametrize("content", ["[1]", '{"a":' * 100_000, '{"commit_timestamp_nsecs": "x"}'])
def test_a_file_that_has_no_sum_is_damaged(tmp_path, content):
  save(tmp_path, 1, 2)
  (tmp_path / "iteration_2" / "_CHECKPOINT_METADATA").write_text(content)
  step, found, _ = restore(tmp_path)
  assert step == 1 and "iteration_2.unreadable" in names(tmp_path)
  assert_equal(found, state(1.0))


def test_a_save_is_of_the_state_at_the_time_of_the_call(tmp_path):
  checkpointer = Checkpointer(tmp_path)
  following = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
  current = state(1.0)
  checkpointer.save(1, current, {})
  for _ in range(3):  # Writes where `current` was, while it is being saved.
    current = following(current)
  checkpointer.close()
  assert_equal(restore(tmp_path)[1], state(1.0))


def test_the_newest_are_kept(tmp_path):
  save(tmp_path, 1, 2, 3, 4, keep=2)
  assert names(tmp_path) == ["iteration_3", "iteration_4"]
  assert restore(tmp_path)[0] == 4


def test_a_step_is_saved_once(tmp_path):
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save(1, state(1.0), {})
  checkpointer.save(1, state(2.0), {})
  checkpointer.close()
  assert_equal(restore(tmp_path)[1], state(1.0))


def test_names_say_the_iteration(tmp_path):
  checkpointer = Checkpointer(tmp_path, keep=4)
  for iteration, task in ((9, 0), (9, 1), (10, 0), (10, 2)):
    checkpointer.save(iteration, state(0.0), {"task": task}, task=task)
  checkpointer.close()
  expected = ["iteration_10", "iteration_10_task_2", "iteration_9", "iteration_9_task_1"]
  assert names(tmp_path) == expected
  iteration, _, meta = restore(tmp_path)
  assert (iteration, meta) == (10, {"task": 2})


def test_a_checkpoint_that_is_named_by_a_number_comes_before_all_others(tmp_path):
  save(tmp_path, 10)
  (tmp_path / "iteration_10").rename(tmp_path / "20")
  found = restore(tmp_path)
  assert found[2] == {"step": 10}
  save(tmp_path, 11)
  assert names(tmp_path) == ["20", "iteration_11"]
  assert restore(tmp_path)[0] == 11
  save(tmp_path, 12)
  assert names(tmp_path) == ["iteration_11", "iteration_12"]


@pytest.mark.parametrize(
  "name", ["a[v2]", "*?{b}", "$HOME %20#:;", "ä 猫 ~'\"", "a\\b", "gs:", "not-utf8-\udce9"]
)
def test_a_name_may_have_any_character(tmp_path, name):
  folder = tmp_path / name / "checkpoints"
  save(folder, 1, 2, 3)
  assert names(folder) == ["iteration_2", "iteration_3"]
  assert_equal(restore(folder)[1], state(3.0))
  reader = Checkpointer(folder, read_only=True)
  assert reader.restore_numpy()[1] == {"step": 3}
  reader.close()
  # Nothing depends on the name: the directory can be moved.
  assert_equal(restore(folder.rename(tmp_path / "moved"))[1], state(3.0))
  assert names(tmp_path / name) == []


@pytest.mark.parametrize(
  "damage",
  [
    # What a save looks like of which Orbax has not joined the parts.
    lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    lambda step: flip(step / "SHA256SUMS"),
  ],
)
def test_older_checkpoints_stay_until_a_newer_one_was_opened(tmp_path, damage):
  save(tmp_path, 1)
  checkpointer = Checkpointer(tmp_path, keep=1)
  checkpointer.save(2, state(2.0), {})
  checkpointer._manager.wait_until_finished()
  damage(tmp_path / "iteration_2")
  message = "checkpoint iteration_2 was written in .* and cannot be read .*earlier .* are intact"
  with pytest.raises(UserError, match=message) as error:
    checkpointer.wait()
  assert "\n" not in str(error.value)
  checkpointer.close()
  assert names(tmp_path) == ["iteration_1", "iteration_2"]


def test_what_else_there_is_is_looked_at_before_the_arrays(tmp_path):
  save(tmp_path, 1)

  def check(meta):
    assert meta == {"step": 1}
    raise UserError("another run")

  checkpointer = Checkpointer(tmp_path)
  with pytest.raises(UserError, match="another run"):
    checkpointer.restore({"other": jnp.zeros(2)}, check)
  checkpointer.close()


def cut(path):
  """Damages the file by leaving its first half."""
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])


def cut_arrays(step):
  for path in (step / "state").rglob("d/*"):
    cut(path)


def flip(path):
  """Damages the file by one bit."""
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 64
  path.write_bytes(content)


def largest(step):
  return max((step / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


DAMAGE = {
  "a bit of an array": lambda step: flip(largest(step)),
  "a bit of meta": lambda step: flip(step / "meta" / "metadata"),
  "a bit of the sums": lambda step: flip(step / "SHA256SUMS"),
  "no sums": lambda step: (step / "SHA256SUMS").unlink(),
  "arrays": cut_arrays,
  "tree": lambda step: cut(step / "state" / "_METADATA"),
  "state": lambda step: shutil.rmtree(step / "state"),
  "meta": lambda step: cut(step / "meta" / "metadata"),
  "no meta": lambda step: shutil.rmtree(step / "meta"),
  "everything": lambda step: [shutil.rmtree(path) for path in step.iterdir() if path.is_dir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_an_unreadable_one_is_set_aside_and_the_one_before_it_used(tmp_path, caplog, damage):
  save(tmp_path, 1, 2)
  damage(tmp_path / "iteration_2")
  checkpointer = Checkpointer(tmp_path)
  with caplog.at_level(logging.WARNING, "rlft"):
    step, found, meta = checkpointer.restore(state(0.0))
  assert step == 1 and meta == {"step": 1}
  assert_equal(found, state(1.0))
  assert names(tmp_path) == ["iteration_1", "iteration_2.unreadable"]
  assert "checkpoint iteration_2" in caplog.text
  assert "moved to iteration_2.unreadable" in caplog.text
  # The run goes on, and comes to the same step again.
  checkpointer.save(2, state(5.0), {"step": 2})
  checkpointer.close()
  assert_equal(restore(tmp_path)[1], state(5.0))


def fail(monkeypatch, module, name, code, times):
  """Has a function fail as the system does, so many times; the calls are listed."""
  real, calls = getattr(module, name), []

  def fails(*args, **options):
    calls.append(args)
    if len(calls) <= times:
      raise OSError(code, os.strerror(code))
    return real(*args, **options)

  monkeypatch.setattr(module, name, fails)
  monkeypatch.setattr(checkpoint, "_PAUSES_S", (0.0, 0.0))
  return calls


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_an_error_of_the_moment_is_no_damage(tmp_path, monkeypatch, caplog, code):
  save(tmp_path, 1, 2)
  fail(monkeypatch, checksums, "_sum", code, times=1)
  with caplog.at_level(logging.WARNING, "rlft"):
    step, found, _ = restore(tmp_path)
  assert step == 2 and names(tmp_path) == ["iteration_1", "iteration_2"]
  assert_equal(found, state(2.0))
  assert os.strerror(code) in caplog.text and "trying again" in caplog.text


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_what_cannot_be_read_is_named_and_stays(tmp_path, monkeypatch, code):
  save(tmp_path, 1, 2)
  calls = fail(monkeypatch, checksums, "check", code, times=99)
  message = rf"iteration_2 in .* could not be read .*{os.strerror(code)}.* left as it is: see to"
  with pytest.raises(UserError, match=message) as error:
    restore(tmp_path)
  assert "\n" not in str(error.value) and len(calls) == 3
  assert names(tmp_path) == ["iteration_1", "iteration_2"]
  with pytest.raises(UserError, match=message):
    Checkpointer(tmp_path, read_only=True).restore_numpy()
  monkeypatch.undo()
  assert restore(tmp_path)[0] == 2


def test_arrays_that_cannot_be_read_stay(tmp_path, monkeypatch):
  save(tmp_path, 1, 2)

  def fails(*_, **__):  # As TensorStore says it.
    raise ValueError("INTERNAL: Error reading [source locations='x'] [os_error_code='5']")

  monkeypatch.setattr(Checkpointer, "_check_shapes", fails)
  with pytest.raises(UserError, match=r"iteration_2 .* \(Input/output error\) and is left as it"):
    restore(tmp_path)
  assert names(tmp_path) == ["iteration_1", "iteration_2"]


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
def test_what_fails_on_the_devices_is_not_said_of_files(tmp_path, monkeypatch, kind):
  """Another process that dies ends a collective, also while checkpoints are opened."""
  gone = kind("UNKNOWN: Gloo AllGather failed: Connection reset by peer")

  def fail(*_, **__):
    raise gone

  save(tmp_path, 1)
  checkpointer = Checkpointer(tmp_path)
  monkeypatch.setattr(processes, "is_collective", lambda error: error is gone)
  monkeypatch.setattr(checkpointer._manager, "restore", fail)
  with pytest.raises(kind, match="Gloo"):
    checkpointer.restore(state(0.0))
  checkpointer.save(2, state(2.0), {"step": 2})
  with pytest.raises(kind, match="Gloo"):
    checkpointer.wait()
  monkeypatch.setattr(checkpointer._manager, "save", fail)
  with pytest.raises(kind, match="Gloo"):
    checkpointer.save(3, state(3.0), {"step": 3})
  monkeypatch.undo()
  checkpointer.close()
  assert names(tmp_path) == ["iteration_1", "iteration_2"] and restore(tmp_path)[0] == 2


def test_what_is_missing_is_not_waited_for(tmp_path, monkeypatch):
  save(tmp_path, 1, 2)
  calls = fail(monkeypatch, checksums, "_sum", errno.ENOENT, times=1)
  assert restore(tmp_path)[0] == 1
  assert "iteration_2.unreadable" in names(tmp_path) and calls


@pytest.mark.parametrize("damaged_here", [False, True])
def test_no_process_sets_aside_what_another_could_not_read(tmp_path, monkeypatch, damaged_here):
  save(tmp_path, 1, 2)
  if damaged_here:
    flip(largest(tmp_path / "iteration_2"))
  said = []

  def together(error):
    said.append(error)
    if len(said) == 1:  # The first word is of what could not be read.
      raise UserError("on process 1: checkpoint iteration_2 could not be read")
    if error:
      raise error

  checkpointer = Checkpointer(tmp_path)
  monkeypatch.setattr(checkpoint.processes, "raise_together", together)
  with pytest.raises(UserError, match="on process 1: checkpoint iteration_2 could not be read"):
    checkpointer.restore(state(0.0))
  assert said == [None]
  monkeypatch.undo()
  checkpointer.close()
  assert names(tmp_path) == ["iteration_1", "iteration_2"]


def test_one_of_an_older_version_has_no_sums(tmp_path, caplog):
  save(tmp_path, 1)
  (tmp_path / "iteration_1" / "SHA256SUMS").unlink()
  (tmp_path / "iteration_1" / "meta" / "metadata").write_text('{"step": 1}')
  with caplog.at_level(logging.WARNING, "rlft"):
    step, found, meta = restore(tmp_path)
  assert (step, meta) == (1, {"step": 1})
  assert_equal(found, state(1.0))
  assert [record.getMessage() for record in caplog.records] == [
    "checkpoint iteration_1 has no checksums, since an older version wrote it: taken as it is"
  ]


def test_a_reader_believes_no_damaged_one(tmp_path):
  save(tmp_path, 1, 2)
  flip(largest(tmp_path / "iteration_2"))
  reader = Checkpointer(tmp_path, read_only=True)
  with pytest.raises(UserError, match="iteration_2 in .* cannot be read .* not as it was written"):
    reader.restore_numpy()
  reader.close()
  assert names(tmp_path) == ["iteration_1", "iteration_2"]


def test_who_has_lost_the_directory_writes_no_more(tmp_path):
  folder = tmp_path / "checkpoints"
  checkpointer = Checkpointer(folder)
  checkpointer.save(1, state(1.0), {})
  (tmp_path / "checkpoints.lock").unlink()
  with pytest.raises(UserError, match="is no longer this run's"):
    checkpointer.save(2, state(2.0), {})
  checkpointer.close()
  assert names(folder) == ["iteration_1"]


def test_a_save_that_a_crash_cut_short_is_no_checkpoint(tmp_path):
  save(tmp_path, 1)
  # Orbax writes to a directory of such a name and renames it at the end.
  shutil.copytree(tmp_path / "iteration_1", tmp_path / "iteration_2.orbax-checkpoint-tmp")
  assert restore(tmp_path)[0] == 1
  for _ in range(300):  # It is removed in a thread.
    if names(tmp_path) == ["iteration_1"]:
      return
    time.sleep(0.1)
  assert names(tmp_path) == ["iteration_1"]


def test_no_run_starts_afresh_beside_checkpoints_that_cannot_be_read(tmp_path):
  save(tmp_path, 1, 2)
  for step in (1, 2):
    cut_arrays(tmp_path / f"iteration_{step}")
  for _ in range(2):  # The second time everything has been set aside already.
    with pytest.raises(UserError, match="no checkpoint in .* can be read .*start afresh") as error:
      restore(tmp_path)
    assert "\n" not in str(error.value)
  assert names(tmp_path) == ["iteration_1.unreadable", "iteration_2.unreadable"]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"count": jnp.zeros(2)}, r"count has shape \(\) there, expected \(2,\)"),
    ({"ema": jnp.zeros(2)}, r"ema has shape nothing there, expected \(2,\)"),
    ({"count": None}, r"count has shape \(\) there, expected nothing"),
  ],
)
def test_a_checkpoint_of_another_model_is_refused_and_stays(tmp_path, change, message):
  save(tmp_path, 1, 2)
  with pytest.raises(UserError, match="of another model: " + message) as error:
    restore(tmp_path, state(0.0) | change)
  assert "\n" not in str(error.value)
  assert names(tmp_path) == ["iteration_1", "iteration_2"]


def test_a_full_disk_leaves_earlier_checkpoints(tmp_path, caplog, capfd):
  save(tmp_path, 1)
  checkpointer = Checkpointer(tmp_path)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  # No file may become larger; that a write fails with another number than on a full disk plays no
  # part here.
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
  try:
    checkpointer.save(2, state(2.0), {"step": 2})
    message = (
      r"checkpoint iteration_2 could not be written in .* \(File too large\).*free some space"
    )
    with pytest.raises(UserError, match=message) as error:
      checkpointer.save(3, state(3.0), {"step": 3})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert "\n" not in str(error.value)
  assert not caplog.records and not capfd.readouterr().err  # Nothing of Orbax's.
  checkpointer.close()
  assert restore(tmp_path)[0] == 1
  save(tmp_path, 2)
  assert restore(tmp_path)[0] == 2


def test_a_directory_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write .*checkpoints.lock: .* fix the directory"):
    Checkpointer(tmp_path / "file" / "checkpoints")


def test_a_reader_leaves_the_save_of_a_running_trainer_alone(tmp_path):
  save(tmp_path, 1)
  (tmp_path / "iteration_2.orbax-checkpoint-tmp").mkdir()
  reader = Checkpointer(tmp_path, read_only=True)
  found, meta = reader.restore_numpy()
  reader.close()
  assert names(tmp_path) == ["iteration_1", "iteration_2.orbax-checkpoint-tmp"]
  assert_equal({"ema": None} | found, state(1.0))
  assert isinstance(found["params"]["bias"], np.ndarray) and meta == {"step": 1}


def test_a_save_compiles_nothing(tmp_path):
  mesh = sharding.make_mesh(4)
  placed = {
    "replicated": jax.device_put(jnp.ones((16, 24)), sharding.replicated(mesh)),
    "sharded": jax.device_put(jnp.ones((16, 24)), sharding.batch(mesh)),
  }
  checkpointer = Checkpointer(tmp_path)
  with compilations() as names:
    checkpointer.save(1, placed, {})
    checkpointer.close()
  assert not names
  assert_equal(restore(tmp_path, placed)[1], placed)
