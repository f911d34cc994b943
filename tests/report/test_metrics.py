import errno
import io
import json
import os
import resource

import jax.numpy as jnp
import numpy as np
import pytest
import tensorboard_cases
from tensorboardX.proto.event_pb2 import SessionLog

from rlft.report import metrics, trackers
from rlft.types import UserError


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def scalars(workdir):
  return [
    (event.step, value.tag, value.simple_value)
    for event in tensorboard_cases.events(workdir)
    for value in event.summary.value
  ]


def open_writer(workdir, first_iteration=0):
  board = trackers.TensorBoard(workdir, first_iteration=first_iteration)
  return metrics.MetricsWriter(workdir, first_iteration=first_iteration, trackers=[board])


def test_one_json_object_a_line(tmp_path):
  with metrics.MetricsWriter(tmp_path / "new", first_iteration=0) as writer:
    writer.write(
      0,
      {
        "reward/a/mean": jnp.float32(0.5),
        "count": np.int64(3),
        "nan": np.float32("nan"),
        "infinite": float("inf"),
        "bf16": jnp.bfloat16(2),
        "flag": True,
      },
    )
    # Each line is on disk before the next iteration, and its first key is the iteration.
    text = (tmp_path / "new" / "metrics.jsonl").read_text()
  assert text == (
    '{"iteration": 0, "reward/a/mean": 0.5, "count": 3, "nan": null, "infinite": null,'
    ' "bf16": 2.0, "flag": 1}\n'
  )


def test_tensorboard_has_the_same_numbers(tmp_path):
  with open_writer(tmp_path) as writer:
    writer.write(0, {"a": 0.25, "b/c": 2})
    writer.write(1, {"a": float("nan")})
    # Flushed: what is there can be read while the run goes on.
    got = scalars(tmp_path)
  assert got[:2] == [(0, "a", 0.25), (0, "b/c", 2.0)]
  assert got[2][:2] == (1, "a") and np.isnan(got[2][2])
  assert len(lines(tmp_path)) == 2


def test_stopped_and_resumed_is_as_uninterrupted(tmp_path):
  whole, resumed = tmp_path / "whole", tmp_path / "resumed"
  with metrics.MetricsWriter(whole, first_iteration=0) as writer:
    for iteration in range(6):
      writer.write(iteration, {"a": iteration / 7})
  with open_writer(resumed) as writer:
    for iteration in range(5):
      writer.write(iteration, {"a": iteration / 7})
  with open(resumed / "metrics.jsonl", "a") as file:
    file.write('{"iteration": 5, "a": 0.7')  # killed here
  # The last checkpoint was of iteration 3.
  with open_writer(resumed, 3) as writer:
    for iteration in range(3, 6):
      writer.write(iteration, {"a": iteration / 7})
  assert (whole / "metrics.jsonl").read_bytes() == (resumed / "metrics.jsonl").read_bytes()
  starts = [
    e.step for e in tensorboard_cases.events(resumed) if e.session_log.status == SessionLog.START
  ]
  assert sorted(starts) == [0, 3]  # TensorBoard drops the first process's steps from 3 on
  assert sorted(scalars(resumed))[-1][0] == 5


def test_a_new_run_starts_empty(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"iteration": 0}\n')
  metrics.MetricsWriter(tmp_path, first_iteration=0).close()
  assert lines(tmp_path) == []


def test_a_directory_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write .*metrics.jsonl"):
    metrics.MetricsWriter(tmp_path / "file" / "run", first_iteration=0)


def test_full_disk_is_one_line_with_the_remedy(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, first_iteration=0)
  with open("/dev/full", "wb") as full:
    os.dup2(full.fileno(), writer._lines._file.fileno())
  with pytest.raises(UserError, match="No space left on device; free some space") as caught:
    writer.write(0, {"a": 1.0})
  assert "\n" not in str(caught.value)
  writer.close()


def test_full_disk_under_the_event_file(tmp_path):
  writer = open_writer(tmp_path)
  with open("/dev/full", "wb") as full:
    os.dup2(full.fileno(), writer._trackers[0]._events._py_recordio_writer._writer.fileno())
  with pytest.raises(UserError, match="tensorboard: No space left on device"):
    writer.write(0, {"a": 1.0})
  writer.close()  # does not raise again
  assert lines(tmp_path) == [{"iteration": 0, "a": 1.0}]


def test_a_line_that_fits_in_part_is_taken_back(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, first_iteration=0)
  writer.write(0, {"a": 1.0})
  before = (tmp_path / "metrics.jsonl").read_bytes()
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
  try:
    with pytest.raises(UserError, match="metrics.jsonl"):
      writer.write(1, {"a": 1.0})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert (tmp_path / "metrics.jsonl").read_bytes() == before
  writer.write(1, {"a": 1.0})  # space was made
  assert [line["iteration"] for line in lines(tmp_path)] == [0, 1]
  writer.close()


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def clock(monkeypatch):
  """Seconds that a test may set."""
  seconds = [0.0]
  monkeypatch.setattr(metrics.time, "monotonic", lambda: seconds[0])
  return seconds


def test_progress_in_a_log_file_is_one_line_an_iteration(clock):
  stream = io.StringIO()
  with metrics.Progress(12, 8, stream=stream) as progress:
    clock[0] = 1000.0  # the first iteration compiles
    progress.update({"reward/tone/mean": -0.51234, "reward/tone/std": 1, "images_per_second": 21.6})
    progress.say("saved")
    for clock[0] in (1010.0, 1030.0, 1030.0):
      progress.update({"reward/tone/mean": jnp.float32(0.25)})
  assert stream.getvalue().splitlines() == [
    "iteration  8,  9/12 done  tone -0.5123  21.6 images/s  ... left",
    "saved",
    "iteration  9, 10/12 done  tone 0.25  0:20 left",
    "iteration 10, 11/12 done  tone 0.25  0:15 left",  # 30 s for two
    "iteration 11, 12/12 done  tone 0.25  0:00 left",
  ]


def test_progress_of_sums_and_judges():
  stream = io.StringIO()
  with metrics.Progress(2, stream=stream) as progress:
    progress.update(
      {"reward/a/mean": 0, "reward/a/x/mean": 0.5, "reward/a/y/mean": 2, "reward/b/mean": 1}
      | {"watch/a/mean": 0.25}
    )
  assert "a/x 0.5 (judge 0.25)  a/y 2 (judge 0.25)  b 1  " in stream.getvalue()


def test_progress_says_what_is_wrong_with_a_reward():
  nan, stream = float("nan"), io.StringIO()
  with metrics.Progress(2, stream=stream) as progress:
    progress.update(
      {"reward/a/mean": nan, "reward/a/unscored": 1.0}
      | {"reward/b/mean": 0.5, "reward/b/min": 0.5, "reward/b/max": 0.5, "watch/b/mean": nan}
      | {"reward/c/mean": 0.5, "reward/c/min": 0.25, "reward/c/max": 1, "reward/c/unscored": 0.125}
    )
  assert (
    "a not scored  b 0.5 (judge not scored, the same for all images)  c 0.5 (12% not scored)  "
  ) in stream.getvalue()


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_progress_goes_on_when_the_terminal_is_closed(kind):
  class Closing(kind):
    closed_by_user = False

    def write(self, text):
      if self.closed_by_user:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
      return super().write(text)

  stream = Closing()
  with metrics.Progress(2, stream=stream) as progress:
    stream.closed_by_user = True
    progress.update({"reward/a/mean": 0.5})
    progress.say("stopped")


def test_progress_on_a_terminal_is_a_bar():
  stream = Terminal()
  with metrics.Progress(4, 1, stream=stream) as progress:
    progress.update({"reward/tone/mean": 0.5, "images_per_second": 2.0})
    progress.say("saved")
  assert "2/4" in stream.getvalue() and "saved\n" in stream.getvalue()
  assert "tone 0.5, 2 images/s, ... left]" in stream.getvalue()
  assert stream.getvalue().count("\n") <= 3


def test_clock():
  assert [metrics._clock(s) for s in (0, 59.2, 61, 3725)] == ["0:00", "1:00", "1:01", "1:02:05"]
