"""Prompts that are read when they are asked for, and mixtures of them."""

import collections

import numpy as np
import pytest

from rlft.data import shuffle, sources
from rlft.types import Prompt, UserError


class Numbered(sources.Source):
  """Prompts '0', '1', ... that remembers how often it was read."""

  def __init__(self, count: int, name: str = ""):
    self.count, self.name, self.reads = count, name, 0

  def __len__(self):
    return self.count

  def take(self, rows):
    self.reads += 1
    return [Prompt(f"{self.name}{row}") for row in rows]


def texts(prompts) -> list[str]:
  return [prompt.text for prompt in prompts]


def test_a_source_is_a_sequence():
  source = Numbered(2_500)
  assert source[3] == source[np.int64(3)] == Prompt("3")
  assert source[-1].text == "2499"
  assert texts(source[10:16:2]) == ["10", "12", "14"]
  with pytest.raises(IndexError):
    source[2_500]
  source.reads = 0
  assert texts(source) == [str(row) for row in range(2_500)]
  assert source.reads == 3  # In blocks, not one by one.


def test_a_part_reads_from_the_whole():
  part = sources.Part(Numbered(10), range(10)[2:8:3])
  assert texts(part) == ["2", "5"] and part[-1].text == "5"
  listed = sources.Part([Prompt("a"), Prompt("b")], np.array([1, 0]))
  assert texts(listed) == ["b", "a"]


def test_draws_are_those_of_a_list():
  rows = shuffle.batch_indices(3, 1, 2, count=4, size=10).tolist()
  expected = [str(row) for row in rows]
  assert texts(sources.drawn(Numbered(10), 3, 1, 2, count=4)) == expected
  listed = [Prompt(str(row)) for row in range(10)]
  assert texts(sources.drawn(listed, 3, 1, 2, count=4)) == expected


def test_places_spread_over_a_list():
  assert sources.spread(11, 3) == [0, 5, 10]
  assert sources.spread(3, 5) == [0, 1, 2]
  assert sources.spread(1, 5) == [0]


# Mixtures.


def mixture() -> sources.Mixture:
  return sources.Mixture([Numbered(6, "a"), Numbered(4, "b"), Numbered(3, "c")], [0.5, 0.3, 0.2])


def stream(count: int, start: int, stop: int, **kwargs) -> list[str]:
  source = mixture()
  batches = (
    sources.drawn(source, kwargs.get("seed", 5), kwargs.get("task", 1), i, count=count)
    for i in range(start, stop)
  )
  return [text for batch in batches for text in texts(batch)]


def test_a_mixture_has_all_prompts_one_source_after_the_other():
  assert texts(mixture()) == [f"a{i}" for i in range(6)] + [f"b{i}" for i in range(4)] + [
    f"c{i}" for i in range(3)
  ]
  assert texts(mixture().take([12, 0, 6, 0])) == ["c2", "a0", "b0", "a0"]


def test_every_batch_has_each_sources_share():
  for i in range(4):
    of_batch = collections.Counter(text[0] for text in stream(10, i, i + 1))
    assert of_batch == {"a": 5, "b": 3, "c": 2}
  # Across the end of the pattern's period, too.
  around = collections.Counter(text[0] for text in stream(20, 499, 501))
  assert around == {"a": 20, "b": 12, "c": 8}


def test_each_prompt_of_a_source_comes_once_before_one_comes_again():
  drawn = stream(10, 0, 1_200)  # 12,000 draws: more than a period.
  for name, size in (("a", 6), ("b", 4), ("c", 3)):
    own = [text for text in drawn if text[0] == name]
    for start in range(0, len(own) - size + 1, size):
      assert len(set(own[start : start + size])) == size


def test_what_a_mixture_draws_depends_on_the_position_alone():
  whole = stream(12, 0, 10)
  assert stream(12, 4, 10) == whole[48:]  # A run that goes on.
  assert stream(24, 0, 5) == whole
  assert whole not in (stream(12, 0, 10, seed=6), stream(12, 0, 10, task=2))


def test_a_weight_that_is_never_drawn_is_refused():
  with pytest.raises(UserError, match="the weight 1e-05 is less than 1 in 10,000 of .*: give that"):
    sources.Mixture([Numbered(1), Numbered(1)], [1, 0.00001])


# Digests.


def test_a_digest_tells_sources_apart():
  different = [
    Numbered(10),
    Numbered(11),
    Numbered(10, "b"),
    sources.Part(Numbered(10), range(5)),
    sources.Part(Numbered(10), range(5, 10)),
    sources.Mixture([Numbered(10), Numbered(10)], [1, 1]),
    sources.Mixture([Numbered(10), Numbered(10)], [1, 2]),
    [Prompt("a")],
    [Prompt("a", {"objects": ["a"]})],
  ]
  found = [sources.digest(source) for source in different]
  assert len(set(found)) == len(found)
  assert [sources.digest(source) for source in different] == found
