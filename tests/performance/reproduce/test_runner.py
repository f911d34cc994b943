"""Trainings in processes of their own: what is done is not done again."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import reproduce_cases as cases

from rlft.performance.reproduce import runner
from rlft.performance.reproduce import scale as scale_lib
from rlft.performance.reproduce.scale import Experiment
from rlft.types import UserError

ONE = Experiment("rl", ("preference",), 0)


@pytest.fixture
def planned(tmp_path):
  scale = cases.scale()
  return ONE.config(scale, tmp_path), ONE.flags(scale, tmp_path)


def ending(tmp_path, *, until=0, status=0):
  """In the place of a process: a run that ends after some iterations."""
  commands = []

  def start(command, kept_open, environment):
    commands.append(command)
    os.fstat(kept_open)
    cases.write_run(tmp_path / ONE.name, until=until)
    return status

  return start, commands


def test_a_run_is_started_and_not_started_again(tmp_path, planned):
  config, flags = planned
  start, commands = ending(tmp_path)
  assert not runner.finished(config)
  assert runner.train(config, flags, say=print, start=start) == ""
  assert commands[0][1].endswith("launch/train.py")
  assert commands[0][2] == f"--flagfile={tmp_path / ONE.name / 'run.flags'}"
  assert (tmp_path / ONE.name / "run.flags").read_text().splitlines() == flags
  assert runner.done(config)
  assert runner.train(config, flags, say=print, start=start) == "" and len(commands) == 1


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path, planned):
  config, flags = planned
  start, commands = ending(tmp_path)
  runner.train(config, flags, say=print, start=start)
  other = [*flags, "--learning_rate=0.5", "--clip_range=0.5"]
  changed = scale_lib.config_of(other, where="here")
  assert not runner.done(changed)
  for _ in range(2):
    said = runner.train(changed, other, say=print, start=start)
    assert said.startswith(f"the run in {tmp_path / ONE.name} was begun with other settings (")
    assert "clip_range" in said and "learning_rate" in said and "move it away" in said
  assert len(commands) == 1 and runner.done(config)
  # The same settings, said otherwise.
  assert runner.train(config, [*flags, "--seed=0"], say=print, start=start) == ""
  # Moved to another place, it is still the same run.
  moved = ONE.config(cases.scale(), tmp_path / "elsewhere")
  shutil.copytree(tmp_path / ONE.name, moved.output.workdir)
  assert runner.done(moved)
  (tmp_path / ONE.name / "run.flags").write_text("--no_such_flag=1\n")
  assert not runner.done(config)
  (tmp_path / ONE.name / "run.flags").unlink()  # Trained by another command.
  assert not runner.done(config)


def test_a_run_that_was_killed_goes_on(tmp_path, planned):
  config, flags = planned
  start, _ = ending(tmp_path, until=2, status=-signal.SIGKILL)
  with pytest.raises(UserError, match="was ended by signal 9: the same command goes on"):
    runner.train(config, flags, say=print, start=start)
  start, _ = ending(tmp_path, until=2)
  with pytest.raises(UserError, match="was stopped: the same command goes on"):
    runner.train(config, flags, say=print, start=start)
  start, commands = ending(tmp_path)
  assert runner.train(config, flags, say=print, start=start) == "" and len(commands) == 1


def test_a_run_whose_report_is_missing_is_not_finished(tmp_path, planned):
  config, flags = planned
  start, commands = ending(tmp_path)
  runner.train(config, flags, say=print, start=start)
  (tmp_path / ONE.name / "report.html").unlink()
  runner.train(config, flags, say=print, start=start)
  assert len(commands) == 2


def test_a_failure_is_said(tmp_path, planned):
  config, flags = planned
  start, _ = ending(tmp_path, until=2, status=2)
  said = runner.train(config, flags, say=print, start=start)
  assert said == f"the run in {tmp_path / ONE.name} ended with status 2, see above"


def test_programs_are_kept_unless_the_user_keeps_them_elsewhere(tmp_path, planned, monkeypatch):
  config, flags = planned
  found = []

  def start(command, kept_open, environment):
    found.append(environment["JAX_COMPILATION_CACHE_DIR"])
    return 1

  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  runner.train(config, flags, say=print, start=start)
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
  runner.train(config, flags, say=print, start=start)
  assert found == [str(tmp_path / "cache"), "elsewhere"]


def test_another_training_in_the_directory_is_waited_for(tmp_path, planned):
  config, flags = planned
  (tmp_path / ONE.name).mkdir()
  other = open(tmp_path / ONE.name / "lock", "wb")
  fcntl.flock(other, fcntl.LOCK_EX)
  lines = []

  def end():
    time.sleep(0.2)
    (tmp_path / ONE.name / "run.flags").write_text("\n".join(flags) + "\n")
    cases.write_run(tmp_path / ONE.name)
    other.close()

  thread = threading.Thread(target=end)
  thread.start()
  start, commands = ending(tmp_path)
  runner.train(config, flags, say=lines.append, start=start)
  thread.join()
  assert commands == []  # the other one has done it
  assert "is being trained by another process, which is waited for" in lines[0]


# Starts a process that sleeps, with the lock of a directory, and which prints its id.
_PARENT = """
import os, sys
from rlft.performance.reproduce import runner
from rlft.performance.reproduce import scale as scale_lib
with runner._locked(__import__("pathlib").Path(sys.argv[1]), print) as lock:
  child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
  started = runner.subprocess.Popen
  def popen(command, **how):
    how.pop("stdout")
    return started(command, **how)
  runner.subprocess.Popen = popen
  runner.start([sys.executable, "-c", child], lock, dict(os.environ))
"""


def parent(directory):
  process = subprocess.Popen(
    [sys.executable, "-c", _PARENT, directory],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    text=True,
  )
  return process, int(process.stdout.readline())


def is_locked(directory):
  with open(directory / "lock", "wb") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return True
    return False


def test_a_training_whose_parent_was_killed_keeps_the_lock(tmp_path):
  process, child = parent(tmp_path)
  process.kill()
  process.wait()
  assert is_locked(tmp_path)
  os.kill(child, signal.SIGKILL)
  deadline = time.monotonic() + 10
  while is_locked(tmp_path):
    assert time.monotonic() < deadline
    time.sleep(0.02)


def test_a_training_is_told_when_its_parent_is_told_to_stop(tmp_path):
  process, _ = parent(tmp_path)
  process.terminate()
  assert process.wait(timeout=20) == 128 + signal.SIGTERM
  assert not is_locked(tmp_path)
