"""What all processes raise where one has an error; on real processes in rewards/scoring."""

import jax
from jax.experimental import multihost_utils
import numpy as np
import pytest

from rlft.parallel import processes
from rlft.types import UserError


class Failed(UserError):
  """An error of this test."""


def test_one_process_raises_its_own():
  processes.raise_together(None)
  with pytest.raises(Failed, match="^mine$"):
    processes.raise_together(Failed("mine"))


@pytest.mark.parametrize(
  ("own", "others", "said"),
  [
    (None, "full: é", "on process 1: full: é"),
    (Failed("mine"), "full", "mine"),
    (Failed("mine"), "", "mine"),
  ],
)
def test_an_error_of_any_process_is_raised_on_each(monkeypatch, own, others, said):
  def gathered(mine):
    other = np.zeros_like(mine)
    other[: len(others.encode())] = np.frombuffer(others.encode(), np.uint8)
    return np.stack([mine, other])

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(multihost_utils, "process_allgather", gathered)
  with pytest.raises(Failed) as caught:
    processes.raise_together(own, Failed)
  assert str(caught.value) == said


def test_without_errors_processes_go_on(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(multihost_utils, "process_allgather", lambda mine: np.stack([mine, mine]))
  processes.raise_together(None)


def test_what_is_of_all_processes(monkeypatch):
  lost = "UNKNOWN: Gloo AllGather failed: Read error [127.0.0.1]:1: Connection reset by peer"
  assert processes.is_collective(jax.errors.JaxRuntimeError("INTERNAL"))
  assert not processes.is_collective(ValueError(lost))  # There is no other.
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  assert processes.is_collective(ValueError(lost))
  assert not processes.is_collective(ValueError("No space left on device"))
