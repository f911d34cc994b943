"""Data sets of prompts as ArrayRecord files."""

import hashlib
import json
import os
import sys
import unittest.mock

import numpy as np
import pytest

from rlft.data import prompts, records
from rlft.types import Prompt, UserError

array_record_module = pytest.importorskip("array_record.python.array_record_module")

PROMPTS = [
  Prompt("a dog and a Bär", {"objects": ["dog", "Bär"]}),
  *(Prompt(f"a cat {i}", {"width": 512}) for i in range(99)),
]


@pytest.fixture
def folder(tmp_path):
  writer = records.Writer(str(tmp_path), "train")
  for prompt in PROMPTS:
    writer.add(prompt)
  manifest = {"splits": {"train": writer.close()}}
  (tmp_path / records.MANIFEST).write_text(json.dumps(manifest))
  return tmp_path


def refusal(do, *args) -> str:
  with pytest.raises(UserError) as caught:
    do(*args)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_what_is_written_is_read(folder):
  loaded = records.load(str(folder), "train")
  assert list(loaded) == PROMPTS
  assert loaded.take([np.int64(3), 0, 3]) == [PROMPTS[3], PROMPTS[0], PROMPTS[3]]
  assert loaded[-1] == PROMPTS[-1] and loaded.take([]) == []
  assert list(prompts.load_file(str(folder / "train.array_record"))) == PROMPTS
  assert sorted(os.listdir(folder)) == [records.MANIFEST, "train.array_record"]


def test_the_digest_is_that_of_the_content(folder):
  expected = hashlib.sha256()
  for prompt in PROMPTS:
    expected.update(json.dumps({**prompt.metadata, "prompt": prompt.text}).encode() + b"\n")
  assert records.load(str(folder), "train").digest() == expected.hexdigest()


def test_a_split_that_was_not_closed_leaves_nothing(tmp_path):
  writer = records.Writer(str(tmp_path), "train")
  writer.add(PROMPTS[0])
  writer.discard()
  assert not os.listdir(tmp_path)


def test_a_split_that_is_not_whole_on_the_disk_is_no_split(tmp_path, monkeypatch):
  writer = records.Writer(str(tmp_path), "train")
  writer.add(PROMPTS[0])
  monkeypatch.setattr(writer, "_writer", unittest.mock.Mock(wraps=writer._writer, write=str))
  writer.add(PROMPTS[1])
  assert "what was written is not what is there; free some space" in refusal(writer.close)


def test_a_damaged_data_set_is_refused(folder):
  path = folder / "train.array_record"
  assert "has no split 'test': use one of train" in refusal(records.load, str(folder), "test")
  whole = path.read_bytes()
  path.write_bytes(whole[:-100])
  assert "bytes and" in refusal(records.load, str(folder), "train")
  assert "cannot be read" in refusal(prompts.load_file, str(path))
  path.write_bytes(b"no record" * 100)
  assert "cannot be read" in refusal(prompts.load_file, str(path))
  path.unlink()
  assert "has 0 bytes" in refusal(records.load, str(folder), "train")
  odd = json.dumps({"splits": {"train": {"rows": 1, "bytes": [1], "sha256": "0"}}})
  for content in ("", "[]", '{"splits": {"train": {}}}', '{"splits": []}', odd, '{"a":' * 2000):
    (folder / records.MANIFEST).write_text(content)
    assert "is no manifest of prompts" in refusal(records.load, str(folder), "train")
  message = refusal(records.load, str(folder / "none"), "train")
  assert "No such file or directory): give the directory of a data set that launch/" in message


@pytest.mark.parametrize("record", [b"\xff\xfe", b'"a dog"', b'{"text": "a dog"}', b"[1]", b"3"])
def test_records_of_something_else_are_refused(tmp_path, record):
  path = str(tmp_path / "p.array_record")
  writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
  writer.write(record)
  writer.close()
  assert "holds no prompts of rlft" in refusal(prompts.load_file, path)


def test_an_empty_file_is_refused(tmp_path):
  path = str(tmp_path / "p.array_record")
  array_record_module.ArrayRecordWriter(path, "group_size:1").close()
  assert "has no prompts" in refusal(prompts.load_file, path)


def test_a_split_that_is_forgotten_is_asked_for(folder):
  message = refusal(records.load, str(folder.parent), folder.name)
  assert f"records:{folder} names no split: add one of " in message


def test_array_record_not_installed(monkeypatch, folder):
  monkeypatch.setitem(sys.modules, "array_record.python", None)
  assert "pip install array-record" in refusal(records.load, str(folder), "train")
