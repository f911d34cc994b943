"""A directory has one writer: the living keep it, and the dead do not."""

import json
import logging
import os
import subprocess
import sys
import threading
import time

import pytest

from rlft.storage import lock as lock_lib
from rlft.storage.lock import Lock
from rlft.types import UserError


@pytest.fixture
def path(tmp_path):
  return tmp_path / "run" / "checkpoints.lock"


@pytest.fixture
def other():
  """A process that lives until the test ends."""
  process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
  yield process
  process.kill()
  process.communicate()


def hold(path, process, **changes):
  """The lock of another process, as that would have written it."""
  path.parent.mkdir(exist_ok=True)
  holder = {
    "host": "there",
    "process": process,
    "machine": lock_lib._machine(),
    "birth": lock_lib._birth(process),
    "started": "2026-11-27 10:00:00 +0000",
  }
  path.write_text(json.dumps(holder | changes))


def test_it_says_who_holds_it_until_it_is_released(path):
  lock = Lock(path)
  holder = json.loads(path.read_text())
  assert holder["process"] == os.getpid() and holder["host"] and holder["started"]
  lock.check()
  Lock(path).release()  # This process may hold what it holds.
  lock.release()
  assert not path.exists() and os.listdir(path.parent) == []


def test_a_living_holder_is_named(path, other):
  hold(path, other.pid)
  with pytest.raises(UserError) as error:
    Lock(path)
  assert str(error.value) == (
    f"{path.parent} is being written to by process {other.pid} on there, started 2026-11-27"
    " 10:00:00 +0000: wait for it, stop it, or give another --workdir"
  )
  assert json.loads(path.read_text())["process"] == other.pid


@pytest.mark.parametrize("how", ["dead", "zombie", "number used again"])
def test_a_dead_holder_loses_it(path, other, caplog, how):
  hold(path, other.pid, **({"birth": "1"} if how == "number used again" else {}))
  if how != "number used again":
    other.kill()
    if how == "dead":
      other.wait()
    while how == "zombie" and lock_lib._birth(other.pid):
      time.sleep(0.01)
  with caplog.at_level(logging.WARNING, "rlft"):
    lock = Lock(path)
  assert len(caplog.records) == 1
  assert f"over from process {other.pid} on there, started" in caplog.text
  lock.check()
  lock.release()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"host": "there"}', "\x00"])
def test_what_says_nothing_holds_nothing(path, content):
  path.parent.mkdir()
  path.write_text(content)
  Lock(path).release()


def test_a_heartbeat_from_another_machine(path, monkeypatch):
  hold(path, 1, machine="another", birth="1")
  stopped = threading.Event()

  def beat():
    while not stopped.wait(0.02):
      os.utime(path)

  thread = threading.Thread(target=beat)
  thread.start()
  try:
    with pytest.raises(UserError, match="is being written to by process 1 on there"):
      Lock(path, patience_s=30)
  finally:
    stopped.set()
    thread.join()
  # It stops, and after some time it is dead.
  Lock(path, patience_s=0.2).release()


def test_a_holder_on_another_machine_lets_go(path):
  hold(path, 1, machine="another", birth="1")
  threading.Timer(0.1, path.unlink).start()
  start = time.monotonic()
  Lock(path, patience_s=60).release()
  assert time.monotonic() - start < 30


def test_the_heartbeat(path, monkeypatch):
  monkeypatch.setattr(lock_lib, "_BEAT_S", 0.01)
  lock = Lock(path)
  os.utime(path, (0, 0))
  deadline = time.monotonic() + 30
  while path.stat().st_mtime == 0 and time.monotonic() < deadline:
    time.sleep(0.01)
  assert path.stat().st_mtime > 0
  lock.release()


def test_who_was_taken_for_dead_writes_no_more(path):
  lock = Lock(path)
  hold(path, 1, machine="another", birth="1")
  with pytest.raises(UserError, match=r"no longer this run's \(process 1 on there, .* took it"):
    lock.check()
  lock.release()
  assert path.exists()
  path.unlink()
  with pytest.raises(UserError, match=r"no longer this run's \(somebody deleted its lock\)"):
    lock.check()


def test_a_directory_that_cannot_be_written(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="cannot write .*a.lock"):
    Lock(tmp_path / "file" / "a.lock")
