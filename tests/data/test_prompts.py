"""Prompt sources."""

import datetime
import logging
import os
import sys

import numpy as np
from PIL import Image
import pytest

from rlft.data import columns, prompts
from rlft.data import lines as lines_lib
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


def test_an_array_of_json(tmp_path, caplog):
  path = write(
    tmp_path / "p.json",
    '\ufeff[" a dog\\n", {"prompt": "a cat", "objects": ["cat"]}, "", {"prompt": " ", "n": 1}]',
  )
  with caplog.at_level(logging.WARNING):
    loaded = prompts.load_file(path)
  assert list(loaded) == [Prompt("a dog"), Prompt("a cat", {"objects": ["cat"]})]
  assert loaded.take([np.int64(1), 0]) == [loaded[1], loaded[0]]
  assert caplog.messages == [f"2 of 4 rows of {path} have no prompt and are left out"]
  assert loaded.left_out == 2
  before = loaded.digest()
  assert prompts.load_file(path).digest() == before
  write(tmp_path / "p.json", '[{"caption": "a car", "prompt": 3}]')
  (prompt,) = prompts.load_file(f"{path}?column=caption")
  assert prompt == Prompt("a car", {"prompt": 3})
  assert prompts.load_file(f"{path}?column=caption").digest() != before


def test_an_array_of_json_is_bounded(tmp_path, monkeypatch):
  path = write(tmp_path / "p.json", '["a dog"]')
  monkeypatch.setattr(lines_lib, "_MOST_JSON", 9)
  assert len(prompts.load_file(path)) == 1
  monkeypatch.setattr(lines_lib, "_MOST_JSON", 8)
  assert "an array is read as a whole: write an object a line, as .jsonl" in refusal(path)


@pytest.mark.parametrize(("suffix", "comma"), [("csv", ","), ("tsv", "\t"), ("TSV", "\t")])
def test_tables(tmp_path, suffix, comma):
  rows = [["Prompt", "Category"], ['"a dog, ""Rex"""', "animal"], ["a car"], ["", ""]]
  path = write(tmp_path / f"p.{suffix}", "\n".join(comma.join(row) for row in rows))
  assert list(prompts.load_file(path)) == [
    Prompt('a dog, "Rex"', {"Category": "animal"}),
    Prompt("a car", {"Category": None}),
  ]


@pytest.mark.parametrize(
  ("name", "content", "texts"),
  [
    # One column: a comma separates nothing.
    ("p.csv", "prompt\na dog, a car and a bell\na cat,\n", ["a dog, a car and a bell", "a cat,"]),
    ("p.csv", 'prompt\n"a dog, a car"\n12" ruler\n', ["a dog, a car", '12" ruler']),
    ("p.csv", "prompt,tag\na dog,x,,\n\n,,\na cat,y\n", ["a dog", "a cat"]),
    ("p.csv", "\ufeff\r\n prompt ,tag\r\na dog,x\r\n", ["a dog"]),
    ("p.csv", 'prompt,tag\r\n"a dog\r\non a mat",x\r\na cat,y', ["a dog\r\non a mat", "a cat"]),
    ("p.csv", "tag,prompt\nx,a dog\n", ["a dog"]),
    ("p.tsv", 'prompt\ttag\n"Hello" on a board\tx\n"Stop\ty\n', ['"Hello" on a board', '"Stop']),
    ("p.tsv", 'prompt\n"PEACE"\n12" ruler\n"\n', ['"PEACE"', '12" ruler', '"']),
    ("p.tsv", 'prompt\ttag\r\n"a ""b"""\tx\r\na cat\t\r\n', ['a "b"', "a cat"]),
    ("p.tsv", '\ufeff"prompt"\t"tag"\n"a\tb\nc"\t"x"\n"d"\t"y"\n', ["a\tb\nc", "d"]),
    ("p.jsonl", '{"prompt": " a \\"dog\\", a cat\\n"}\n', ['a "dog", a cat']),
  ],
)
def test_no_row_is_lost_or_altered(tmp_path, caplog, name, content, texts):
  with caplog.at_level(logging.WARNING):
    loaded = prompts.load_file(write(tmp_path / name, content))
  assert [prompt.text for prompt in loaded] == texts
  assert not caplog.messages


@pytest.mark.parametrize(
  ("name", "content", "prompt"),
  [
    ("p.jsonl", '{"caption": "a dog", "prompt": 3}\n', Prompt("a dog", {"prompt": 3})),
    ("p.csv", "id,Caption\n1,a dog\n", Prompt("a dog", {"id": "1"})),
    ("p.tsv", "caption\tid\na dog\t1\n", Prompt("a dog", {"id": "1"})),
  ],
)
def test_another_column(tmp_path, name, content, prompt):
  path = write(tmp_path / name, content)
  assert list(prompts.load_file(f"{path}?column=caption")) == [prompt]
  text = write(tmp_path / "p.txt", "a dog")
  assert "has no columns: leave ?column=caption out" in refusal(f"{text}?column=caption")
  odd = write(tmp_path / "p.txt?column=caption.txt", "a cat")
  assert prompts.load_file(odd)[0].text == "a cat"


@pytest.mark.parametrize(
  ("lines", "texts"),
  [
    ("a\rb\r\nc\n\rd", ["a", "b", "c", "d"]),  # Line breaks of three kinds.
    ("\u3000\n\xa0\n\u72ac\n\x01\n\x1c\n\x7f\n", ["\u72ac", "\x01", "\x7f"]),
    ("\x0b a\x0cb \u2028c\n", ["a\x0cb \u2028c"]),  # These break no line.
  ],
)
@pytest.mark.parametrize("chunk", [1, 3, 2**20])
def test_lines_are_those_of_text_mode(tmp_path, monkeypatch, lines, texts, chunk):
  monkeypatch.setattr(lines_lib, "_CHUNK", chunk)
  path = write(tmp_path / "p.txt", lines)
  with open(path) as file:
    assert [line.strip() for line in file if line.strip()] == texts
  assert [prompt.text for prompt in prompts.load_file(path)] == texts


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("p.txt", "\ufeffein Bär\r\n\nb\rc"),
    ("p.jsonl", '\ufeff{"prompt": "B\u00e4r"}\r\n\n{"prompt": "b"}\r{"prompt": "c", "d": [1]}'),
    ("p.csv", '\ufeffprompt,tag\r\n\n"B\u00e4r\n ""x""",1\r\n,\rb,2\n"c",'),
    ("p.csv", "prompt\na, B\u00e4r\n\nb,\n"),
    ("p.tsv", '\ufeff"prompt"\t"tag"\n"B\u00e4r\t\n"\t"x"\n\nb\n'),
    ("p.tsv", 'prompt\ttag\n"B\u00e4r\tx\n"b ""c"""\n'),
  ],
)
def test_any_order_reads_the_same(tmp_path, name, content):
  loaded = prompts.load_file(write(tmp_path / name, content))
  whole = list(loaded)
  assert len(whole) > 1 and "B\u00e4r" in whole[0].text
  assert [loaded[place] for place in reversed(range(len(whole)))] == whole[::-1]


def test_a_file_that_is_written_to_in_use_is_refused(tmp_path):
  path = write(tmp_path / "p.txt", "a dog\na cat")
  loaded = prompts.load_file(path)
  before = loaded.digest()
  os.replace(write(tmp_path / "new", "a car\na bus"), path)
  assert loaded[1].text == "a cat"  # Replaced: what was opened is still there.
  assert prompts.load_file(path).digest() != before == loaded.digest()
  loaded = prompts.load_file(path)
  with open(path, "a") as file:
    file.write("\na bell")
  for use in (loaded.digest, lambda: loaded[0]):
    with pytest.raises(UserError, match="p.txt was written to while it is in use: put it back"):
      use()


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("p.csv", "prompt,tag\na dog,x\n,y\n \t,z\na cat,\n"),
    ("p.tsv", "prompt\ttag\na dog\tx\n\ty\n \tz\na cat\n"),
    ("p.jsonl", '{"prompt": "a dog"}\n{"prompt": ""}\n{"prompt": "\\n"}\n{"prompt": "a cat"}\n'),
  ],
)
def test_rows_without_a_prompt_are_counted(tmp_path, caplog, name, content):
  path = write(tmp_path / name, content)
  with caplog.at_level(logging.WARNING):
    assert [prompt.text for prompt in prompts.load_file(path)] == ["a dog", "a cat"]
  assert caplog.messages == [f"2 of 4 rows of {path} have no prompt and are left out"]


def test_parquet(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  path = tmp_path / "p.parquet"
  table = {
    "prompt": [" a dog", None, " ", "a car"],
    "id": range(4),
    "objects": [["dog"], [], None, ["car"]],
    "kind": pyarrow.array(["x", "y", "x", None]).dictionary_encode(),
  }
  parquet.write_table(pyarrow.table(table), path)
  loaded = prompts.load_file(str(path))
  assert list(loaded) == [
    Prompt("a dog", {"id": 0, "objects": ["dog"], "kind": "x"}),
    Prompt("a car", {"id": 3, "objects": ["car"], "kind": None}),
  ]
  whole = path.read_bytes()
  path.unlink()
  assert loaded[1].text == "a car"  # It was unpacked.
  for damaged in (whole[:-20], whole[: len(whole) // 2], b"no parquet", b"PAR1"):
    assert "cannot be read" in refusal(write(path, damaged))
  parquet.write_table(pyarrow.table({"text": ["a dog"]}), path)
  assert "has no column 'prompt' (it has text): rename the one to use, or name it" in refusal(path)
  assert prompts.load_file(f"{path}?column=text")[0] == Prompt("a dog")
  for column in (["", None], pyarrow.array([], pyarrow.string())):
    parquet.write_table(pyarrow.table({"prompt": column}), path)
    assert "has no prompts" in refusal(path)
  bad = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
  parquet.write_table(pyarrow.table({"prompt": bad}), path)
  assert "is not UTF-8 text" in refusal(path)


def _moments(count, unit, zone=None):
  pyarrow = pytest.importorskip("pyarrow")
  return pyarrow.array([count], pyarrow.int64()).cast(pyarrow.timestamp(unit, zone))


_UTC, _NOON = datetime.UTC, (2023, 11, 14, 22, 13, 20)  # 1.7e9 s after 1970 began


@pytest.mark.parametrize(
  ("make", "value"),
  [
    # Of nanoseconds, microseconds are left.
    (lambda pa: _moments(17 * 10**17 + 1_234, "ns"), datetime.datetime(*_NOON, 1)),
    (lambda pa: _moments(17 * 10**8, "s"), datetime.datetime(*_NOON)),
    (lambda pa: pa.array([5_999], pa.duration("ns")), datetime.timedelta(microseconds=5)),
    (
      lambda pa: pa.array([3_600 * 10**9 + 5_999], pa.int64()).cast(pa.time64("ns")),
      datetime.time(1, 0, 0, 5),
    ),
    # A time zone that nobody knows: in UTC.
    (
      lambda pa: _moments(17 * 10**17 + 1_234, "ns", "Mars/Base"),
      datetime.datetime(*_NOON, 1, _UTC),
    ),
    # Beyond Python's dates: as text.
    (lambda pa: _moments(568_971_820_800, "s"), "20000-01-01 00:00:00.000"),
    (lambda pa: pa.array([2**31 - 1], pa.int32()).cast(pa.date32()), "<value out of range: "),
    (lambda pa: pa.array([2**62], pa.duration("s")), str(2**62)),
    # In lists, structures, maps and dictionaries, too.
    (
      lambda pa: pa.ListArray.from_arrays([0, 1], _moments(17 * 10**17 + 1_234, "ns")),
      [datetime.datetime(*_NOON, 1)],
    ),
    (
      lambda pa: pa.FixedSizeListArray.from_arrays(_moments(17 * 10**17 + 1_234, "ns"), 1),
      [datetime.datetime(*_NOON, 1)],
    ),
    (
      lambda pa: pa.StructArray.from_arrays(
        [_moments(568_971_820_800, "s"), pa.array([1])], ["far", "id"]
      ),
      {"far": "20000-01-01 00:00:00.000", "id": 1},
    ),
    (
      lambda pa: pa.StructArray.from_arrays(
        [_moments(17 * 10**17, "ns", "Mars/Base").dictionary_encode()], ["here"]
      ),
      {"here": datetime.datetime(*_NOON, tzinfo=_UTC)},
    ),
    (
      lambda pa: pa.MapArray.from_arrays([0, 1], ["a"], _moments(17 * 10**17 + 1_234, "ns")),
      [("a", datetime.datetime(*_NOON, 1))],
    ),
    (
      lambda pa: _moments(17 * 10**17 + 1_234, "ns").dictionary_encode(),
      datetime.datetime(*_NOON, 1),
    ),
    (
      lambda pa: pa.ListArray.from_arrays([0, 2], pa.array(["x", "x"]).dictionary_encode()),
      ["x", "x"],
    ),
    (
      lambda pa: pa.array([[{"name": "dog", "boxes": [[1.0, 2.0]]}]]),
      [{"name": "dog", "boxes": [[1, 2]]}],
    ),
  ],
)
def test_parquet_has_metadata_of_any_type(tmp_path, make, value):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  path = str(tmp_path / "p.parquet")
  parquet.write_table(pyarrow.table({"prompt": ["a dog"], "x": make(pyarrow)}), path)
  loaded = prompts.load_file(path)
  (found,) = [prompt.metadata["x"] for prompt in loaded]
  assert found == loaded[0].metadata["x"]
  assert type(found) is type(value)
  assert found == value or str(value).startswith("<") and found.startswith(value)


@pytest.mark.parametrize("values", [[0.5], [1], [[1, 2]], [b"x"], [True]])
def test_a_column_of_parquet_that_holds_no_text_is_no_prompt(tmp_path, values):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  path = tmp_path / "p.parquet"
  parquet.write_table(pyarrow.table({"prompt": ["a"], "other": values}), path)
  assert "column 'other' holds " in refusal(f"{path}?column=other")
  encoded = pyarrow.array(["a dog"]).dictionary_encode()
  parquet.write_table(pyarrow.table({"prompt": encoded}), path)
  assert [prompt.text for prompt in prompts.load_file(str(path))] == ["a dog"]


def test_parquet_that_pyarrow_cannot_give_is_refused_before_rows_are_drawn(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  path = tmp_path / "p.parquet"
  bad = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
  for column in (bad, bad.dictionary_encode(), pyarrow.ListArray.from_arrays([0, 1], bad)):
    parquet.write_table(pyarrow.table({"prompt": ["a dog"], "x": column}), path)
    assert "p.parquet, column 'x' is not UTF-8 text" in refusal(path)
  twice = pyarrow.StructArray.from_arrays([bad, bad], ["a", "a"])
  parquet.write_table(pyarrow.table({"prompt": ["a dog"], "x": twice}), path)
  assert "UTF-8" in refusal(path)
  good = pyarrow.array(["b"])
  twice = pyarrow.StructArray.from_arrays([good, good], ["a", "a"])
  parquet.write_table(pyarrow.table({"prompt": ["a dog"], "x": twice}), path)
  assert "cannot be read (a structure has two fields 'a'): write it anew" in refusal(path)


@pytest.mark.parametrize("error", [ValueError, OverflowError, "ArrowInvalid"])
def test_what_pyarrow_raises_while_rows_are_drawn_names_the_file(tmp_path, monkeypatch, error):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  path = str(tmp_path / "p.parquet")
  parquet.write_table(pyarrow.table({"prompt": ["a dog"]}), path)
  loaded = prompts.load_file(path)

  def fails(values):
    raise (getattr(pyarrow, error) if isinstance(error, str) else error)("no\nluck")

  monkeypatch.setattr(columns, "_objects", fails)
  for draw in (lambda: loaded[0], lambda: list(loaded)):
    with pytest.raises(UserError, match=r"p\.parquet cannot be read \(no luck\): write it anew"):
      draw()


def test_a_flipped_bit_of_a_page_with_a_checksum_is_found(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  path = tmp_path / "p.parquet"
  options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
  table = pyarrow.table({"prompt": ["a dog and a cat"]})
  parquet.write_table(table, path, write_page_checksum=True, **options)
  content = path.read_bytes()
  write(path, content.replace(b"a dog and", b"a dog aod", 1))
  assert "checksum" in refusal(path)


def test_rows_of_many_batches(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  path = str(tmp_path / "p.parquet")
  texts = [f"prompt {i}" if i % 3 else None for i in range(9_000)]
  parquet.write_table(pyarrow.table({"prompt": texts, "id": range(9_000)}), path)
  loaded = prompts.load_file(path)
  ids = [i for i in range(9_000) if i % 3]
  assert len(loaded) == len(ids)
  places = [0, 5_999, 2_730, 2_731, 17, 17, 4_000]
  expected = [Prompt(f"prompt {ids[place]}", {"id": ids[place]}) for place in places]
  assert loaded.take(places) == expected
  assert [prompt.metadata["id"] for prompt in loaded] == ids
  first = loaded.digest()
  texts[1] = "prompt x"
  parquet.write_table(pyarrow.table({"prompt": texts, "id": range(9_000)}), path)
  assert prompts.load_file(path).digest() != first


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
    ("p.csv", "prompt\n" + "x" * 200_000, "line 2: field larger than field limit"),
    ("p.csv", "prompt,tag\na dog, a cat,x\n", "line 2 has 3 cells and the header 2: put a text"),
    ("p.csv", 'prompt\n"a", b\n', "line 2 has 2 cells and the header 1"),
    ("p.csv", 'prompt,tag\na,x\n\n"Hi" he said,y\n', "line 4: ',' expected after"),
    ("p.csv", 'prompt,tag\na,x\n"Stop,y\nb,z\n', "line 3: unexpected end of data: a cell that"),
    ("p.csv", "id,prompt\n1,a\n2\n", "line 3 has 1 of 2 cells, and none in the column 'prompt'"),
    ("p.csv", "prompt,Prompt\na,b\n", "has two columns 'prompt': rename one of them"),
    ("p.csv", "prompt,tag,tag\na,b,c\n", "has two columns 'tag'"),
    ("p.csv", b"prompt\na\0 dog\n", "line 2 has a NUL character: convert the file to UTF-8"),
    ("p.csv", "prompt\na".encode("utf-16"), "is not UTF-8 text"),
    ("p.tsv", "prompt\na\tdog\n", "line 2 has 2 cells and the header 1: a cell cannot hold tabs"),
    (
      "p.tsv",
      'id\tprompt\n"1\n2"\ta\n',
      "line 2 has 1 of 2 cells, and none in the column 'prompt'",
    ),
    ("p.txt", "a\nb\0\n", "line 2 has a NUL character"),
    ("p.jsonl", "", "has no prompts"),
    ("p.jsonl", '{"prompt": "a"}\n{"prompt"', "line 2 is not JSON"),
    ("p.jsonl", '{"text": "a dog"}\n', 'line 1 is not of the form {"prompt": "...", ...}'),
    ("p.jsonl", '["a dog"]\n', "line 1 is not of the form"),
    ("p.jsonl", '{"prompt": 3}\n', "line 1 is not of the form"),
    ("p.jsonl", '{"prompt": null}\n', "line 1 is not of the form"),
    ("p.jsonl", '{"prompt": "\\u0000"}\n', "line 1 has a NUL character"),
    ("p.jsonl", '\n{"prompt": "\\ud83d"}\n', "line 2 has half of a character"),
    ("p.json", "", "is not JSON (Expecting value"),
    ("p.json", "[]", "has no prompts"),
    ("p.json", '{"prompt": "a"}\n{"prompt": "b"}', "or call it .jsonl if it has an object a line"),
    ("p.json", '{"prompt": "a"}', "is no JSON array: give an array of texts or objects"),
    ("p.json", "[" * 100_000, "is not JSON ("),
    ("p.json", '["a", {"text": "b"}]', 'entry 2 is neither a text nor of the form {"prompt": "...'),
    ("p.json", '[{"text": "b"}]', "(it has text): correct it, or name another key with ?column="),
    ("p.json", '["a", null]', "entry 2 is neither"),
    ("p.json", '["a", "\\u0000"]', "entry 2 has a NUL character"),
    ("p.json", '["\\ud83d"]', "entry 1 has half of a character"),
    ("p.json", b'["caf\xe9"]', "is not UTF-8 text"),
    (
      "p.doc",
      "a dog",
      "has no known suffix: use one of .txt, .jsonl, .json, .csv, .tsv, .parquet",
    ),
  ],
)
def test_a_bad_file_is_refused(tmp_path, name, content, message):
  assert message in refusal(write(tmp_path / name, content))


def test_a_source_that_does_not_exist_is_refused(tmp_path):
  assert "does not exist: give a file, emoji:TASK/SPLIT" in refusal(tmp_path / "none.txt")
  assert "is a directory" in refusal(tmp_path)
  how = "does not exist: a mixture is NUMBER*SOURCE + NUMBER*SOURCE, with spaces around the +"
  assert how in refusal("0.7*a.txt+0.3*b.txt") and how in refusal("0.7*a.txt")
  assert "does not exist: a source has one part, FILE?column=NAME[PART]" in refusal("a.txt[:1][2:]")


def test_checking_a_source_does_not_read_it(tmp_path):
  prompts.check_file(write(tmp_path / "p.txt", b"\xff"))


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
  """The folder of a data set of TFDS, as it has them: five rows with metadata and pictures."""
  tfds = pytest.importorskip("tensorflow_datasets")
  pytest.importorskip("array_record")
  folder = tmp_path_factory.mktemp("tfds")
  picture = str(folder / "a.png")
  Image.new("RGB", (2, 2)).save(picture)

  class RlftTestPrompts(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      kinds = tfds.features
      image = kinds.Image(shape=(2, 2, 3))
      features = {
        "prompt": kinds.Text(),
        "caption": kinds.Text(),
        "objects": kinds.Sequence(kinds.Text()),
        "count": np.int32,
        "box": {"corner": kinds.Tensor(shape=(2,), dtype=np.float32), "name": kinds.Text()},
        "raw": kinds.Text(),
        "image": image,
        "images": kinds.Sequence(image),
        "view": {"image": image},
      }
      return tfds.core.DatasetInfo(builder=self, features=kinds.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for i in range(5):
        yield (
          i,
          {
            "prompt": f" emoji number {i} ä\n" if i else " ",
            "caption": f"caption {i}",
            "objects": ["dog"] * i,
            "count": i,
            "box": {"corner": [0.5, 1], "name": "ä"},
            "raw": b"\xff\xfe",
            "image": picture,
            "images": [picture],
            "view": {"image": picture},
          },
        )

  builder = RlftTestPrompts(data_dir=str(folder), file_format="array_record")
  builder.download_and_prepare()
  return builder.data_dir


def test_tensorflow_datasets(tfds_folder):
  loaded = prompts.load_tfds(tfds_folder, "train")
  texts = sorted(prompt.text for prompt in loaded)
  # A row without a prompt stays: to find it, all would have to be read.
  assert texts == ["", *(f"emoji number {i} ä" for i in range(1, 5))]
  assert loaded[np.int64(2)] == loaded[2]
  assert loaded.take([4, 2]) == [loaded[4], loaded[2]]
  for name, split in ((tfds_folder, "test"), ("rlft_no_such_data_set", "train")):
    with pytest.raises(UserError, match="cannot be read"):
      prompts.load_tfds(name, split)


def test_other_features_of_tensorflow_datasets_are_metadata(tfds_folder):
  loaded = {prompt.text: prompt.metadata for prompt in prompts.load_tfds(tfds_folder, "train")}
  assert loaded["emoji number 3 ä"] == {
    "caption": "caption 3",
    "objects": ["dog", "dog", "dog"],
    "count": 3,
    "box": {"corner": [0.5, 1.0], "name": "ä"},
    "raw": b"\xff\xfe",
  }


@pytest.mark.parametrize(
  ("split", "count"),
  [
    ("train?column=caption", 5),
    ("train?column=caption[1:3]", 2),
    ("train[:40%]?column=caption", 2),
  ],
)
def test_another_feature_of_tensorflow_datasets(tfds_folder, split, count):
  loaded = prompts.load_tfds(tfds_folder, split)
  assert len(loaded) == count
  assert all(prompt.text == f"caption {prompt.metadata['count']}" for prompt in loaded)
  assert "prompt" in loaded[0].metadata


@pytest.mark.parametrize(
  ("split", "message"),
  [
    ("train[4:1]", r"train\[4:1\] are empty: give a split with at least one prompt"),
    ("train[2:2]", "cannot be read: Paths sequence can not be of 0 length"),
    ("train[9:]", "cannot be read: Requested slice"),
    ("train?column=none", r"has no column 'none' \(it has .*or name it with \?column="),
    ("train?column=count", "'count' holds [0-4], which is no text in UTF-8: name another feature"),
    ("train?column=raw", r"'raw' holds b'\\xff\\xfe', which is no text in UTF-8"),
  ],
)
def test_what_is_no_prompt_of_tensorflow_datasets_is_refused(tfds_folder, split, message):
  with pytest.raises(UserError, match=message) as error:
    prompts.load_tfds(tfds_folder, split)
  assert "\n" not in str(error.value)


def test_tensorflow_datasets_not_installed(monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  with pytest.raises(UserError, match="pip install tensorflow-datasets"):
    prompts.load_tfds("my_prompts", "train")
