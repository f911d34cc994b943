"""Prompt sources."""

import sys

import numpy as np
import pytest

from rlft.data import prompts
from rlft.types import Prompt, UserError


def refusal(spec) -> str:
  with pytest.raises(UserError) as caught:
    prompts.load_file(str(spec))
  assert "\n" not in str(caught.value)
  return str(caught.value)


def write(path, content) -> str:
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(path)


# Sources.


def test_a_line_a_prompt(tmp_path):
  path = write(tmp_path / "p.txt", "\ufeffa dog\r\n\n  a car \nein Bär")
  loaded = prompts.load_file(path)
  assert list(loaded) == [Prompt("a dog"), Prompt("a car"), Prompt("ein Bär")]
  assert loaded[1:] == [Prompt("a car"), Prompt("ein Bär")]
  assert loaded[-1].text == "ein Bär"


def test_json_lines_carry_metadata(tmp_path):
  path = write(
    tmp_path / "p.jsonl",
    '{"prompt": "a dog and a car", "objects": ["dog", "car"]}\n\n{"prompt": "a cat"}\n',
  )
  assert list(prompts.load_file(path)) == [
    Prompt("a dog and a car", {"objects": ["dog", "car"]}),
    Prompt("a cat"),
  ]


@pytest.mark.parametrize(("suffix", "comma"), [("csv", ","), ("tsv", "\t"), ("TSV", "\t")])
def test_tables(tmp_path, suffix, comma):
  rows = [["Prompt", "Category"], ['"a dog, ""Rex"""', "animal"], ["", "none"], ["a car"]]
  path = write(tmp_path / f"p.{suffix}", "\n".join(comma.join(row) for row in rows))
  assert list(prompts.load_file(path)) == [
    Prompt('a dog, "Rex"', {"Category": "animal"}),
    Prompt("a car", {"Category": None}),
  ]


def test_parquet(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  path = tmp_path / "p.parquet"
  parquet.write_table(
    pyarrow.table({"prompt": ["a dog", None, " ", "a car"], "id": range(4)}), path
  )
  assert list(prompts.load_file(str(path))) == [Prompt("a dog"), Prompt("a car")]
  parquet.write_table(pyarrow.table({"text": ["a dog"]}), path)
  assert "has no column 'prompt' (it has text)" in refusal(path)
  write(path, "no parquet")
  assert "cannot be read" in refusal(path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  assert "pip install pyarrow" in refusal(write(tmp_path / "p.parquet", "x"))


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("p.txt", "", "has no prompts: give a file with at least one"),
    ("p.txt", "\n \n", "has no prompts"),
    ("p.txt", b"caf\xe9\n", "is not UTF-8 text"),
    ("p.csv", "", "has no prompts"),
    ("p.csv", "prompt\n", "has no prompts"),
    ("p.csv", "text,tag\na dog,x\n", "has no column 'prompt' (it has text, tag): rename"),
    ("p.csv", b"prompt\ncaf\xe9\n", "is not UTF-8 text"),
    ("p.csv", "prompt\n" + "x" * 200_000, "after line 1: field larger than field limit"),
    ("p.jsonl", "", "has no prompts"),
    ("p.jsonl", '{"prompt": "a"}\n{"prompt"', "line 2 is not JSON"),
    ("p.jsonl", '{"text": "a dog"}\n', 'line 1 is not of the form {"prompt": "...", ...}'),
    ("p.jsonl", '["a dog"]\n', "line 1 is not of the form"),
    ("p.jsonl", '{"prompt": 3}\n', "line 1 is not of the form"),
    ("p.doc", "a dog", "has no known suffix: use one of .txt, .jsonl, .csv, .tsv, .parquet"),
  ],
)
def test_a_bad_file_is_refused(tmp_path, name, content, message):
  assert message in refusal(write(tmp_path / name, content))


def test_a_source_that_does_not_exist_is_refused(tmp_path):
  assert "does not exist: give a file, emoji:TASK/SPLIT" in refusal(tmp_path / "none.txt")
  assert "is a directory" in refusal(tmp_path)


def test_checking_a_source_does_not_read_it(tmp_path):
  prompts.check_file(write(tmp_path / "p.txt", b"\xff"))


def test_tensorflow_datasets(tmp_path):
  tfds = pytest.importorskip("tensorflow_datasets")
  pytest.importorskip("array_record")

  class RlftTestPrompts(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = tfds.features.FeaturesDict({"prompt": tfds.features.Text()})
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for i in range(5):
        yield i, {"prompt": f"emoji number {i} ä"}

  builder = RlftTestPrompts(data_dir=str(tmp_path), file_format="array_record")
  builder.download_and_prepare()
  loaded = prompts.load_tfds(builder.data_dir, "train")
  assert sorted(prompt.text for prompt in loaded) == [f"emoji number {i} ä" for i in range(5)]
  assert loaded[np.int64(2)] == loaded[2]
  for name, split in ((builder.data_dir, "test"), ("rlft_no_such_data_set", "train")):
    with pytest.raises(UserError, match="cannot be read"):
      prompts.load_tfds(name, split)


def test_tensorflow_datasets_not_installed(monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  with pytest.raises(UserError, match="pip install tensorflow-datasets"):
    prompts.load_tfds("my_prompts", "train")
