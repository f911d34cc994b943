"""GenEval's rules on boxes that are written down, and what a detector is asked."""

import jax
import jax.numpy as jnp
import numpy as np
import owlvit_reward_cases as cases
import pytest

from rlft.rewards import geneval
from rlft.rewards.scoring import trial
from rlft.types import Prompt, UserError

DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}
QUERIES = 2 + 2 * len(geneval.COLOURS)
_judge = jax.jit(geneval.correct, static_argnames="threshold")


def seen(*objects, size=6):
  """Confidences and boxes of patches: (class 0 or 1, x, confidence, colour) for each object."""
  confidence, boxes = np.zeros((size, QUERIES), np.float32), np.full((size, 4), 0.5, np.float32)
  for row, (kind, x, sure, *colour) in enumerate(objects):
    confidence[row, kind] = sure
    boxes[row] = [x, 0.5, 0.1, 0.1]
    if colour:
      confidence[row, 2 + kind * 10 + geneval.COLOURS.index(colour[0])] = 0.2
  return confidence, boxes


def judged(objects, include, exclude=()):
  known = {"include": list(include), "exclude": list(exclude)}
  asked = geneval.features(cases.tokenizer(), ["p"], [known])
  clauses = {name: array[0] for name, array in asked.items() if name != "ids"}
  return float(_judge(*seen(*objects), clauses, threshold=0.3))


BLUE = {**DOG, "color": "blue"}
TWO, THREE = {**DOG, "count": 2}, {**DOG, "count": 3}
LEFT = {**CAT, "position": ["left of", 0]}


@pytest.mark.parametrize(
  ("objects", "include", "exclude", "expected"),
  [
    ([(0, 0.5, 0.4)], [DOG], [], 1),
    ([(0, 0.5, 0.2)], [DOG], [], 0),  # Not sure enough.
    ([(0, 0.5, 0.4)], [DOG, CAT], [], 0),
    ([(0, 0.2, 0.4), (1, 0.8, 0.4)], [DOG, CAT], [], 1),
    # The first two boxes are of one object: they share 0.09 of 0.11 of their width.
    ([(0, 0.2, 0.9), (0, 0.21, 0.8), (0, 0.5, 0.7)], [TWO], [], 1),
    ([(0, 0.2, 0.9), (0, 0.21, 0.8), (0, 0.5, 0.7)], [THREE], [], 0),
    # Exactly two are asked for, and three are there.
    ([(0, 0.2, 0.9), (0, 0.4, 0.8)], [TWO], [THREE], 1),
    (
      [(0, 0.2, 0.9), (0, 0.4, 0.8), (0, 0.6, 0.7)],
      [TWO],
      [THREE],
      0,
    ),
    ([(0, 0.5, 0.4, "blue")], [BLUE], [], 1),
    ([(0, 0.5, 0.4, "red")], [BLUE], [], 0),
    # The colour of the most confident one counts.
    ([(0, 0.2, 0.4, "blue"), (0, 0.8, 0.9, "red")], [BLUE], [], 0),
    ([(0, 0.2, 0.9, "blue"), (1, 0.8, 0.9, "red")], [BLUE, {**CAT, "color": "red"}], [], 1),
    ([(0, 0.2, 0.9, "blue"), (1, 0.8, 0.9, "red")], [BLUE, {**CAT, "color": "blue"}], [], 0),
    ([(0, 0.8, 0.9), (1, 0.2, 0.9)], [DOG, LEFT], [], 1),
    ([(0, 0.2, 0.9), (1, 0.8, 0.9)], [DOG, LEFT], [], 0),
    # Too near: an offset of 0.02 is not beyond a tenth of both widths, 0.02.
    ([(0, 0.50, 0.9), (1, 0.48, 0.9)], [DOG, LEFT], [], 0),
  ],
)
def test_what_is_correct(objects, include, exclude, expected):
  assert judged(objects, include, exclude) == expected


def test_relations():
  boxes = jnp.array([[0.5, 0.2, 0.1, 0.1], [0.2, 0.5, 0.1, 0.1]])
  middle = jnp.array([[0.5, 0.5, 0.1, 0.1]])
  found = np.asarray(geneval._related(boxes, middle))[:, :, 0]
  # In the order of RELATIONS: left, right, above, below; y grows downwards.
  np.testing.assert_array_equal(found.T, [[0, 0, 1, 0], [1, 0, 0, 0]])


def test_what_is_asked():
  asked = geneval.features(
    cases.tokenizer(),
    ["a", "b"],
    [{"include": [DOG, LEFT]}, {"include": [BLUE], "exclude": [TWO]}],
  )
  assert asked["ids"].shape == (2, QUERIES, 12)
  # The classes alone; then each class in each colour, where colours are asked for.
  assert [np.count_nonzero(row[:, 0]) for row in asked["ids"]] == [2, QUERIES]
  expected = cases.tokenizer()(["a photo of a dog", "a photo of a cat"], pad_id=0)[0]
  np.testing.assert_array_equal(asked["ids"][0, :2], expected)
  assert asked["count"].tolist() == [[1, 1], [1, 0]]
  assert asked["relation"].tolist() == [[-1, 0], [-1, -1]]
  assert asked["target"].tolist() == [[-1, 0], [-1, -1]]
  assert asked["colour"].tolist() == [[-1, -1], [geneval.COLOURS.index("blue"), -1]]
  assert asked["excluded_count"].tolist() == [[0, 0], [2, 0]]


@pytest.mark.parametrize(
  "known",
  [
    {},
    {"include": [DOG] * 3},
    {"include": [{"count": 1}]},
    {"include": [{**DOG, "color": "mauve"}]},
    {"include": [{**DOG, "position": ["left of", 0]}]},
    {"include": [DOG, {**CAT, "position": ["inside", 0]}]},
    {"include": [DOG, CAT], "exclude": [{"class": "owl", "count": 1}]},
  ],
)
def test_metadata_that_cannot_be_read(known):
  with pytest.raises(UserError, match="'p' does not say in its metadata what must be there"):
    geneval.features(cases.tokenizer(), ["p"], [known])


def test_a_detector_is_traced_and_a_threshold_is_checked():
  module, params = cases.detector("owlv2")
  reward = geneval.detector_reward(module, params, cases.tokenizer(), threshold=0.3)
  use = trial.Use("--eval", reward, [Prompt("p", {"include": [DOG, LEFT]})], 1)
  trial.try_each([use], image_shape=(13, 13, 3), timeout_s=9)
  bare = trial.Use("--eval", reward, [Prompt("q")], 1)
  with pytest.raises(UserError, match="needs 'include' or 'exclude' in the prompts' metadata"):
    trial.try_each([bare], image_shape=(13, 13, 3), timeout_s=9)
  with pytest.raises(UserError, match="threshold=1.5 must be between 0 and 1"):
    geneval.geneval_owl("nowhere", threshold=1.5)
