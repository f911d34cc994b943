"""Prompts that the paper composes of words: two objects, and portraits of occupations.

The words are the paper's (arXiv 2401.12244, appendix), in `rlft/data/words`.
"""

from collections.abc import Sequence
import functools
import itertools
import pathlib

import numpy as np

from rlft.data import splits
from rlft.data.sources import Source
from rlft.types import Prompt, UserError

_WORDS = pathlib.Path(__file__).parent / "words"
OCCUPATIONS = "occupations"
RELATIONS = ("and", "next to", "near", "on side of", "beside")
_WITHHELD = 82  # of the 532 objects
_TEST_PROMPTS = 300  # of seen objects, and of unseen ones

# Words without an article: those in the plural, and those that are not counted.
_PLURAL = frozenset(
  "binoculars,boots,chips,chopsticks,dates,dice,earrings,french fries,glasses,goggles,green beans"
  ",green vegetables,headphones,high heels,jeans,meat balls,nuts,sandals,scissors,slippers,sneakers"
  ",stairs,sunglasses,trousers".split(",")
)
_UNCOUNTED = frozenset(
  "asparagus,bar soap,bread,broccoli,candy,cheese,coffee,corn,crosswalk zebra,garlic,ice cream"
  ",juice,lavender,lettuce,liquid soap,luggage,okra,pasta,popcorn,rice,shellfish,sushi,swimwear"
  ",tape,tea,tissue,toothpaste,wine".split(",")
)
_LIKE_CONSONANTS = ("uni", "use", "util", "euro", "one")  # words that are spoken with one
_SPELLED_LIKE_VOWELS = ("suv",)  # abbreviations that are spoken letter by letter


class Compositions(Source):
  """Ordered pairs of objects, each with all relations, in the order of the pairs."""

  def __init__(self, pairs: np.ndarray):
    """Takes `[N, 2]` places in the list of objects."""
    self._pairs = pairs

  def __len__(self) -> int:
    return len(self._pairs) * len(RELATIONS)

  def take(self, rows: Sequence[int]) -> list[Prompt]:
    names = objects()
    places = (divmod(row, len(RELATIONS)) for row in rows)
    return [
      composition(*(names[i] for i in self._pairs[pair]), RELATIONS[relation])
      for pair, relation in places
    ]


def words(name: str) -> tuple[str, ...]:
  """The lines of a list of words, without empty ones and comments."""
  lines = (_WORDS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
  return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))


@functools.cache
def objects() -> tuple[str, ...]:
  """The 532 classes; of one with two names, the first."""
  return tuple(line.partition(",")[0] for line in words("objects"))


def with_article(name: str) -> str:
  """'dog' -> 'a dog', 'owl' -> 'an owl', 'scissors' and 'bread' as they are."""
  if name in _PLURAL or name in _UNCOUNTED:
    return name
  like_vowel = name[0] in "aeiou" and not name.startswith(_LIKE_CONSONANTS)
  return f"{'an' if like_vowel or name in _SPELLED_LIKE_VOWELS else 'a'} {name}"


def composition(first: str, second: str, relation: str) -> Prompt:
  """The prompt of two objects, with their names as metadata."""
  text = f"{with_article(first)} {relation} {with_article(second)}"
  return Prompt(text, {"objects": [first, second], "relation": relation})


@functools.cache
def withheld() -> frozenset[str]:
  """The 82 objects that are in no training prompt."""
  return frozenset(
    sorted(objects(), key=lambda name: splits.text_key(f"withheld {name}"))[:_WITHHELD]
  )


def _pairs(names: Sequence[str], purpose: str) -> list[tuple[str, str]]:
  """Test pairs of these objects, a combination once, in either order; the same for ever."""

  def key(pair: tuple[str, str]) -> bytes:
    return splits.text_key(f"{purpose} {' and '.join(pair)}")

  chosen = sorted(itertools.combinations(sorted(names), 2), key=key)[:_TEST_PROMPTS]
  return [pair if key(pair)[-1] % 2 else pair[::-1] for pair in chosen]


@functools.cache
def _seen_pairs() -> tuple[tuple[str, str], ...]:
  return tuple(_pairs([name for name in objects() if name not in withheld()], "seen"))


def _train() -> Source:
  place = {name: i for i, name in enumerate(objects())}
  excluded = np.zeros((len(place), len(place)), bool)
  for name in withheld():
    excluded[place[name]] = excluded[:, place[name]] = True
  for first, second in _seen_pairs():
    excluded[place[first], place[second]] = excluded[place[second], place[first]] = True
  np.fill_diagonal(excluded, True)
  return Compositions(np.argwhere(~excluded))


def _test(pairs: Sequence[tuple[str, str]]) -> list[Prompt]:
  relations = itertools.cycle(RELATIONS)
  return [composition(*pair, relation) for pair, relation in zip(pairs, relations, strict=False)]


SPLITS = {
  "composition": {
    "train": _train,
    "seen": lambda: _test(_seen_pairs()),
    "unseen": lambda: _test(_pairs(sorted(withheld()), "unseen")),
  },
  OCCUPATIONS: {
    "test": lambda: [
      Prompt(f"a portrait of {with_article(name)}", {"occupation": name})
      for name in words(OCCUPATIONS)
    ],
  },
}


def load(name: str, split: str) -> Sequence[Prompt]:
  """Prompts of the paper, always in the same order.

  Args:
    name: 'composition' or 'occupations'.
    split: of composition, 'train' (450 objects, over a million prompts), 'seen' (300 prompts of
      these objects, in combinations that are not in 'train') or 'unseen' (300 of the 82 others);
      of occupations, 'test' (100 portraits).

  Returns:
    Prompts with metadata `{'objects': [...], 'relation': ...}` or `{'occupation': ...}`.

  Raises:
    UserError: there are none of this name.
  """
  for word, known in ((name, SPLITS), (split, SPLITS.get(name, {}))):
    if word not in known:
      raise UserError(
        f"paper:{name}/{split}: there are no prompts '{word}': use one of {', '.join(known)}"
      )
  return SPLITS[name][split]()
