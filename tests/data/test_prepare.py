"""Data sets of prompts for the paper's three tasks."""

import decimal
import json
import os

import pytest

from rlft import catalog
from rlft.data import compose, prepare, splits
from rlft.types import Prompt, UserError

pytest.importorskip("array_record")


def make(output, kind="preference", source="", **changes) -> str:
  config = prepare.PrepareConfig(kind=kind, output=str(output), source=str(source), **changes)
  return prepare.run(config, catalog.load_prompts)


def texts(output, split) -> list[str]:
  return [prompt.text for prompt in catalog.load_prompts(f"records:{output}/{split}")]


def refusal(*args, **kwargs) -> str:
  with pytest.raises(UserError) as caught:
    make(*args, **kwargs)
  assert "\n" not in str(caught.value)
  return str(caught.value)


@pytest.fixture
def source(tmp_path):
  lines = [{"prompt": f"prompt {i}", "width": 512 + i} for i in range(50)]
  lines[20:20] = [{"prompt": " Prompt  7 "}, {"prompt": ""}, {"prompt": "prompt 3"}]
  path = tmp_path / "p.jsonl"
  path.write_text("\n".join(map(json.dumps, lines)))
  return path


def test_preference(tmp_path, source):
  output = tmp_path / "out"
  assert make(output, source=source, held_out=5).splitlines() == [
    f"{output}: 53 rows read, 50 kept, 1 dropped (no prompt), 2 dropped (duplicate)",
    f"  records:{output}/train: 45 prompts",
    f"  records:{output}/heldout: 5 prompts",
  ]
  told = json.loads((output / "manifest.json").read_text())
  dropped = {"no prompt": 1, "duplicate": 2}
  assert told["rows"] == {"read": 53, "kept": 50, "dropped": dropped}
  assert {split: made["rows"] for split, made in told["splits"].items()} == {
    "train": 45,
    "heldout": 5,
  }
  ordered = sorted((f"prompt {i}" for i in range(50)), key=splits.text_key)
  assert texts(output, "heldout") == ordered[:5]
  assert sorted(texts(output, "train")) == sorted(ordered[5:])
  widths = {f"prompt {i}": 512 + i for i in range(50)}
  for prompt in catalog.load_prompts(f"records:{output}/train"):
    assert prompt == Prompt(prompt.text, {"width": widths[prompt.text]})


def test_what_is_held_out_does_not_depend_on_the_order(tmp_path, source):
  make(tmp_path / "a", source=source, held_out=5)
  source.write_text("\n".join(source.read_text().splitlines()[::-1]))
  make(tmp_path / "b", source=source, held_out=5)
  assert texts(tmp_path / "a", "heldout") == texts(tmp_path / "b", "heldout")


def test_the_same_source_makes_the_same_files(tmp_path, source):
  for name in ("a", "b"):
    make(tmp_path / name, source=source, held_out=5)
  first, second = (
    {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b")
  )
  assert first == second and len(first) == 3


def test_nothing_held_out(tmp_path, source):
  make(tmp_path / "out", source=f"{source}[:4]", held_out=0)
  assert texts(tmp_path / "out", "train") == [f"prompt {i}" for i in range(4)]
  assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "train.array_record"]


def test_people(tmp_path):
  captions = [
    "a man on a bench",
    "a black man",
    "a plate",
    "a Man  on a bench",
    "two women",
    "a Thai",
  ]
  source = tmp_path / "p.csv"
  source.write_text("caption,id\n" + "\n".join(f"{text},{i}" for i, text in enumerate(captions)))
  output = tmp_path / "out"
  said = make(output, "people", f"{source}?column=caption", held_out=1).splitlines()
  assert said[0] == (
    f"{output}: 6 rows read, 2 kept, 2 dropped (a term of race, ethnicity or skin colour),"
    " 1 dropped (nobody in it), 1 dropped (duplicate)"
  )
  kept = texts(output, "train") + texts(output, "heldout")
  assert sorted(kept) == ["a man on a bench", "two women"]
  assert texts(output, "occupations")[:1] == ["a portrait of an accountant"]


def test_composition(tmp_path, monkeypatch):
  listed = [compose.composition("dog", "cat", relation) for relation in compose.RELATIONS]
  few = {"train": lambda: listed[:3], "seen": lambda: listed[3:4], "unseen": lambda: listed[4:]}
  monkeypatch.setitem(compose.SPLITS, "composition", few)
  said = make(tmp_path / "out", "composition")
  assert "5 rows read, 5 kept\n" in said
  assert list(catalog.load_prompts(f"records:{tmp_path}/out/unseen")) == listed[4:]


def test_metadata_that_json_does_not_know_become_text(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  import datetime

  from pyarrow import parquet

  day = datetime.datetime(2022, 8, 7, 22, 57)
  price = decimal.Decimal("2.00")
  table = {"prompt": ["a dog"], "timestamp": [day], "price": [price], "objects": [["dog"]]}
  parquet.write_table(pyarrow.table(table), tmp_path / "p.parquet")
  make(tmp_path / "out", source=tmp_path / "p.parquet", held_out=0)
  (prompt,) = catalog.load_prompts(f"records:{tmp_path}/out/train")
  expected = {"timestamp": "2022-08-07T22:57:00", "price": "2.00", "objects": ["dog"]}
  assert prompt.metadata == expected


def test_bytes_are_left_out_and_counted(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  pictures = [{"bytes": b"\xff\xd8", "path": "a.jpg"}, None]
  table = {"prompt": ["a dog", "a cat"], "raw": [b"x", b"y"], "image": pictures, "size": [1, 2]}
  parquet.write_table(pyarrow.table(table), tmp_path / "p.parquet")
  said = make(tmp_path / "out", source=tmp_path / "p.parquet", held_out=0)
  assert "  without raw, which holds bytes in 2 rows\n" in said
  assert "  without image, which holds bytes in 1 rows\n" in said
  found = {p.text: p.metadata for p in catalog.load_prompts(f"records:{tmp_path}/out/train")}
  assert found == {"a dog": {"size": 1}, "a cat": {"size": 2, "image": None}}
  told = json.loads((tmp_path / "out" / "manifest.json").read_text())
  assert told["left_out"] == {"raw": 2, "image": 1}


@pytest.mark.parametrize(
  ("content", "changes", "message"),
  [
    (
      "a,1\n",
      {},
      "of 1 prompts to keep, --held_out=2000 leave none to train on: give a",
    ),
    ("a,1\nb,1\n", {"held_out": 0}, "the prompt 'b' has the id 1, and so has another: correct one"),
    ("a,1\n", {"kind": "people"}, "there are no prompts to keep in this source: give another"),
    ("a,1\n", {"kind": "composition"}, "--kind=composition has words of its own: leave --source="),
  ],
)
def test_a_source_that_does_not_do_is_refused(tmp_path, content, changes, message):
  (tmp_path / "p.csv").write_text(f"prompt,id\n{content}")
  output = tmp_path / "out"
  assert message in refusal(output, source=tmp_path / "p.csv", **changes)
  assert not output.exists() or not os.listdir(output)


def test_other_mistakes(tmp_path, source):
  assert "--kind=people needs prompts: give a file with --source" in refusal(tmp_path, "people")
  message = refusal(tmp_path / "out", source=f"{source}?column=width")
  assert 'line 1 is not of the form {"width": "...", ...}' in message
  assert not (tmp_path / "out").exists()
  (tmp_path / "q.csv").write_text("prompt,text\na,b\nc,d\n")
  message = refusal(tmp_path / "out", source=f"{tmp_path}/q.csv?column=text", held_out=0)
  assert "the prompt 'b' has a column prompt beside the one that is used: rename one" in message
  make(tmp_path / "out", source=source, held_out=0)
  before = (tmp_path / "out" / "manifest.json").read_text()
  assert "has a data set already: give another --output" in refusal(tmp_path / "out", source=source)
  assert (tmp_path / "out" / "manifest.json").read_text() == before
