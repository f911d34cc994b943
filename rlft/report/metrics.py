"""What a run reports while it goes on: metrics.jsonl, for trackers too, and a progress bar."""

from collections.abc import Iterable, Mapping, Sequence
import contextlib
import json
import math
import operator
import os
import re
import sys
import time
from typing import Any, TextIO

import numpy as np
import tqdm

from rlft.report import trackers as trackers_lib
from rlft.report.trackers import Tracker
from rlft.storage import files

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
  """Appends each iteration's numbers to `metrics.jsonl`, and gives them to trackers.

  A run that was stopped and goes on at iteration n must be opened with `first_iteration=n`: lines
  of iteration n and later, and a half-written last line, are dropped, so that the file has each
  iteration once. On a run of several processes only one may write.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    first_iteration: int,
    trackers: Sequence[Tracker] = (),
  ):
    """Opens the file.

    Args:
      workdir: made where it is missing.
      first_iteration: the iteration that will be written first; 0 drops every old line.
      trackers: closed with this.

    Raises:
      UserError: an unreadable old file, or a directory that cannot be written.
    """
    files.keep_before(files.path_of(workdir) / METRICS_FILE, first_iteration)
    self._lines = files.Lines(files.path_of(workdir) / METRICS_FILE)
    self._workdir, self._trackers = workdir, trackers

  def write(self, iteration: int, values: Mapping[str, Any]) -> None:
    """Writes one iteration.

    Args:
      iteration: at least 0.
      values: numbers by name: Python's, NumPy's or scalar arrays, which are fetched from the device
        here. In the file, NaN and infinities are null.

    Raises:
      UserError: the disk is full; the line is then in the file as a whole or not at all.
    """
    numbers = {name: _number(value) for name, value in values.items()}
    shown = {name: files.finite(v) if isinstance(v, float) else v for name, v in numbers.items()}
    self._lines.add(json.dumps({"iteration": iteration} | shown))
    for tracker in self._trackers:
      tracker.write(iteration, numbers)

  def write_evaluation(self, iteration: int) -> None:
    """Gives trackers what the workdir has of an evaluation; see `trackers.write_evaluation`."""
    trackers_lib.write_evaluation(self._trackers, self._workdir, iteration)

  def close(self) -> None:
    """Closes everything; it was flushed before."""
    self._lines.close()
    for tracker in self._trackers:
      tracker.close()

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


def trained_curves(names: Iterable[str], *, kind: str = "reward") -> list[str]:
  """The `<task>` or, where a task is trained on a sum, the `<task>/<label>` in metric names.

  The mean of a sum of normalised rewards is 0 but for a veto; its terms show how it goes.

  Args:
    names: of metrics.
    kind: 'reward', or 'watch' for the judges.
  """
  matches = (re.fullmatch(f"{kind}/(.+)/mean", name) for name in names)
  found = [match[1] for match in matches if match]
  return [one for one in found if not any(other.startswith(f"{one}/") for other in found)]


def curve(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
  """A metric in each of the rows, `[N]`; NaN where it is missing."""
  found = [row.get(key) for row in rows]
  return np.array([np.nan if value is None else value for value in found], float)


def _number(value: Any) -> int | float:
  """A Python number: int if `value` is integral (a bool too), else float."""
  try:
    return operator.index(value)
  except TypeError:
    return float(value)


class Progress:
  """A run's progress on stderr: a bar on a terminal, else (a log file) one line an iteration.

  A line has the iteration's number, from 0 as in `metrics.jsonl`, and how many are done.
  """

  def __init__(self, total: int, initial: int = 0, *, stream: TextIO | None = None):
    """Starts a bar on a terminal.

    Args:
      total: iterations of the whole run.
      initial: iterations that an earlier process did.
      stream: stderr if None.
    """
    self._total, self._initial, self._done = total, initial, initial
    self._stream = stream or sys.stderr
    self._first_end = 0.0
    self._bar = None
    if self._stream.isatty():
      self._bar = tqdm.tqdm(
        total=total,
        initial=initial,
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        dynamic_ncols=True,
        file=self._stream,
      )

  def update(self, values: Mapping[str, Any]) -> None:
    """Counts one iteration.

    Args:
      values: the iteration's metrics; shows `reward/<task>/mean` (of a sum, of its terms), the
        judge's mean and `images_per_second`.
    """
    self._done += 1
    parts = [_reward_text(name, values) for name in trained_curves(values)]
    if "images_per_second" in values:
      parts.append(f"{float(values['images_per_second']):.3g} images/s")
    parts.append(f"{self._left()} left")
    if self._bar is not None:
      self._bar.set_postfix_str(", ".join(parts), refresh=False)
      self._bar.update()
      return
    width = len(str(self._total))
    where = f"iteration {self._done - 1:{width}}, {self._done:{width}}/{self._total} done"
    self.say("  ".join([where, *parts]))

  def _left(self) -> str:
    """The time left. The first iteration of a process compiles, and so says nothing about it."""
    now, timed = time.monotonic(), self._done - self._initial - 1
    if not timed:
      self._first_end = now
      return "..." if self._done < self._total else _clock(0)
    return _clock((now - self._first_end) / timed * (self._total - self._done))

  def say(self, message: str) -> None:
    """Prints a line without tearing the bar.

    Nobody may be there to read it: a run whose terminal was closed still saves its state.
    """
    with contextlib.suppress(OSError):
      if self._bar is not None:
        self._bar.write(message, file=self._stream)
      else:
        print(message, file=self._stream, flush=True)

  def close(self) -> None:
    """Leaves the bar as it stands."""
    if self._bar is not None:
      self._bar.close()

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


def _reward_text(name: str, values: Mapping[str, Any]) -> str:
  """What a task, or a term of its sum, scored: the mean, the judge's, and what is wrong with it."""

  def of(key):
    return float(values.get(key, math.nan))

  if math.isnan(of(f"reward/{name}/mean")):
    return f"{name} not scored"
  text = f"{name} {of(f'reward/{name}/mean'):.4g}"
  notes = []
  judge = f"watch/{name.partition('/')[0]}/mean"
  if judge in values:
    notes.append("judge not scored" if math.isnan(of(judge)) else f"judge {of(judge):.4g}")
  if of(f"reward/{name}/min") == of(f"reward/{name}/max"):
    notes.append("the same for all images")
  if of(f"reward/{name}/unscored") > 0:
    notes.append(f"{of(f'reward/{name}/unscored'):.0%} not scored")
  return f"{text} ({', '.join(notes)})" if notes else text


def _clock(seconds: float) -> str:
  """Seconds as h:mm:ss or m:ss."""
  minutes, seconds = divmod(math.ceil(max(seconds, 0)), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
