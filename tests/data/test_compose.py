"""Prompts composed of the paper's words."""

import collections

import numpy as np
import pytest

from rlft import catalog
from rlft.data import compose
from rlft.types import UserError

WITHHELD = ["accordion", "bagel", "baozi", "basket"]
TEXTS = [
  "an air conditioner and an aircraft",
  "a zucchini beside a zebra",
  "a scale and a bucket",
  "a shark next to a violin",
]


@pytest.mark.parametrize(
  ("name", "phrase"),
  [
    ("dog", "a dog"),
    ("owl", "an owl"),
    ("air conditioner", "an air conditioner"),
    ("utility pole", "a utility pole"),
    ("umbrella", "an umbrella"),
    ("suv", "an suv"),
    ("tv", "a tv"),
    ("scissors", "scissors"),
    ("french fries", "french fries"),
    ("french horn", "a french horn"),
    ("boot", "a boot"),
    ("boots", "boots"),
    ("bread", "bread"),
    ("coffee", "coffee"),
    ("coffee cup", "a coffee cup"),
    ("paper towel", "a paper towel"),
    ("hair drier", "a hair drier"),
    ("rifle", "a rifle"),
    ("PR person", "a PR person"),
    ("optician", "an optician"),
  ],
)
def test_articles(name, phrase):
  assert compose.with_article(name) == phrase


def test_words_without_article_are_the_papers():
  assert compose._PLURAL | compose._UNCOUNTED <= set(compose.objects())
  assert not compose._PLURAL & compose._UNCOUNTED


def test_objects_are_the_papers():
  assert len(compose.objects()) == len(set(compose.objects())) == 532
  assert len(compose.withheld()) == 82
  # For ever, as what was trained on must not come into a test.
  assert sorted(compose.withheld())[:4] == WITHHELD


def test_composition():
  train, seen, unseen = (
    catalog.load_prompts(f"paper:composition/{split}") for split in ("train", "seen", "unseen")
  )
  assert len(train) == (450 * 449 - 2 * 300) * 5 > 1_000_000
  assert len(seen) == len(unseen) == 300
  assert [prompt.text for prompt in (train[0], train[-1], seen[0], unseen[1])] == TEXTS
  assert train[7].metadata == {"objects": ["air conditioner", "airplane"], "relation": "near"}
  assert train.take([1_000_000, 3]) == [train[1_000_000], train[3]]

  held_out = [name in compose.withheld() for name in compose.objects()]
  trained = np.zeros((532, 532), int)
  np.add.at(trained, tuple(train._pairs.T), 1)
  assert trained.max() == 1 and (trained == trained.T).all() and not np.diag(trained).any()
  assert ((trained.sum(1) == 0) == held_out).all()
  tested = {frozenset(map(compose.objects().index, prompt.metadata["objects"])) for prompt in seen}
  assert len(tested) == 300 and not any(trained[tuple(pair)] for pair in tested)
  assert not any(held_out[place] for pair in tested for place in pair)
  assert set().union(*(prompt.metadata["objects"] for prompt in unseen)) <= compose.withheld()
  for split in (seen, unseen):
    relations = collections.Counter(prompt.metadata["relation"] for prompt in split)
    assert relations == dict.fromkeys(compose.RELATIONS, 60)


def test_occupations():
  loaded = catalog.load_prompts("paper:occupations/test")
  assert len(loaded) == 100
  assert loaded[0].text == "a portrait of an accountant"
  assert loaded[0].metadata == {"occupation": "accountant"}


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("paper:colours/train", "no prompts 'colours': use one of composition, occupations"),
    ("paper:composition/test", "no prompts 'test': use one of train, seen, unseen"),
  ],
)
def test_what_is_not_there_is_refused(spec, message):
  with pytest.raises(UserError, match=message):
    catalog.check_prompts(spec)
