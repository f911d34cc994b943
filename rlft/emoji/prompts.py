"""Prompts of the emoji tasks: to train on by reward, to tune on, and to report.

Nothing is tuned on the test split, and no text is in two splits. Things that no training prompt
names are withheld; the base model has seen all of them. What the other splits hold out, by task:
    single      the withheld objects in all four templates, and half of the seen ones each in the
                template "a drawing of ...", which the train split leaves out.
    pair        150 ordered pairs of seen objects whose unordered combination is in no other split,
                and 150 pairs with at least one withheld object.
    portrait    the withheld occupations in all four templates.
    gendered    seen occupations of a man or a woman ("a portrait of a woman cook"), one for
                development and the other for test; a second kind of people prompt.
    preference  a mixture of single, pair and portrait as above.
Withheld things are the split's own: `WITHHELD_OBJECTS` and `WITHHELD_OCCUPATIONS`. 'test-seen' and
'test-unseen' are the parts of the test split without withheld things, and with them.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
import random
from typing import Any

import numpy as np

from rlft.emoji import art, world
from rlft.rewards import named
from rlft.types import Prompt, UserError

SPLITS = ("train", "development", "test", "test-seen", "test-unseen")
SEEN_OBJECTS = tuple(name for name in art.OBJECTS if name not in art.WITHHELD_OBJECTS)
SEEN_OCCUPATIONS = tuple(name for name in art.OCCUPATIONS if name not in art.WITHHELD_OCCUPATIONS)
WITHHELD_OBJECTS = {"test": art.WITHHELD_OBJECTS[:12], "development": art.WITHHELD_OBJECTS[12:]}
WITHHELD_OCCUPATIONS = {
  "test": art.WITHHELD_OCCUPATIONS[:4],
  "development": art.WITHHELD_OCCUPATIONS[4:],
}

# Prompts name one or two objects. A constant, so that every batch has the same shape.
MAX_OBJECTS = 2

_HELD_OUT_TEMPLATE = world.OBJECT_TEMPLATES[-1]
_PAIRS = 150  # held out by a split, of seen objects and again with withheld ones
_SPLIT_NUMBERS = {"test": 0, "development": 1}


@dataclasses.dataclass(frozen=True)
class _HeldOut:
  """A split's prompts: without withheld things, and with them."""

  seen: Sequence[Prompt]
  unseen: Sequence[Prompt]

  def part(self, split: str) -> list[Prompt]:
    """The prompts of `split`; of a whole one seen and unseen take turns while both last."""
    if split == "test-seen":
      return list(self.seen)
    if split == "test-unseen":
      return list(self.unseen)
    both = itertools.zip_longest(self.seen, self.unseen)
    return [prompt for pair in both for prompt in pair if prompt is not None]


def _single_prompt(name: str, template: str) -> Prompt:
  return Prompt(world.object_caption(name, template), {"objects": [name]})


def _single(split: str) -> list[Prompt]:
  if split == "train":
    return [_single_prompt(n, t) for n in SEEN_OBJECTS for t in world.OBJECT_TEMPLATES[:-1]]
  whole = _whole(split)
  seen = SEEN_OBJECTS[_SPLIT_NUMBERS[whole] :: 2]
  return _HeldOut(
    seen=[_single_prompt(name, _HELD_OUT_TEMPLATE) for name in seen],
    unseen=[
      _single_prompt(name, t) for name in WITHHELD_OBJECTS[whole] for t in world.OBJECT_TEMPLATES
    ],
  ).part(split)


def _held_out_combinations() -> list[tuple[str, str]]:
  """Unordered pairs of seen objects, shuffled and in either order: `_PAIRS` for each split."""
  pairs = list(itertools.combinations(SEEN_OBJECTS, 2))
  shuffle = random.Random(0)
  sample = shuffle.sample(pairs, _PAIRS * len(_SPLIT_NUMBERS))
  return [shuffle.choice([(a, b), (b, a)]) for a, b in sample]


def _pair_prompt(first: str, second: str, connector: str) -> Prompt:
  text = world.pair_caption(first, second, connector)
  return Prompt(text, {"objects": [first, second], "relation": connector})


def _pair(split: str) -> list[Prompt]:
  held_out = _held_out_combinations()
  if split == "train":
    excluded = {frozenset(pair) for pair in held_out}
    return [
      _pair_prompt(a, b, connector)
      for a, b in itertools.permutations(SEEN_OBJECTS, 2)
      if frozenset((a, b)) not in excluded
      for connector in world.CONNECTORS
    ]
  whole = _whole(split)
  number, withheld = _SPLIT_NUMBERS[whole], WITHHELD_OBJECTS[whole]
  seen = held_out[number * _PAIRS : (number + 1) * _PAIRS]
  unseen = [
    (a, b)
    for a, b in itertools.permutations((*SEEN_OBJECTS, *withheld), 2)
    if a in withheld or b in withheld
  ]
  unseen = random.Random(1 + number).sample(unseen, _PAIRS)

  def with_connectors(pairs):
    terms = itertools.cycle(world.CONNECTORS)
    return [_pair_prompt(a, b, term) for (a, b), term in zip(pairs, terms, strict=False)]

  return _HeldOut(with_connectors(seen), with_connectors(unseen)).part(split)


def _portrait_prompt(occupation: str, template: str, gender: str | None = None) -> Prompt:
  text = world.portrait_caption(occupation, template, gender)
  return Prompt(text, {"occupation": occupation})


def _portraits(occupations: Sequence[str]) -> list[Prompt]:
  return [
    _portrait_prompt(o, template) for o in occupations for template in world.PORTRAIT_TEMPLATES
  ]


def _portrait(split: str) -> list[Prompt]:
  if split == "train":
    return _portraits(SEEN_OCCUPATIONS)
  return _HeldOut([], _portraits(WITHHELD_OCCUPATIONS[_whole(split)])).part(split)


def _gendered(split: str) -> list[Prompt]:
  if split == "train":
    return []
  number = _SPLIT_NUMBERS[_whole(split)]
  genders = art.GENDERS[1:]
  seen = [
    _portrait_prompt(occupation, template, genders[(i + number) % 2])
    for template in world.PORTRAIT_TEMPLATES  # in the outer loop: any prefix has many occupations
    for i, occupation in enumerate(SEEN_OCCUPATIONS)
  ]
  return _HeldOut(seen, []).part(split)


def _preference(split: str) -> list[Prompt]:
  single, pair, portrait = _single(split), _pair(split), _portrait(split)
  # As many pairs as twice the single objects: all pairs would drown everything else.
  mixed = single + random.Random(2).sample(pair, min(len(pair), 2 * len(single))) + portrait
  random.Random(3).shuffle(mixed)
  return mixed


def _whole(split: str) -> str:
  """'test' for its parts, too."""
  return split.partition("-")[0]


TASKS: Mapping[str, Callable[[str], list[Prompt]]] = {
  "single": _single,
  "pair": _pair,
  "portrait": _portrait,
  "gendered": _gendered,
  "preference": _preference,
}


def prompts(task: str, split: str) -> list[Prompt]:
  """The prompts of a task, always in the same order.

  Args:
    task: a key of `TASKS`.
    split: one of `SPLITS`.

  Returns:
    Prompts with metadata `{'objects': [...]}` (one or two names, of two also the `relation`), or
    `{'occupation': ...}`.

  Raises:
    UserError: unknown task or split, or a task that has no prompts in this split.
  """
  if task not in TASKS:
    raise UserError(f"unknown emoji task '{task}': use one of {', '.join(TASKS)}")
  if split not in SPLITS:
    raise UserError(f"unknown split '{split}' of emoji prompts: use one of {', '.join(SPLITS)}")
  found = TASKS[task](split)
  if not found:
    raise UserError(f"emoji:{task} has no prompts in the split '{split}': use another split")
  return found


def object_classes(prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> np.ndarray:
  """Class indices of the objects named in each prompt.

  Returns:
    `[B, MAX_OBJECTS]` int32, indices into `rlft.emoji.art.OBJECTS`, filled up with -1.

  Raises:
    UserError: an object that is not in the emoji world, or too many of them.
  """
  index = {name: i for i, name in enumerate(art.OBJECTS)}
  classes = np.full((len(prompts), MAX_OBJECTS), -1, np.int32)
  for row, (prompt, known) in enumerate(zip(prompts, metadata, strict=True)):
    names = named.names(known, "objects")
    if len(names) > MAX_OBJECTS:
      raise UserError(
        f"the prompt {prompt!r} names {len(names)} objects: name at most {MAX_OBJECTS}"
      )
    if unknown := [name for name in names if name not in index]:
      raise UserError(
        f"the prompt {prompt!r} names {unknown[0]!r}, which the emoji world does not have:"
        " use the names in rlft.emoji.art.OBJECTS"
      )
    classes[row, : len(names)] = [index[name] for name in names]
  return classes


def occupations(prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> np.ndarray:
  """The occupation that each prompt's metadata names.

  Returns:
    `[B]` int32, indices into `rlft.emoji.art.OCCUPATIONS`; -1 where there is none.

  Raises:
    UserError: an occupation that is not in the emoji world.
  """
  found = np.full(len(prompts), -1, np.int32)
  for i, (prompt, known) in enumerate(zip(prompts, metadata, strict=True)):
    name = known.get("occupation")
    if name is None:
      continue
    if name not in art.OCCUPATIONS:
      raise UserError(
        f"the prompt {prompt!r} names {name!r}, which the emoji world does not have: use the names"
        " in rlft.emoji.art.OCCUPATIONS"
      )
    found[i] = art.OCCUPATIONS.index(name)
  return found
