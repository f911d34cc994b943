"""Which names there are."""

import pytest

from rlft import catalog
from rlft.types import UserError


def test_every_name_stands_for_a_function():
  for names in (
    catalog.ALGORITHMS,
    catalog.REWARDS,
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


@pytest.mark.parametrize("do", [catalog.load_prompts, catalog.check_prompts])
@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("none.txt", "does not exist: give a file, emoji:TASK/SPLIT"),
    ("emoji:pears/train", "unknown emoji task 'pears'"),
    ("emoji:pair", "write emoji:NAME/SPLIT"),
    ("tfds:my_prompts", "write tfds:NAME/SPLIT"),
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
