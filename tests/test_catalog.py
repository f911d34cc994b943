"""Which names there are."""

import pytest

from rlft import catalog
from rlft.config.settings import EvalConfig
from rlft.models.files import single_file, sources
from rlft.storage import files
from rlft.types import UserError


def test_every_name_stands_for_a_function():
  for names in (
    catalog.ALGORITHMS,
    catalog.DISTANCES,
    catalog.REWARDS,
    catalog.SUITES,
    catalog.ORACLES,
    catalog.PROMPTS,
    catalog.PAIRS,
  ):
    for address in names.values():
      assert callable(catalog._function(address)), address


def test_an_unknown_reward_is_refused():
  match = r"'oracle-party': there is none of this name \(did you mean 'oracle-parity'\?\): use one"
  with pytest.raises(UserError, match=match):
    catalog.make_reward("oracle-party")
  match = "'qqq': there is none of this name: use one of .*jpeg, .*oracle-parity, .*, your own"
  with pytest.raises(UserError, match=match):
    catalog.make_reward("qqq")


# Prompts and pairs.


def test_emoji_prompts():
  loaded = catalog.load_prompts("emoji:pair/train")
  assert len(loaded) > 1000
  assert len(loaded[0].metadata["objects"]) == 2


def test_prompts_in_a_file(tmp_path):
  (tmp_path / "p.txt").write_bytes(b"\xff")
  catalog.check_prompts(str(tmp_path / "p.txt"))  # Checking reads no file.
  (tmp_path / "p.txt").write_text("a dog")
  assert catalog.load_prompts(str(tmp_path / "p.txt"))[0].text == "a dog"


def test_parts_and_mixtures_of_prompts(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ("p.txt", "odd[:1].txt", "1*p.txt + 2*p.txt"):
    (tmp_path / name).write_text("a\nb\nc")
  (tmp_path / "p.csv").write_text("id,text\n1,d\n2,e\n")

  def texts(spec):
    catalog.check_prompts(spec)
    return [prompt.text for prompt in catalog.load_prompts(spec)]

  assert texts("p.txt[-2:]") == texts("odd[:1].txt[1:]") == ["b", "c"]
  assert texts("1*p.txt + 2*p.txt") == ["a", "b", "c"]  # A file of this name.
  assert texts("p.csv?column=text[1:]") == ["e"]
  assert texts("emoji:pair/test[:2]") == texts("emoji:pair/test")[:2]
  assert texts("2*p.txt[:1] + 1*p.csv?column=text") == ["a", "d", "e"]
  # TFDS cuts its own splits by places.
  assert catalog._parted("tfds:a/b[:5]") == ("tfds:a/b[:5]", "")
  assert catalog._parted("tfds:a/b[heldout]") == ("tfds:a/b", "heldout")
  assert catalog._parted("tfds:a/b?column=c[rest]") == ("tfds:a/b?column=c", "rest")


def test_a_file_is_read_once_while_it_stays_as_it_is(tmp_path, caplog):
  path = tmp_path / "p.csv"
  path.write_text("prompt,tag\na,1\n,2\nb,3\n")
  for part in ("", "[:1]", "[1:]"):
    catalog.load_prompts(f"{path}{part}")
  assert len(caplog.messages) == 1 and "1 of 3 rows" in caplog.text
  path.write_text("prompt\nanother\n")
  assert [prompt.text for prompt in catalog.load_prompts(str(path))] == ["another"]


def test_prompts_from_another_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "start" / "set").mkdir(parents=True)
  (tmp_path / "start" / "p.txt").write_text("a")
  start = str(tmp_path / "start")
  for spec, expected in (
    ("p.txt", f"{start}/p.txt"),
    ("p.txt[:5]", f"{start}/p.txt[:5]"),
    ("p.txt?column=a", f"{start}/p.txt?column=a"),
    ("records:set/train[:5]", f"records:{start}/set/train[:5]"),
    ("emoji:pair/test", "emoji:pair/test"),
    ("q.txt", "q.txt"),
  ):
    assert catalog.prompts_from(spec, start) == expected
  (tmp_path / "p.txt").write_text("b")
  assert catalog.prompts_from("p.txt[:5]", start) == "p.txt[:5]"


def test_a_mixture_is_nothing_to_evaluate_on(tmp_path):
  (tmp_path / "p.txt").write_text("a")
  mixed = f"1*{tmp_path}/p.txt + 1*emoji:pair/test"
  entry = EvalConfig(name="e", prompts=mixed, metric="jpeg")
  with pytest.raises(UserError, match="--eval=name=e: prompts=.* is a mixture, of which"):
    catalog.make_specs([entry])


@pytest.mark.parametrize("do", [catalog.load_prompts, catalog.check_prompts])
@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("none.txt", "does not exist: give a file, emoji:TASK/SPLIT"),
    ("emoji:pears/train", "unknown emoji task 'pears'"),
    ("emoji:pair", "write emoji:NAME/SPLIT"),
    ("tfds:my_prompts", "write tfds:NAME/SPLIT"),
    ("emoji:pair/train[train]", r"\[train\] is no part of a source: write e.g."),
    ("records:none/train", "none/manifest.json cannot be read"),
    ("1*none.txt + 1*emoji:pair/train", "none.txt does not exist"),
    ("none.txt + 1*emoji:pair/train", "'none.txt' has no weight above 0"),
  ],
)
def test_prompts_that_are_not_there_are_refused(do, spec, message):
  with pytest.raises(UserError, match=message):
    do(spec)


def test_emoji_pairs_are_a_function_of_the_seed():
  catalog.check_pairs("emoji")
  loaded = catalog.load_pairs("emoji", size=(32, 32), seed=3, count=8)
  assert len(loaded) == 8
  images, sources = loaded.read(range(8))
  assert images.shape == (8, 32, 32, 3)
  assert sources.tolist() == [[32, 32, 0, 0]] * 8
  again = catalog.load_pairs("emoji", size=(32, 32), seed=3, count=8)
  assert (again.read([5, 0])[0] == images[[5, 0]]).all()
  assert list(again.captions) == list(loaded.captions)
  with pytest.raises(UserError, match="images of 32 pixels but the model draws 32x64"):
    catalog.load_pairs("emoji", size=(32, 64))


def test_pairs_that_are_not_there_are_refused(tmp_path):
  for do in (catalog.check_pairs, lambda spec: catalog.load_pairs(spec, size=(8, 8))):
    with pytest.raises(UserError, match="has no metadata.jsonl"):
      do(str(tmp_path))


def test_a_set_is_not_measured_on_one_image():
  entry = EvalConfig(name="p", prompts="emoji:portrait/test", metric="oracle-parity", images=8)
  with pytest.raises(UserError, match="--eval=name=p: .* as a set: give images_per_prompt"):
    catalog.make_specs([entry])


def test_a_distance_is_no_reward():
  with pytest.raises(UserError, match="cmmd is a distance .* launch/evaluate.py measures"):
    catalog.make_reward("cmmd?weights=a&real=b")


@pytest.mark.parametrize(
  "read",
  [
    catalog.load_prompts,
    lambda path: files.path_of(path).read_text(),
    lambda path: open(files.staged(path)).read(),
    lambda path: sources.open_file(path, "b.txt"),
    single_file.parse,
  ],
)
def test_a_path_may_begin_with_the_users_directory(tmp_path, monkeypatch, read):
  monkeypatch.setenv("HOME", str(tmp_path))
  for name in ("a.txt", "b.txt", "a.safetensors"):
    (tmp_path / name).write_text("a dog")
  assert read("~/a.safetensors" if read is single_file.parse else "~/a.txt")


def test_the_directory_of_a_user_who_is_unknown_is_one_line():
  path = "~nobody-of-this-name/a"
  assert str(files.path_of(path)) == path
  for read in (catalog.load_prompts, lambda path: sources.open_file(path, "b.txt")):
    with pytest.raises(UserError, match="nobody-of-this-name"):
      read(path)
