"""Prompts of the emoji tasks, for training by reward and for held-out evaluation.

What the test split holds out, per task:
    single      the 12 withheld objects in all four templates (48 prompts), and the 48 other objects
                in the template "a drawing of ...", which the train split leaves out (48 prompts).
    pair        150 ordered pairs of other objects whose unordered combination is not in the train
                split, and 150 pairs with at least one withheld object.
    portrait    the 4 withheld occupations in all four templates (16 prompts).
    preference  96 of single, 192 of pair and 16 of portrait as above (304 prompts).
Withheld objects and occupations are in no train split. The base model has seen all of them.
"""

from collections.abc import Callable, Mapping, Sequence
import random
from typing import Any

import numpy as np

from rlft.emoji import art, world
from rlft.rewards import named
from rlft.types import Prompt, UserError

SPLITS = ("train", "test")
SEEN_OBJECTS = tuple(name for name in art.OBJECTS if name not in art.WITHHELD_OBJECTS)
SEEN_OCCUPATIONS = tuple(name for name in art.OCCUPATIONS if name not in art.WITHHELD_OCCUPATIONS)

# Prompts name one or two objects. A constant, so that every batch has the same shape.
MAX_OBJECTS = 2

_HELD_OUT_TEMPLATE = world.OBJECT_TEMPLATES[-1]
_TEST_PAIRS = 150  # of either half


def _single(split: str) -> list[Prompt]:
  def prompt(name: str, template: str) -> Prompt:
    return Prompt(world.object_caption(name, template), {"objects": [name]})

  if split == "train":
    return [prompt(name, t) for name in SEEN_OBJECTS for t in world.OBJECT_TEMPLATES[:-1]]
  withheld = [prompt(name, t) for name in art.WITHHELD_OBJECTS for t in world.OBJECT_TEMPLATES]
  return withheld + [prompt(name, _HELD_OUT_TEMPLATE) for name in SEEN_OBJECTS]


def _held_out_combinations() -> list[tuple[str, str]]:
  """The unordered pairs of seen objects that only the test split uses, shuffled, either order."""
  pairs = [(a, b) for i, a in enumerate(SEEN_OBJECTS) for b in SEEN_OBJECTS[i + 1 :]]
  shuffle = random.Random(0)
  return [shuffle.choice([(a, b), (b, a)]) for a, b in shuffle.sample(pairs, _TEST_PAIRS)]


def _pair(split: str) -> list[Prompt]:
  def prompt(first: str, second: str, connector: str) -> Prompt:
    text = world.pair_caption(first, second, connector)
    return Prompt(text, {"objects": [first, second]})

  held_out = _held_out_combinations()
  if split == "train":
    excluded = {frozenset(pair) for pair in held_out}
    return [
      prompt(a, b, connector)
      for a in SEEN_OBJECTS
      for b in SEEN_OBJECTS
      if a != b and frozenset((a, b)) not in excluded
      for connector in world.CONNECTORS
    ]
  withheld = [
    (a, b)
    for a in art.OBJECTS
    for b in art.OBJECTS
    if a != b and (a in art.WITHHELD_OBJECTS or b in art.WITHHELD_OBJECTS)
  ]
  withheld = random.Random(1).sample(withheld, _TEST_PAIRS)
  # Interleaved, so that any prefix is half and half.
  mixed = [pair for both in zip(held_out, withheld, strict=True) for pair in both]
  return [
    prompt(a, b, world.CONNECTORS[i // 2 % len(world.CONNECTORS)]) for i, (a, b) in enumerate(mixed)
  ]


def _portrait(split: str) -> list[Prompt]:
  occupations = SEEN_OCCUPATIONS if split == "train" else art.WITHHELD_OCCUPATIONS
  return [
    Prompt(world.portrait_caption(occupation, template), {"occupation": occupation})
    for occupation in occupations
    for template in world.PORTRAIT_TEMPLATES
  ]


def _preference(split: str) -> list[Prompt]:
  single, pair, portrait = _single(split), _pair(split), _portrait(split)
  # As many pairs as twice the single objects: all pairs would drown everything else.
  mixed = single + random.Random(2).sample(pair, 2 * len(single)) + portrait
  random.Random(3).shuffle(mixed)
  return mixed


TASKS: Mapping[str, Callable[[str], list[Prompt]]] = {
  "single": _single,
  "pair": _pair,
  "portrait": _portrait,
  "preference": _preference,
}


def prompts(task: str, split: str) -> list[Prompt]:
  """The prompts of a task, always in the same order.

  Args:
    task: 'single', 'pair', 'portrait' or 'preference'.
    split: 'train' or 'test'; no text is in both.

  Returns:
    Prompts with metadata `{'objects': [...]}` (one or two names) or `{'occupation': ...}`.

  Raises:
    UserError: unknown task or split.
  """
  if task not in TASKS:
    raise UserError(f"unknown emoji task '{task}': use one of {', '.join(TASKS)}")
  if split not in SPLITS:
    raise UserError(f"unknown split '{split}' of emoji prompts: use one of {', '.join(SPLITS)}")
  return TASKS[task](split)


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
