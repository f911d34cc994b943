"""SIGTERM (preemption, a scheduler, a user) asks a run to save and exit."""

import signal
import threading

import jax
from jax.experimental import multihost_utils
import numpy as np


class Stop:
  """Context manager that notes SIGTERM and SIGINT; a second SIGINT interrupts at once.

  On several processes the answer is agreed upon: all must call `requested` in the same order.
  """

  def __init__(self):
    self._flag = threading.Event()
    self._previous = {}

  def __enter__(self) -> "Stop":
    # Only the main thread may set handlers; elsewhere (a notebook's worker) nothing is caught.
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._note)
    return self

  def _note(self, number, frame) -> None:
    if self._flag.is_set() and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._flag.set()

  def requested(self) -> bool:
    """Whether any process was told to stop."""
    if jax.process_count() == 1:
      return self._flag.is_set()
    return bool(multihost_utils.process_allgather(np.array(self._flag.is_set())).any())

  def __exit__(self, *_) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
