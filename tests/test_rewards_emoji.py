"""The emoji rewards, on a stand-in for the trained network with known answers."""

import math
import sys
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft import emoji as emoji_package
from rlft import rewards
from rlft.emoji import art
from rlft.rewards import emoji
from rlft.types import UserError


class Scores(NamedTuple):
  object_probs: jax.Array
  tone_probs: jax.Array
  skin_prob: jax.Array
  vividness: jax.Array


def predict(params, images):
  """Reads its answers from the first two rows of pixels."""
  values = images[:, 0, :, 0]
  dog = jax.nn.one_hot(jnp.full(len(images), art.OBJECTS.index("dog")), len(art.OBJECTS))
  car = jax.nn.one_hot(jnp.full(len(images), art.OBJECTS.index("car")), len(art.OBJECTS))
  return Scores(
    object_probs=params * (dog * values[:, :1] + car * values[:, 1:2]),
    tone_probs=images[:, 1, :, 0],
    skin_prob=values[:, 2],
    vividness=values[:, 3],
  )


@pytest.fixture(autouse=True)
def scorer(monkeypatch):
  module = types.ModuleType("rlft.emoji.scorer")
  module.load = lambda: (None, jnp.float32(1.0))
  module.predict = predict
  monkeypatch.setitem(sys.modules, "rlft.emoji.scorer", module)
  monkeypatch.setattr(emoji_package, "scorer", module, raising=False)


def pictures(*rows):
  """Images `[B, 4, 4, 3]` whose first row of pixels is (dog, car, skin, vividness)."""
  images = np.zeros((len(rows), 4, 4, 3), np.float32)
  images[:, 0] = np.array(rows, np.float32)[..., None]
  return images


def score(name, images, metadata):
  reward = rewards.make_reward(name)
  features = reward.prepare([str(m) for m in metadata], metadata)
  return np.asarray(jax.jit(reward.score)(reward.params, images, features))


def test_objects_is_the_mean_confidence_of_the_named_objects():
  images = pictures([0.8, 0.4, 0, 0], [0.8, 0.4, 0, 0], [0.8, 0.4, 0, 0])
  metadata = [{"objects": ["dog"]}, {"objects": ["car", "dog"]}, {"objects": np.array(["cat"])}]
  np.testing.assert_allclose(score("emoji-objects", images, metadata), [0.8, 0.6, 0], atol=1e-6)


def test_preference_weighs_vividness_and_what_was_named():
  images = pictures([0.8, 0.4, 0.1, 0.6], [0.8, 0.4, 0.1, 0.6])
  metadata = [{"objects": ["dog", "car"]}, {"occupation": "cook"}]
  # .5 * .6 + .5 * (.8 + .4) / 2 and .5 * .6 + .5 * .1
  np.testing.assert_allclose(score("emoji-preference", images, metadata), [0.6, 0.35], atol=1e-6)


def test_tone_parity_leaves_out_pictures_without_skin():
  reward = rewards.make_reward("emoji-tone-parity")
  images = pictures(*[[0, 0, 0.9, 0]] * 3, [0, 0, 0.4, 0])
  images[:, 1] = np.eye(4, dtype=np.float32)[[0, 0, 1, 3], :, None]
  # Counts 2, 1, 0, 0 of 3.
  expected = -math.sqrt((2 / 3 - 1 / 4) ** 2 + (1 / 3 - 1 / 4) ** 2 + 2 / 16)
  scores = reward.score(reward.params, jnp.asarray(images[None]), None)
  np.testing.assert_allclose(scores, [expected], atol=1e-6)


def test_lists_of_objects_are_padded_to_one_shape():
  classes = emoji.object_classes(
    ["", "", ""], [{"objects": [art.OBJECTS[7], art.OBJECTS[59]]}, {"objects": "dog"}, {}]
  )
  dog = art.OBJECTS.index("dog")
  np.testing.assert_array_equal(classes, [[7, 59], [dog, -1], [-1, -1]])
  assert classes.dtype == np.int32
  confidence = emoji.named_confidence(jnp.full((3, 60), 0.5), classes)
  np.testing.assert_array_equal(confidence, [0.5, 0.5, np.nan])


@pytest.mark.parametrize(
  ("name", "metadata", "message"),
  [
    ("emoji-objects", {"objects": ["unicycle"]}, "'unicycle', which the emoji world does not have"),
    ("emoji-objects", {"objects": ["dog", "cat", "car"]}, "names 3 objects: name at most 2"),
    ("emoji-objects", {"occupation": "cook"}, "no 'objects' in its metadata"),
    ("emoji-preference", {"objects": None}, "no 'objects' or 'occupation' in its metadata"),
  ],
)
def test_prompts_that_a_reward_cannot_use(name, metadata, message):
  with pytest.raises(UserError, match=message):
    rewards.make_reward(name).prepare(["a picture"], [metadata])
