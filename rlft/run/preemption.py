"""Signals that ask a run to save and exit: of a scheduler, of a closed terminal, of a user."""

from collections.abc import Iterator
import contextlib
import signal
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

# SLURM warns by USR1, a terminal that is closed by HUP.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Stopped(BaseException):
  """The run was told to stop; what was being done is given up.

  No Exception, or what a reward raises would be taken to be this.
  """


class Stop:
  """Context manager that notes the signals; a second SIGINT interrupts at once.

  A signal that is ignored (as by nohup) stays ignored. On several processes the answer is agreed
  upon: all must call `check` in the same order.
  """

  def __init__(self):
    self._flag = threading.Event()
    self._at_once = False
    self._previous = {}

  def __enter__(self) -> "Stop":
    # Only the main thread may set handlers; elsewhere (a notebook's worker) nothing is caught.
    if threading.current_thread() is threading.main_thread():
      for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
          self._previous[number] = signal.signal(number, self._note)
    return self

  def _note(self, number, frame) -> None:
    if self._flag.is_set() and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._flag.set()
    if self._at_once:
      self._at_once = False  # Not once more, on the way out of the block.
      raise Stopped

  def check(self) -> None:
    """Returns if no process was told to stop.

    Raises:
      Stopped: one was; on every process.
    """
    flag = self._flag.is_set()
    if jax.process_count() > 1:
      flag = multihost_utils.process_allgather(np.array(flag)).any()
    if flag:
      raise Stopped

  @contextlib.contextmanager
  def at_once(self) -> Iterator[None]:
    """Lets a signal end the block itself, which may wait long for something outside of it.

    Raises:
      Stopped: out of the middle of the block, whose work must have no effect before its end. Never
        on several processes, which can only agree between their programs.
    """
    self._at_once = jax.process_count() == 1
    try:
      if self._at_once and self._flag.is_set():
        raise Stopped
      yield
    finally:
      self._at_once = False

  def wait_for(self, arrays: Any) -> None:
    """Returns when the arrays of a tree are computed.

    Raises:
      Stopped: as by `at_once`; JAX's own waiting lets no handler of a signal run.
    """
    with self.at_once():
      while not all(array.is_ready() for array in jax.tree.leaves(arrays)):
        time.sleep(0.005)
    jax.block_until_ready(arrays)

  def __exit__(self, *_) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
