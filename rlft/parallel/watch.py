"""Watches the processes of a run: where one dies, hangs or fails, the others end too and say why.

A process that waits in a collective for another cannot be woken, and has no deadline of its own.
So each process has two threads. One tells the others that the process lives, and hears them; one
looks at how long each was silent, and ends this process where there is no hope.
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import json
import math
import os
import sys
import threading
import time
import traceback
from typing import NoReturn, Protocol

from rlft.types import UserError

_BEAT_S = 1.0
# How long a process that fails may still write, and the others look for what ends them, too. Where
# all have agreed on the error, each ends in its own time.
_GRACE_S = 5.0
# Silence that says who is gone, once it is known that something is wrong.
_SUSPECT_S = 5.0
_LONGEST_TICK_S = 5.0
_LONGEST = 1000  # characters of a message
FAILED, MISTAKE = 1, 2  # exit statuses; a mistake is not worth another try


@dataclasses.dataclass(frozen=True)
class Sign:
  """What a process says of itself.

  Attributes:
    name: its host and number there.
    beat: another one each time.
    ended: None while it runs, '' once it has done its work, else what went wrong.
    status: its exit status.
    gone: whether nothing of it is left to be waited for.
  """

  name: str
  beat: int = 0
  ended: str | None = None
  status: int = 0
  gone: bool = False


class Board(Protocol):
  """Where each process leaves its sign for the others."""

  def write(self, process: int, sign: str) -> None:
    """Replaces a process's sign."""

  def read(self) -> Mapping[int, str]:
    """The signs by process."""


class Silences:
  """For how long each process of a run was not heard, by this one's own ticks.

  Time that passes while this process is stopped itself does not count.
  """

  def __init__(self, count: int):
    self._signs: dict[int, Sign] = {}
    self._seconds = dict.fromkeys(range(count), 0.0)

  def hear(self, signs: Mapping[int, Sign]) -> None:
    """Notes signs; one that is not new says nothing."""
    for process, sign in signs.items():
      if sign != self._signs.get(process):
        self._signs[process], self._seconds[process] = sign, 0.0

  def tick(self, seconds: float) -> None:
    """Lets time pass."""
    for process in self._seconds:
      self._seconds[process] += min(seconds, _LONGEST_TICK_S)

  def lost(self, timeout_s: float) -> int | None:
    """The first process that should be there and was silent for so long; None if there is none."""
    return next(
      (p for p, s in self._seconds.items() if s >= timeout_s and not self.sign(p).gone), None
    )

  def failed(self) -> list[int]:
    """The processes that have said what went wrong."""
    return [process for process in self._seconds if self.sign(process).ended]

  def all_ended(self) -> bool:
    """Whether every process has said that it ends, well or not."""
    return all(self.sign(process).ended is not None for process in self._seconds)

  def all_gone(self) -> bool:
    """Whether nobody is left who is alive."""
    return all(self.sign(p).gone or s >= _SUSPECT_S for p, s in self._seconds.items())

  def sign(self, process: int) -> Sign:
    """The last sign of a process; a nameless one before the first."""
    return self._signs.get(process, Sign(""))


def leave(message: str, status: int) -> NoReturn:
  """Ends this process at once, with a line on stderr, whatever its threads wait for."""
  with contextlib.suppress(OSError, ValueError):  # Nobody may be there to read it.
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
  os._exit(status)


class Watch:
  """Tells the other processes of a run about this one, and ends it where they are gone."""

  def __init__(
    self,
    board: Board,
    *,
    process: int,
    count: int,
    name: str,
    timeout_s: float,
    leave: Callable[[str, int], NoReturn] = leave,
  ):
    """Prepares; `start` begins.

    Args:
      board: reaches all processes.
      process: this one, from 0; the board is gone when process 0 ends.
      count: of all processes.
      name: of this process, for the others.
      timeout_s: seconds of silence after which a process counts as dead.
      leave: ends this process with a message and an exit status.
    """
    self._board, self._process, self._timeout_s, self._leave = board, process, timeout_s, leave
    self._sign = Sign(name)
    self._silences = Silences(count)
    self._lock, self._talk, self._leaving = (threading.Lock() for _ in range(3))
    self._grace = 0.0
    self._over = threading.Event()

  def start(self) -> None:
    """Starts the threads."""
    for loop in (self._talking, self._judging):
      threading.Thread(target=loop, name=f"watch {loop.__name__}", daemon=True).start()

  def talk(self) -> None:
    """Tells the others that this process lives, and hears them."""
    # One at a time, or an older sign might replace a newer one; but a board that never answers one
    # thread must not keep another from leaving.
    if not self._talk.acquire(timeout=_BEAT_S):
      return
    try:
      with self._lock:
        self._sign = dataclasses.replace(self._sign, beat=self._sign.beat + 1)
        text = json.dumps(dataclasses.asdict(self._sign))
      self._board.write(self._process, text)
      heard = {process: Sign(**json.loads(sign)) for process, sign in self._board.read().items()}
      with self._lock:
        self._silences.hear(heard)
    except Exception:  # The board is out of reach, which is silence of all.
      pass
    finally:
      self._talk.release()

  def judge(self, seconds: float) -> None:
    """Ends this process if another is gone, or has failed and this one does not end by itself.

    Args:
      seconds: that have passed since the last time.
    """
    with self._lock:
      self._silences.tick(seconds)
      failed, lost = self._silences.failed(), self._silences.lost(self._timeout_s)
      if failed and not self._silences.all_ended():
        self._grace += seconds
    if lost not in (None, self._process):
      self._end(self._lost_message(lost), FAILED)
    elif self._grace >= _GRACE_S:
      self._end(*self._said_by(failed[0]))
    else:
      return
    self.leave()

  def announce(self, error: BaseException) -> None:
    """Tells the others, once, that this process will end because of an error.

    Before it waits for anything: the others may wait for it. What is no mistake of the user is
    often the end of another process, as it is seen from here; that takes some seconds to find out.
    """
    if self._sign.ended:
      return
    if isinstance(error, UserError):
      self._end(str(error), MISTAKE)
      return
    culprit = self._culprit() if isinstance(error, Exception) else None
    if culprit is None:
      traceback.print_exception(error)
    self._end(*(culprit or (f"{type(error).__name__}: {error}", FAILED)))

  def leave(self) -> NoReturn:
    """Ends this process with what was announced; process 0 is the last, as it has the board."""
    self._leaving.acquire()  # For ever: one thread speaks.
    with self._lock:
      self._sign = dataclasses.replace(self._sign, gone=True)
      sign = self._sign
    self.talk()
    self._wait_until(self._silences.all_gone, 3 * _GRACE_S if self._process == 0 else 0.0)
    self._leave(sign.ended, sign.status)

  def finish(self) -> None:
    """Says that the work is done, and returns when all processes have said so.

    Ends this process if another has failed or is gone.
    """
    self._end("", 0)
    self._wait_until(self._silences.all_ended, math.inf)
    if failed := self._silences.failed():
      self._end(*self._said_by(failed[0]))
      self.leave()
    self._over.set()

  def _end(self, message: str, status: int) -> None:
    with self._lock:
      if not self._sign.ended:
        message = " ".join(message.split())[:_LONGEST]
        self._sign = dataclasses.replace(self._sign, ended=message, status=status)
    self.talk()

  def _wait_until(self, done: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not done():
      time.sleep(_BEAT_S / 10)
      self.talk()

  def _culprit(self) -> tuple[str, int] | None:
    """(what went wrong on another process, exit status), or None if all others seem well."""
    deadline = time.monotonic() + _SUSPECT_S + 3 * _BEAT_S
    while True:
      with self._lock:
        lost = self._silences.lost(min(_SUSPECT_S, self._timeout_s))
        failed = self._silences.failed()
      late = time.monotonic() >= deadline
      if lost not in (None, self._process):
        return self._lost_message(lost), FAILED
      if failed and (late or self._silences.sign(failed[0]).status == MISTAKE):
        return self._said_by(failed[0])
      if late:
        return None
      time.sleep(_BEAT_S / 10)

  def _said_by(self, process: int) -> tuple[str, int]:
    sign = self._silences.sign(process)
    return f"on process {process}: {sign.ended}", sign.status

  def _lost_message(self, process: int) -> str:
    name = self._silences.sign(process).name
    return (
      f"process {process}{name and f' ({name})'} has died or hangs, and all processes stop: run the"
      " same command again to go on from the last checkpoint"
    )

  def _talking(self) -> None:
    while not self._over.wait(_BEAT_S):
      self.talk()

  def _judging(self) -> None:
    last = time.monotonic()
    while not self._over.wait(_BEAT_S):
      now = time.monotonic()
      self.judge(now - last)
      last = now
