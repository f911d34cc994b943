"""The oracles: error rates on fresh scenes, and formulas by hand."""

import jax
import numpy as np
import pytest

from rlft.catalog import make_reward
from rlft.emoji import art, calibrate, measures, templates, world
from rlft.types import Scores, UserError

DOG, CAR, OWL = (art.OBJECTS.index(name) for name in ("dog", "car", "owl"))


def render(kind, *, seed=0, **given):
  """A scene's image `[32, 32, 3]` float32 in [0, 1]."""
  scene = world.render_scene(np.random.default_rng(seed), kind, **given)
  return scene.image.astype(np.float32) / 255


def confidence(images, ids):
  """`object_confidence` of up to 64 images and 6 objects; always the same shape to compile."""
  images, ids = np.asarray(images, np.float32), np.asarray(ids)
  padded = np.full((64, 6), -1)
  padded[: ids.shape[0], : ids.shape[1]] = ids
  images = np.concatenate([images, np.zeros((64 - len(images), *images.shape[1:]), np.float32)])
  return np.asarray(measures.object_confidence(images, padded))[: ids.shape[0], : ids.shape[1]]


@pytest.mark.parametrize("kind", ["object", "pair"])
def test_presence_error_rates(kind):
  missed, random, hidden = calibrate.presence_rates(31, kind, 192)
  assert missed <= 0.05
  assert random <= 0.05
  if kind == "pair":
    assert hidden <= 0.05


def test_presence_in_washed_out_pairs():
  rng = np.random.default_rng(32)
  scenes = [
    world.render_scene(rng, "pair", saturation=0.4, contrast=0.65, crowded=False) for _ in range(64)
  ]
  images = calibrate.degrade(rng, np.stack([scene.image for scene in scenes]))
  ids = np.array([[art.OBJECTS.index(name) for name in scene.objects] for scene in scenes])
  assert np.mean(confidence(images, ids) < 0.5) <= 0.05


def test_nothing_is_present_in_empty_pictures():
  grey, peach = np.full((32, 32, 3), 0.5), np.full((32, 32, 3), [1.0, 0.85, 0.75])
  noise = np.random.default_rng(0).random((32, 32, 3))
  images = np.stack([grey, peach, noise]).astype(np.float32)
  every_object = np.tile(np.arange(96).reshape(16, 6), (3, 1))
  assert np.max(confidence(np.repeat(images, 16, axis=0), every_object)) < 0.5
  assert np.all(measures.tone_class(images)[0] == -1)


def test_a_silhouette_of_another_colour_is_not_the_object():
  colour, alpha = art.resized("apple", 28)
  canvas = np.full((2, 32, 32, 3), 0.9, np.float32)
  for image, pixels in zip(canvas, (colour, colour[..., ::-1]), strict=True):  # red, then blue
    image[2:30, 2:30] = image[2:30, 2:30] * (1 - alpha) + pixels
  ids = np.full((2, 1), art.OBJECTS.index("apple"))
  red, blue = confidence(canvas, ids)[:, 0]
  assert red > 0.9 and blue < 0.1


def test_score_ignores_washing_and_background():
  match = jax.jit(templates.match)
  loaded = templates.load_templates()
  canvas = {"saturation": 1.0, "contrast": 1.0}, {"saturation": 0.5, "contrast": 0.7}
  images = np.stack(
    [render("object", seed=s, objects=["dog"], **c) for s in (1, 2) for c in canvas]
  )
  scores = np.asarray(match(loaded, images, np.full((4, 1), DOG)))
  assert scores.min() > 0.9


def test_padding_and_other_image_sizes():
  image = render("object", objects=["dog"])
  large = np.asarray(jax.image.resize(image, (64, 64, 3), "nearest"))
  small = confidence(image[None], np.array([[DOG, -1]]))
  assert small[0, 0] > 0.9 and small[0, 1] == 0
  assert confidence(large[None], np.array([[DOG, CAR]]))[0, 0] > 0.9


def test_tone_accuracy():
  assert calibrate.tone_accuracy(33, 960) >= 0.97


def test_most_scenes_without_people_have_no_skin():
  assert calibrate.skin_rate(34, "object", 192) < 0.4
  assert calibrate.skin_rate(35, "pair", 192) < 0.4


def test_fidelity_by_hand():
  # Luma is the sprite's own with a gain: the distance is |1 - gain| of it, whatever is behind.
  sprites, ids = templates.load_templates(), np.full((3, 1), DOG)
  colour, alpha = art.resized("dog", 28)
  images = np.empty((3, 32, 32, 3), np.float32)
  for image, gain in zip(images, (1.0, 0.6, 0.0), strict=True):
    image[:] = 0.5 + gain * (np.array([0.9, 0.8, 0.7]) - 0.5)
    image[2:30, 2:30] = (
      0.5
      + gain * (image[2:30, 2:30] * 0 + colour - 0.5 * alpha)
      + (1 - alpha) * (image[2:30, 2:30] - 0.5)
    )
  exact, faded, empty = np.asarray(templates.fidelity(sprites, images, ids))[:, 0]
  assert exact > 0.85  # templates are half a pixel softer than a rendering
  assert faded == pytest.approx(0.6, abs=0.03)
  assert empty == pytest.approx(0, abs=1e-3)


PREFERENCE = jax.jit(measures.preference)


def preference(images, ids, occupations):
  return np.asarray(
    PREFERENCE(
      np.asarray(images, np.float32),
      np.array(ids),
      np.array(occupations),
      measures.preference_params(),
    )
  )


def test_preference_ranks_the_vivid_version_first():
  images, ids, occupations = {"vivid": [], "washed": [], "burnt": []}, [], []
  for seed in range(30):
    kind = ("object", "pair", "portrait")[seed % 3]
    vivid, washed = (
      world.render_scene(np.random.default_rng(seed), kind, saturation=s, contrast=c, crowded=False)
      for s, c in ((1.0, 1.0), (0.6, 0.8))
    )
    names = [art.OBJECTS.index(name) for name in vivid.objects]
    ids.append(names + [-1] * (2 - len(names)))
    occupations.append(art.OCCUPATIONS.index(vivid.occupation) if kind == "portrait" else -1)
    images["vivid"].append(vivid.image / 255)
    images["washed"].append(washed.image / 255)
    images["burnt"].append(np.clip(0.5 + 2.2 * (vivid.image / 255 - 0.5), 0, 1))
  liked = {name: preference(x, ids, occupations) for name, x in images.items()}
  for name in ("washed", "burnt"):
    assert np.mean(liked["vivid"] > liked[name]) >= 0.95, name
  # A portrait that touches the edge gets about half: what is around it is outside of the picture.
  assert np.median(liked["vivid"]) > 0.75
  assert liked["vivid"].max() <= 1 and liked["washed"].min() >= 0


def test_preference_wants_what_was_asked_for():
  image = render("object", objects=["dog"], saturation=1.0, contrast=1.0)
  portrait = render("portrait", occupation="judge", saturation=1.0, contrast=1.0)
  cook = art.OCCUPATIONS.index("cook")
  liked = preference(
    [image, image, portrait, portrait, portrait],
    [[DOG, -1], [CAR, -1], [-1, -1], [-1, -1], [-1, -1]],
    [-1, -1, art.OCCUPATIONS.index("judge"), cook, -1],
  )
  assert liked[0] > 0.7 and liked[1] < 0.2
  assert liked[2] > 0.4 and liked[3] < 0.1
  assert np.isnan(liked[4])


def score(name, images, metadata):
  """Scores as the evaluation does, from prepared features."""
  reward = make_reward(name)
  features = reward.prepare([str(m) for m in metadata], metadata) if reward.prepare else None
  found = reward.score(reward.params, images, features)
  return np.asarray(found.values if isinstance(found, Scores) else found)


def test_object_oracles():
  both = render("pair", objects=["dog", "car"], crowded=False)
  single = render("object", objects=["dog"])
  images = np.stack([both, single, single, single])
  metadata = [{"objects": ["dog", "car"]}] * 2 + [{"objects": ["dog"]}, {"occupation": "cook"}]
  np.testing.assert_array_equal(score("oracle-both", images, metadata), [1, 0, 1, np.nan])
  np.testing.assert_array_equal(score("oracle-presence", images, metadata), [1, 0.5, 1, np.nan])
  preference = score("oracle-preference", images, metadata)
  reward = make_reward("oracle-preference")
  jitted = jax.jit(reward.score)(reward.params, images, reward.prepare([""] * 4, metadata))
  np.testing.assert_allclose(jitted, preference, atol=1e-5)


def test_parity_oracle():
  tones = {t: render("portrait", seed=t, occupation="pilot", tone=t) for t in range(4)}
  empty = np.full((32, 32, 3), 0.7, np.float32)
  images = np.stack([
    np.stack([tones[0], tones[1], tones[2], tones[3]]),  # fair: 0
    np.stack([tones[0]] * 4),  # (1, 0, 0, 0) - 1/4: sqrt(9/16 + 3/16) = 0.866
    np.stack([tones[0], tones[3], empty, empty]),  # (1/2, 0, 0, 1/2) - 1/4: sqrt(4/16) = 0.5
    np.stack([empty] * 4),
  ])  # fmt: skip
  parity = score("oracle-parity", images, [{}] * 4)
  np.testing.assert_allclose(parity, [0, 0.75**0.5, 0.5, np.nan], atol=1e-6)
  assert make_reward("oracle-parity").is_set


def test_unknown_objects_are_refused():
  prepare = make_reward("oracle-both").prepare
  np.testing.assert_array_equal(prepare(["an owl"], [{"objects": ["owl"]}]), [[OWL, -1]])
  with pytest.raises(UserError, match="dragon"):
    prepare(["a dragon"], [{"objects": ["dragon"]}])


def test_logistic_fit_recovers_its_own_model():
  rng = np.random.default_rng(0)
  x, group = rng.normal(size=20000), rng.integers(2, size=20000)
  logit = 2 * x + np.array([-1.0, 1.0])[group]
  label = rng.random(20000) < 1 / (1 + np.exp(-logit))
  slope, bias = calibrate.fit_logistic(x, group, label, 2)
  assert slope == pytest.approx(2, abs=0.1)
  np.testing.assert_allclose(bias, [-1, 1], atol=0.1)
