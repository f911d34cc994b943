"""Signals are noted, and end a block where that is allowed."""

import contextlib
import os
import signal
import threading
import time

import jax.numpy as jnp
import pytest

from rlft.run.preemption import Stop, Stopped


@pytest.fixture(autouse=True)
def interrupts():
  """The handlers of a terminal: what starts in the background of a shell ignores SIGINT."""
  names = (signal.SIGINT, signal.SIGHUP)
  before = {number: signal.getsignal(number) for number in names}
  signal.signal(signal.SIGINT, signal.default_int_handler)
  signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  for number, handler in before.items():
    signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_is_noted(name):
  number = getattr(signal, name)
  handler = signal.getsignal(number)
  with Stop() as stop:
    stop.check()
    os.kill(os.getpid(), number)
    with pytest.raises(Stopped):
      stop.check()
    with pytest.raises(Stopped), stop.at_once():  # Also one that came before the block.
      pytest.fail("the block must not begin")
  assert signal.getsignal(number) is handler


def test_a_signal_ends_what_waits():
  with Stop() as stop:
    start = time.monotonic()
    with pytest.raises(Stopped), stop.at_once(), contextlib.suppress(Exception):
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(60)
    assert time.monotonic() - start < 30
    os.kill(os.getpid(), signal.SIGTERM)  # Outside of the block it is noted again.


def test_a_block_is_ended_once():
  left = False
  with Stop() as stop:
    with pytest.raises(Stopped), stop.at_once():
      try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
      finally:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        left = True
    os.kill(os.getpid(), signal.SIGUSR1)
  assert left


def test_a_signal_ends_the_wait_for_images():
  class Never:
    def is_ready(self):
      return False

  with Stop() as stop:
    stop.wait_for({"images": jnp.ones(3)})
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    with pytest.raises(Stopped):
      stop.wait_for({"images": Never()})


def test_a_second_interrupt_is_not_waited_for():
  with Stop():
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_is_ignored_stays_ignored():
  handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # As nohup does.
  try:
    with Stop() as stop:
      os.kill(os.getpid(), signal.SIGHUP)
      stop.check()
  finally:
    signal.signal(signal.SIGHUP, handler)
