"""A run that was stopped and goes on is, bit for bit, the run that was not."""

from concurrent import futures
import functools
import os
import pathlib
import random
import re
import shutil
import signal
import time

import forked_cases
import pytest
import train_cases as cases

from rlft import train
from rlft.algorithms import policy_gradient
from rlft.config import fields
from rlft.config.settings import Config, EvalConfig
from rlft.report.metrics import MetricsWriter
from rlft.rewards.scoring.task import TaskScorer
from rlft.run import preemption, unsettled
from rlft.storage.checkpoint import Checkpointer
from rlft.types import UserError

SEED = 5  # of the moments at which processes are stopped
ITERATIONS = 15  # of their run; a slow one takes 0.15 s


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return cases.folder(tmp_path_factory)


def newest(workdir: pathlib.Path) -> tuple[int, ...]:
  """(iteration, task) of the newest committed checkpoint; () if there is none."""
  names = [path.name for path in (workdir / "checkpoints").glob("*")]
  found = (re.fullmatch(r"iteration_(\d+)(?:_task_(\d+))?", name) for name in names)
  places = (match.groups(default="0") for match in found if match)
  return max((tuple(map(int, place)) for place in places), default=())


def wait_for_checkpoint(process: forked_cases.Forked, workdir: pathlib.Path) -> None:
  """Returns when the process has committed a checkpoint."""
  before, deadline = newest(workdir), time.monotonic() + 240
  while newest(workdir) == before:
    assert time.monotonic() < deadline and process.poll() is None, process.errors()
    time.sleep(0.02)


def run_with_interruptions(
  config: Config, nursery: forked_cases.Nursery
) -> list[tuple[int, str, int]]:
  """Kills a run at a random moment, stops the next at another, and lets the third finish.

  Returns:
    For each process its exit status, what it wrote to stderr, and the number of lines of metrics
    that it left.
  """
  moments, workdir = random.Random(SEED), pathlib.Path(config.output.workdir)
  found = []
  for stop in (signal.SIGKILL, signal.SIGTERM, None):
    # A slow reward leaves time in which to stop it.
    said = workdir.with_name(f"{workdir.name}_said_{len(found)}")
    command = [cases.ROOT / "launch" / "train.py", *cases.flags(config)]
    process = nursery.start(command, said, BROKEN="slow" if stop else "")
    try:
      if stop:
        wait_for_checkpoint(process, workdir)
        time.sleep(moments.uniform(0, 1))
        process.send_signal(stop)
      process.wait(timeout=240)
    finally:
      process.kill()
    found.append((process.returncode, process.errors(), len(cases.metrics(workdir))))
  return found


@pytest.fixture(scope="module")
def interrupted(folder, tmp_path_factory):
  """(settings, future of `run_with_interruptions`), which goes on beside the other tests."""
  workdir = tmp_path_factory.mktemp("interrupted")
  config = cases.config(
    folder, workdir, iterations=ITERATIONS, checkpoint_every=1, pretrain_weight=0.0
  )
  nursery = forked_cases.Nursery(cases.environment_of_runs())
  with futures.ThreadPoolExecutor() as pool:
    yield config, pool.submit(run_with_interruptions, config, nursery)
  nursery.close()


@pytest.mark.usefixtures("interrupted")  # Starts it early.
def test_stopped_between_two_iterations(folder, tmp_path):
  for iterations in (1, 3):
    cases.run(cases.config(folder, tmp_path, iterations=iterations))
  cases.assert_same_run(tmp_path, cases.uninterrupted(folder))


def variants(folder):
  red = cases.task(folder)
  return {
    "prompt": {"task": (red,), "advantage": "prompt", "prompt_history_min": 2},
    "lora": {
      "task": (red,),
      "train_timesteps": 1,
      "lora_rank": 2,
      "kl_weight": 0.1,
      "ema_decay": 0.75,
    },
  }


@pytest.mark.parametrize("variant", ["prompt", "lora"])
def test_stopped_with_other_settings(folder, tmp_path, variant):
  def run(name, iterations):
    changes = variants(folder)[variant] | {"iterations": iterations, "pretrain_weight": 0.0}
    cases.run(cases.config(folder, tmp_path / name, **changes))

  run("whole", 3)
  run("stopped", 2)
  run("stopped", 3)
  cases.assert_same_run(tmp_path / "stopped", tmp_path / "whole")
  assert all(line["grad_norm"] > 0 for line in cases.metrics(tmp_path / "whole"))


@pytest.mark.parametrize("waits", [False, True])
def test_sigterm_in_the_middle_of_an_iteration(folder, tmp_path, monkeypatch, capfd, waits):
  """Also where, as on accelerators, numbers are fetched while the next images are drawn."""
  monkeypatch.setattr(unsettled, "goes_on", lambda: waits)
  rewards = shutil.copy(folder / "rewards.py", tmp_path)
  tasks = cases.task(folder), cases.task(folder, "green", "host:green", rewards)
  config = cases.config(folder, tmp_path / "run", task=tasks, iterations=3)
  # Its second call, in which it sends the signal, is in the second of three iterations.
  monkeypatch.setenv("BROKEN", "stops@2")
  handler = signal.getsignal(signal.SIGTERM)
  close = Checkpointer.close

  def stopped_again(checkpointer):  # The state is not on the disk yet.
    os.kill(os.getpid(), signal.SIGTERM)
    close(checkpointer)

  monkeypatch.setattr(Checkpointer, "close", stopped_again)
  cases.run(config)
  monkeypatch.setattr(Checkpointer, "close", close)
  assert signal.getsignal(signal.SIGTERM) is handler
  assert "stopped in iteration 1; the same command goes on" in capfd.readouterr().err
  assert newest(tmp_path / "run") == (1, 1)
  assert len(cases.metrics(tmp_path / "run")) == 1
  monkeypatch.delenv("BROKEN")
  cases.run(config)
  cases.assert_same_run(tmp_path / "run", cases.uninterrupted(folder))


def test_an_iteration_is_written_while_the_next_is_drawn(folder, tmp_path, monkeypatch):
  """And before a checkpoint, on accelerators."""
  done, draw, save, write = [], train.draw, train.save, MetricsWriter.write

  def noted(name, call, *args):
    done.append(name)
    return call(*args)

  monkeypatch.setattr(unsettled, "goes_on", lambda: True)
  monkeypatch.setattr(train, "draw", functools.partial(noted, "draw", draw))
  monkeypatch.setattr(train, "save", functools.partial(noted, "save", save))
  monkeypatch.setattr(
    MetricsWriter, "write", lambda self, i, values: noted(f"line {i}", write, self, i, values)
  )
  settings = {"task": (cases.task(folder),), "pretrain_weight": 0.0, "checkpoint_every": 2}
  cases.run(cases.config(folder, tmp_path, iterations=3, **settings))
  assert done == ["draw", "draw", "line 0", "line 1", "save", "draw", "line 2", "save"]
  assert [line["iteration"] for line in cases.metrics(tmp_path)] == [0, 1, 2]


def test_a_check_fails_before_the_next_images_are_scored(folder, tmp_path, monkeypatch):
  scored, score = [], TaskScorer.score

  def counted(self, *args):
    scored.append(self)
    return score(self, *args)

  def fail(*_):
    raise UserError("the ratio is not 1")

  monkeypatch.setattr(unsettled, "goes_on", lambda: True)
  monkeypatch.setattr(TaskScorer, "score", counted)
  monkeypatch.setattr(policy_gradient.Learning, "_numbers", fail)
  with pytest.raises(UserError, match="task red, iteration 0: the ratio is not 1"):
    cases.run(cases.config(folder, tmp_path))
  assert len(scored) == 1 and newest(tmp_path) == ()


def test_stopped_wherever_signals_are_looked_at(folder, tmp_path, monkeypatch):
  expected, config = cases.uninterrupted(folder), cases.config(folder, tmp_path, iterations=3)

  class StopsSoon(preemption.Stop):
    left = 5

    def check(self):
      if not self.left:
        raise preemption.Stopped
      self.left -= 1

  monkeypatch.setattr(train, "Stop", StopsSoon)
  places = []
  while not (tmp_path / "report.html").exists():
    cases.run(config)
    places.append(newest(tmp_path))
  # A task looks three times, the pretraining step once: 7 times an iteration.
  assert places == [(0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
  cases.assert_same_run(tmp_path, expected)


def test_a_signal_in_an_evaluation(folder, tmp_path, monkeypatch, capfd):
  metric = f"host:{shutil.copy(folder / 'rewards.py', tmp_path)}:green"
  evals = (EvalConfig("green", str(folder / "prompts.txt"), metric, images=8),)
  config = cases.config(
    folder, tmp_path / "run", eval=evals, eval_every=1, iterations=2, pretrain_weight=0.0
  )
  measure, before = train.evaluate_run, []

  def watched(run, weights, iteration, stop):
    before.append((iteration, newest(tmp_path / "run")))
    measure(run, weights, iteration, stop)

  monkeypatch.setattr(train, "evaluate_run", watched)
  cases.run(fields.replace(config, workdir=str(tmp_path / "whole")))
  monkeypatch.setenv("BROKEN", "stops@5")  # In the evaluation between the two iterations.
  cases.run(config)
  assert "stopped in iteration 1; the same command goes on from here" in capfd.readouterr().err
  monkeypatch.delenv("BROKEN")
  cases.run(config)
  cases.run(config)  # Nothing is left to be done.
  # The state is on disk before it is measured.
  assert before[3:] == [(0, ()), (1, (1, 0)), (1, (1, 0)), (2, (2, 0))]
  found, expected = (
    (tmp_path / run / "eval_history.jsonl").read_text() for run in ("run", "whole")
  )
  assert found == expected
  cases.assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_killed_and_terminated_at_random_moments(folder, tmp_path, interrupted):
  config, running = interrupted
  whole = fields.replace(config, workdir=str(tmp_path), checkpoint_every=0)
  cases.run(whole)
  (killed, _, _), (stopped, errors, lines), (finished, _, _) = running.result()
  assert killed == -signal.SIGKILL
  assert stopped == 0 and "the same command goes on from here" in errors and lines < ITERATIONS
  assert finished == 0
  workdir = pathlib.Path(config.output.workdir)
  cases.assert_same_run(workdir, tmp_path)
  assert (workdir / "report.html").exists()
