"""What ends the processes of a run; on real processes in tests/test_train_processes.py."""

import threading

import pytest

from rlft.parallel import watch as watch_lib
from rlft.parallel.watch import FAILED, MISTAKE, Watch
from rlft.types import UserError


class Left(BaseException):
  """A process has ended with (message, status)."""


class Board(dict):
  """Signs by process."""

  write, reachable = dict.__setitem__, True

  def read(self):
    if not self.reachable:
      raise ConnectionError
    return dict(self)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
  monkeypatch.setattr(watch_lib, "_SUSPECT_S", 4)
  monkeypatch.setattr(watch_lib, "_BEAT_S", 0.02)
  monkeypatch.setattr(watch_lib, "_LONGEST_TICK_S", 0.04)


def leave(message, status):
  raise Left(message, status)


def watches(count, board):
  found = [
    Watch(board, process=i, count=count, name=f"h{i}, pid {i}", timeout_s=6, leave=leave)
    for i in range(count)
  ]
  for each in (*found, *found[::-1]):
    each.talk()
  return found


def judge(watch, seconds):
  """Lets seconds pass, in ticks that are counted whole."""
  for _ in range(round(seconds / 0.04)):
    watch.judge(0.04)


def left(watch, seconds):
  with pytest.raises(Left) as caught:
    judge(watch, seconds)
  return caught.value.args


def test_silence_ends_the_others_and_names_who_is_silent(monkeypatch):
  monkeypatch.setattr(watch_lib, "_GRACE_S", 0.1)
  first, _, third = watches(3, Board())
  for each in (first, third):
    each.talk()  # Hears the last of the second.
  for each in (first, third):
    judge(each, 5.9)
  for each in (first, third):
    each.talk()
  message, status = left(third, 0.2)
  assert message.startswith("process 1 (h1, pid 1) has died or hangs") and status == FAILED
  assert left(first, 0.2)[0] == message


def test_process_0_is_missed_with_the_board():
  board = Board()
  _, second = watches(2, board)
  board.reachable = False
  second.talk()
  assert left(second, 6.1)[0].startswith("process 0 (h0, pid 0) has died or hangs")


def test_a_process_that_was_never_heard():
  board = Board()
  lonely = Watch(board, process=1, count=2, name="h1", timeout_s=6, leave=leave)
  lonely.talk()
  assert left(lonely, 6.1)[0].startswith("process 0 has died or hangs")


def test_time_in_which_this_process_was_stopped_does_not_count():
  first, _ = watches(2, Board())
  for _ in range(100):
    first.judge(3600)


def test_an_error_ends_who_waits_for_its_process():
  board = Board()
  first, second = watches(2, board)
  second.announce(UserError("no space\nleft"))
  second.announce(UserError("what comes of it"))
  first.talk()
  judge(first, 4.9)
  assert left(first, 0.2) == ("on process 1: no space left", MISTAKE)
  second.talk()
  with pytest.raises(Left) as caught:
    second.leave()
  assert caught.value.args == ("no space left", MISTAKE)


def test_who_has_agreed_on_an_error_takes_its_time():
  first, second = watches(2, Board())
  for each in (first, second, first):
    each.announce(UserError("the reward failed"))
    each.talk()
  judge(first, 20 * 0.04)
  for _ in range(500):
    second.talk()
    first.talk()
    judge(first, 0.2)


def test_a_failed_collective_is_blamed_on_who_is_gone(capsys):
  first, second, third = watches(3, Board())
  for _ in range(120):
    first.judge(0.04)
    third.talk()
    first.talk()
  first.announce(RuntimeError("Gloo: connection closed by peer"))
  with pytest.raises(Left, match=r"process 1 \(h1, pid 1\) has died"):
    judge(first, 10)
  assert "Gloo" not in capsys.readouterr().err
  del second


def test_an_error_of_its_own_is_shown_whole(monkeypatch, capsys):
  monkeypatch.setattr(watch_lib, "_SUSPECT_S", 0)
  first, second = watches(2, Board())
  for each in (first, second):
    each.talk()
  monkeypatch.setattr(watch_lib, "_SUSPECT_S", 0.2)
  try:
    raise KeyError("bug")
  except KeyError as error:
    first.announce(error)
  assert "Traceback" in capsys.readouterr().err
  second.talk()
  assert left(second, 6)[0] == "on process 0: KeyError: 'bug'"


def test_all_wait_for_the_last_one_to_finish():
  first, second = watches(2, Board())
  waiting = threading.Thread(target=first.finish)
  waiting.start()
  waiting.join(0.2)
  assert waiting.is_alive()
  second.finish()
  waiting.join(10)
  assert not waiting.is_alive()


def test_who_has_finished_still_fails_with_the_others():
  first, second = watches(2, Board())
  first.announce(UserError("the report cannot be written"))
  with pytest.raises(Left, match="on process 0: the report cannot be written"):
    second.finish()
