from concurrent import futures
import errno
import os
import pathlib
import threading

import pytest

from rlft.storage import files
from rlft.types import UserError


def test_write_atomic_replaces_and_makes_directories(tmp_path):
  path = tmp_path / "a" / "b.txt"
  files.write_atomic(path, "ä")
  files.write_atomic(path, b"new")
  assert path.read_bytes() == b"new"
  assert os.listdir(path.parent) == ["b.txt"]


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "a.txt"
  files.write_atomic(path, "old")

  def full(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(UserError, match="No space left on device; free some space") as caught:
    files.write_atomic(path, "new")
  assert "\n" not in str(caught.value)
  assert path.read_text() == "old"
  assert os.listdir(tmp_path) == ["a.txt"]


def test_directory_in_the_way_is_a_user_error(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write"):
    files.write_atomic(tmp_path / "file" / "a.txt", "x")


@pytest.mark.parametrize("tail", ["", '{"iteration": 2, "a"', "\0\0\0\0", "\0\0\n", "12"])
def test_read_jsonl_drops_a_half_written_last_line(tmp_path, tail):
  path = tmp_path / "a.jsonl"
  path.write_text('{"iteration": 0}\n{"iteration": 1}\n' + tail)
  assert files.read_jsonl(path) == [{"iteration": 0}, {"iteration": 1}]


def test_read_jsonl_of_no_file_or_an_empty_one(tmp_path):
  assert files.read_jsonl(tmp_path / "a.jsonl") == []
  (tmp_path / "a.jsonl").write_text("")
  assert files.read_jsonl(tmp_path / "a.jsonl") == []


def test_read_jsonl_of_a_directory(tmp_path):
  with pytest.raises(UserError, match="cannot read .*: Is a directory"):
    files.read_jsonl(tmp_path)


def test_read_jsonl_names_a_damaged_line(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{"iteration": 0}\nrubbish\n{"iteration": 1}\n')
  with pytest.raises(UserError, match="line 2 of .*a.jsonl is not a JSON object: repair"):
    files.read_jsonl(path)


def test_keep_before(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{"iteration": 0}\n{"iteration": 1}\n{"iteration": 2}\n{"iter')
  assert files.keep_before(path, 2) == [{"iteration": 0}, {"iteration": 1}]
  assert path.read_text() == '{"iteration": 0}\n{"iteration": 1}\n'
  unchanged = path.stat().st_ino
  files.keep_before(path, 2)
  assert path.stat().st_ino == unchanged  # not rewritten without need
  path.write_text('{"a": 0}\n')
  with pytest.raises(UserError, match="line 1 of .* has no 'iteration'"):
    files.keep_before(path, 2)


def _at_once(do, count=8):
  """Does something in threads, which share their process id as containers on several hosts do."""
  barrier = threading.Barrier(count)

  def one(number):
    barrier.wait()
    return do(number)

  with futures.ThreadPoolExecutor(count) as pool:
    return list(pool.map(one, range(count)))


def test_those_with_one_process_id_do_not_meet_in_a_probe(tmp_path, monkeypatch):
  barrier, write = threading.Barrier(8), pathlib.Path.write_bytes

  def all_have_written(path, data):
    write(path, data)
    barrier.wait()

  monkeypatch.setattr(pathlib.Path, "write_bytes", all_have_written)
  _at_once(lambda _: files.check_writable(str(tmp_path)))
  assert os.listdir(tmp_path) == []


def test_a_probe_that_somebody_has_cleared_up_was_written(tmp_path, monkeypatch):
  unlink = pathlib.Path.unlink

  def twice(path):
    unlink(path)
    unlink(path)

  monkeypatch.setattr(pathlib.Path, "unlink", twice)
  files.check_writable(str(tmp_path))
  assert os.listdir(tmp_path) == []


def test_those_with_one_process_id_write_a_whole_file_each(tmp_path, monkeypatch):
  barrier, sync = threading.Barrier(8), os.fsync

  def all_have_written(descriptor):
    sync(descriptor)
    barrier.wait()

  monkeypatch.setattr(os, "fsync", all_have_written)
  contents = [str(number) * (number + 1) * 1000 for number in range(8)]
  _at_once(lambda number: files.write_atomic(tmp_path / "a", contents[number]))
  assert (tmp_path / "a").read_text() in contents
  assert os.listdir(tmp_path) == ["a"]
