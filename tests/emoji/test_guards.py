"""What is seen of pictures of the emoji world that training by reward has spoiled."""

import jax
import numpy as np
import pytest

from rlft import catalog
from rlft.emoji import guards, prompts, world

IMAGES = 8  # of a prompt


@pytest.fixture(scope="module")
def asked():
  """Six prompts of all kinds."""
  tasks = ("single", "pair", "portrait")
  return [prompt for task in tasks for prompt in prompts.prompts(task, "test")[:2]]


def draw(prompt, rng, **how):
  """`[8, 32, 32, 3]`: scenes of a prompt."""
  known = prompt.metadata
  if "occupation" in known:
    kind, what = "portrait", {"occupation": known["occupation"]}
  else:
    kind = "object" if len(known["objects"]) == 1 else "pair"
    what = {"objects": known["objects"]}
  scenes = [world.render_scene(rng, kind, **what, **how) for _ in range(IMAGES)]
  return np.stack([scene.image for scene in scenes]) / np.float32(255)


@pytest.fixture(scope="module")
def clean(asked):
  rng = np.random.default_rng(5)
  return np.stack([draw(prompt, rng, **guards.CLEAN) for prompt in asked])


@pytest.fixture(scope="module")
def measure(asked):
  """The mean of a metric over `[6, 8, 32, 32, 3]`."""
  applied = {}

  def mean(name, images):
    if name not in applied:
      metric = catalog.make_reward(name)
      repeated = [prompt for prompt in asked for _ in range(IMAGES)]
      features = None
      if metric.prepare:
        features = metric.prepare([p.text for p in repeated], [p.metadata for p in repeated])
        if metric.is_set:
          features = features.reshape(len(asked), IMAGES, *features.shape[1:])
      applied[name] = metric, jax.jit(metric.score), features
    metric, score, features = applied[name]
    shape = images.shape if metric.is_set else (-1, *images.shape[2:])
    return float(np.mean(score(metric.params, images.reshape(shape), features)))

  return mean


def test_clean_renderings_are_at_no_distance(measure, clean):
  assert abs(measure("oracle-distance", clean)) < 0.3
  assert measure("oracle-likeness", clean) > 0.8


@pytest.mark.parametrize(
  "spoil",
  [
    lambda images: 0.35 * images + 0.4,
    lambda images: np.clip(2 * images - 0.5, 0, 1),
    lambda images: np.clip(
      images + 0.2 * np.random.default_rng(0).normal(size=images.shape), 0, 1
    ).astype(np.float32),
    lambda images: np.roll(images, 1, axis=0),
  ],
  ids=["washed out", "burnt", "grainy", "of other prompts"],
)
def test_spoiled_pictures_are_further_away(measure, clean, spoil):
  assert measure("oracle-distance", spoil(clean)) > measure("oracle-distance", clean) + 0.5
  assert measure("oracle-likeness", spoil(clean)) < measure("oracle-likeness", clean) - 0.005


def test_equal_pictures_have_no_diversity(measure, clean):
  same = clean[:, :1].repeat(IMAGES, axis=1)
  assert measure("oracle-diversity", same) == pytest.approx(1, abs=1e-3)
  assert measure("oracle-diversity", clean) > 2
  # They are further away, too, though each of them is a clean picture.
  assert measure("oracle-distance", same) > measure("oracle-distance", clean) + 0.5
  assert measure("oracle-likeness", same) > 0.8


def test_skin_is_found_in_portraits(measure, clean):
  assert measure("oracle-skin", clean[-2:].repeat(3, axis=0)) > 0.9
  assert measure("oracle-skin", np.full_like(clean, 0.5)) == 0


def test_renderings_are_the_same_each_time_and_need_a_name(asked):
  texts, known = [p.text for p in asked], [p.metadata for p in asked]
  first = guards._rendered(texts, known)
  np.testing.assert_array_equal(guards._rendered(texts[::-1], known[::-1])[::-1], first)
  assert np.isfinite(first).all()
  assert np.isnan(guards._rendered(["something"], [{}])).all()
  # A bare word stands for a list of it, as everywhere; an empty list names nothing.
  word, listed, nothing = [{"objects": "dog"}], [{"objects": ["dog"]}], [{"objects": []}]
  np.testing.assert_array_equal(guards._rendered(["x"], word), guards._rendered(["x"], listed))
  assert np.isnan(guards._rendered(["x"], nothing)).all()
  # All tones alike.
  portraits = guards.render(known[-1], np.random.default_rng(0), guards._RENDERINGS, **guards.CLEAN)
  assert len(portraits) == guards._RENDERINGS and len(np.unique(portraits, axis=0)) > 20
