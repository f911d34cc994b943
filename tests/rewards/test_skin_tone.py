"""Skin tones by rule, and the parity of any classifier."""

import math

import jax
import numpy as np
import pytest

from rlft import catalog
from rlft.emoji import world
from rlft.rewards import classifiers, color, skin_tone
from rlft.types import HostReward, JaxReward, UserError

# The ten tones of the Monk scale, light to dark, and their ITA: CIELAB by scikit-image, then
# atan((L* - 50) / b*), for instance atan((55.14 - 50) / 26.75) = 10.88 degrees for the sixth.
MONK = "f6ede4 f3e7db f7ead0 eadaba d7bd96 a07e56 825c43 604134 3a312a 292420".split()
MONK_ITA = (82.99, 80.21, 71.74, 64.70, 50.32, 10.88, -20.14, -55.38, -78.34, -84.31)
MONK_CLASS = (0, 0, 0, 0, 1, 2, 2, 3, 3, 3)  # > 55, > 28, > -30, the rest
BLUE = (0.3, 0.4, 0.7)
ANGLES = (55.0, 28.0, -30.0)


def rgb(text):
  return np.array([int(text[i : i + 2], 16) for i in (0, 2, 4)], np.float32) / 255


def portraits(colours, *, size=48, background=BLUE):
  """`[B, size, size, 3]`: a square face of each colour in the middle, of 1/4 of the area."""
  images = np.full((len(colours), size, size, 3), background, np.float32)
  for image, colour in zip(images, colours, strict=True):
    image[size // 4 : -size // 4, size // 4 : -size // 4] = colour
  return images


@pytest.fixture(scope="module")
def monk():
  return portraits([rgb(colour) for colour in MONK])


@jax.jit
def measured(images):
  """`tone_probs` and, of whole faces, angles and shares."""
  colours, shares = skin_tone.skin(images, is_face=True)
  return skin_tone.tone_probs(images, ANGLES), color.typology_angle(colours), shares


def measure(images):
  """`measured`, always with the same number of images to compile for."""
  images = np.asarray(images, np.float32)
  padded = np.zeros((10, *images.shape[1:]), np.float32)
  padded[: len(images)] = images
  return (np.asarray(x)[: len(images)] for x in measured(padded))


def test_skin_is_found_or_not():
  images = portraits([rgb(MONK[0]), BLUE])
  reward = catalog.make_reward("skin-found")
  np.testing.assert_array_equal(reward.score(None, images, None), [1, 0])
  assert not reward.is_set and catalog.make_reward("skin-found?finder=skin").is_measure


def test_angles_and_classes_of_the_monk_scale(monk):
  probs, _, shares = measure(monk)
  np.testing.assert_array_equal(probs, np.eye(4)[list(MONK_CLASS)])
  np.testing.assert_allclose(shares, 0.25, atol=0.04)  # The edge is mixed with the background.
  faces = np.broadcast_to(np.stack([rgb(c) for c in MONK])[:, None, None], monk.shape)
  _, angles, shares = measure(faces)
  np.testing.assert_allclose(angles, MONK_ITA, atol=0.1)
  np.testing.assert_array_equal(shares, 1)


def test_nothing_of_the_colour_of_skin_is_no_skin():
  dots = portraits([rgb(MONK[4])])
  dots[:, :20] = BLUE
  dots[:, 24:] = BLUE  # 4 x 24 of 48 x 48 pixels are left: 4 %
  noise = np.random.RandomState(0).uniform(size=(48, 48, 3))
  flat = [np.full((48, 48, 3), colour) for colour in (BLUE, (0, 0, 0), (1, 1, 1), rgb(MONK[4]))]
  probs, _, shares = measure([*flat, noise, *dots])
  # The fourth picture is all of one colour: of its upper corners, so that it is a background.
  assert np.isnan(probs).all(axis=1).tolist() == [True] * 6
  assert shares[3] == 1 and 0.02 < shares[5] < 0.05


def test_a_wall_of_the_colour_of_other_skin_is_background():
  images = portraits([rgb(MONK[7])] * 2, background=rgb(MONK[4]))
  images[1, :, 24:] = rgb(MONK[1])  # another colour in the other corner
  images[1, 12:36, 12:36] = rgb(MONK[7])
  probs, _, _ = measure(images)
  np.testing.assert_array_equal(probs, np.eye(4)[[3, 3]])


def test_the_reward_on_sets(monk):
  reward = catalog.make_reward("skin-tone-parity")
  assert isinstance(reward, JaxReward) and reward.is_set and reward.is_measure
  empty = portraits([BLUE] * 3)
  images = np.stack(
    [
      monk[[0, 4, 5, 9]],  # one of each
      monk[[0, 1, 2, 3]],  # all very light: sqrt(9/16 + 3/16)
      np.concatenate([monk[[0, 9]], empty[:2]]),  # 1/2, 0, 0, 1/2: sqrt(4/16)
      np.concatenate([monk[:1], empty]),  # a quarter is too few
    ]
  )
  scores = jax.jit(reward.score)(reward.params, images, None).values
  np.testing.assert_allclose(scores, [0, -math.sqrt(0.75), -0.5, np.nan], atol=1e-6)
  two = catalog.make_reward("skin-tone-parity?cuts=0&credit=leave-one-out")
  assert not two.is_measure
  credit = jax.jit(two.score)(None, images, None).values
  # Of three light and a dark one, without the dark one: sqrt(1/2); all: sqrt(2) / 4.
  expected = math.sqrt(1 / 2) - math.sqrt(2) / 4
  assert credit.shape == (4, 4) and credit[0, 3] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("cuts", ["", "a/b", "28/55", "55/55", "95/0", "10/-90", "55,28"])
def test_cuts_that_do_not_fall_are_refused(cuts):
  with pytest.raises(UserError, match="cuts=.* are not falling angles"):
    skin_tone.skin_tone_parity(cuts=cuts)


def test_portraits_of_the_emoji_world():
  rng = np.random.default_rng(0)
  tones = np.arange(128) % 4
  scenes = [world.render_scene(rng, "portrait", tone=int(tone)) for tone in tones]
  images = np.stack([scene.image for scene in scenes]).astype(np.float32) / 255
  probs = np.asarray(jax.jit(lambda x: skin_tone.tone_probs(x, (66.8, 32.4, -11.8)))(images))
  assert np.isfinite(probs).all()
  # It looks at the whole picture, which may be washed out and its background beige.
  assert np.mean(probs.argmax(1) == tones) > 0.9


# Faces.


@pytest.fixture(scope="module")
def faces():
  """A photograph with a face, one without, and a smaller face at another place."""
  pytest.importorskip("cv2", reason="needs opencv-python-headless")
  data = pytest.importorskip("skimage.data", reason="needs the photographs of scikit-image")
  astronaut = data.astronaut().astype(np.float32) / 255
  moved = np.zeros_like(astronaut)
  moved[100:356, 200:456] = astronaut[::2, ::2]
  coffee = np.zeros_like(astronaut)
  coffee[:400] = data.coffee()[:, :512] / 255
  return np.stack([astronaut, coffee, moved])


def test_faces_are_found(faces):
  found = skin_tone.FaceFinder()(faces)
  assert found.shape == (3, 64, 64, 3) and found.max() <= 1
  assert (found.max(axis=(1, 2, 3)) > 0).tolist() == [True, False, True]
  _, angles, shares = measure(found)
  assert shares[0] > 0.5 and shares[1] == 0 and shares[2] > 0.5
  assert 41 < angles[0] < 75 and abs(angles[0] - angles[2]) < 8


def test_the_reward_on_faces(faces):
  reward = catalog.make_reward("skin-tone-parity?finder=face&cuts=0")
  assert isinstance(reward, HostReward) and reward.is_set
  dark = faces[0] ** 2.5 * 0.3
  images = np.stack([[faces[0], faces[1], dark], [faces[0], faces[2], faces[2]]])
  scores = reward.score(images, ["a", "b"], [{}, {}]).values
  np.testing.assert_allclose(scores, [0, -math.sqrt(0.5)], atol=1e-6)
  nothing = np.full_like(images[:1], np.nan)
  assert np.isnan(reward.score(nothing, ["a"], [{}]).values).all()


def test_without_opencv_the_remedy_is_named(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "cv2", None)
  with pytest.raises(UserError, match="pip install opencv-python-headless"):
    skin_tone.skin_tone_parity(finder="face")


# Any classifier.

CODE = """
import jax.numpy as jnp
import numpy as np
from rlft.types import JaxReward

def channels(images):
  return images.mean((1, 2))

def host_channels(images, prompts, metadata):
  assert len(images) == len(prompts) == len(metadata)
  wanted = np.array([known["bright"] for known in metadata])
  probs = images.mean((1, 2))
  probs[probs.max(1) < wanted] = np.nan
  return probs

def scores(images):
  return images.mean((1, 2, 3))

def sets(images):
  return images.mean((1, 2, 3, 4))
sets.is_set = True

def scaled(factor: float):
  return JaxReward("x", lambda params, images, _: params * images.mean((1, 2)), params=factor)
"""


@pytest.fixture
def code(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(CODE)
  return path


def colours():
  """Two sets of four: red, red, red, green; red, green, blue and black."""
  images = np.zeros((2, 4, 5, 5, 3), np.float32)
  images[0, range(4), :, :, [0, 0, 0, 1]] = 1
  images[1, range(3), :, :, [0, 1, 2]] = 1
  return images


# 3/4, 1/4, 0 less 1/3 each; then 1/2, 1/4, 1/4, as the first class gets the ties of the black one.
JAX_SCORES = [-math.sqrt(25 / 144 + 1 / 144 + 16 / 144), -math.sqrt(4 / 144 + 2 / 144)]


@pytest.mark.parametrize("end", [":channels", ":scaled?factor=2.5"])
def test_a_function_in_jax(code, end):
  kind = "factory" if "?" in end else "jax"
  reward = catalog.make_reward(f"parity?classifier={kind}:{code}{end}")
  assert isinstance(reward, JaxReward) and reward.is_set
  scores = jax.jit(reward.score)(reward.params, colours(), None).values
  np.testing.assert_allclose(scores, JAX_SCORES, atol=1e-6)


def test_a_function_on_the_host(code):
  reward = catalog.make_reward(f"parity?classifier=host:{code}:host_channels")
  assert isinstance(reward, HostReward) and reward.is_set and reward.is_measure
  metadata = [{"bright": 0.5}, {"bright": 0.5}]
  scores = reward.score(colours(), ["a", "b"], metadata).values
  # The black image is left out: 1/3 each.
  np.testing.assert_allclose(scores, [JAX_SCORES[0], 0], atol=1e-6)
  spec = f"parity?classifier=host:{code}:host_channels&credit=leave-one-out"
  reward = catalog.make_reward(spec)
  credit = reward.score(colours(), ["a", "b"], metadata).values
  assert credit.shape == (2, 4) and not reward.is_measure and np.isnan(credit[1, 3])
  # Without the green one: all of one class, sqrt(2/3).
  assert credit[0, 3] == pytest.approx(JAX_SCORES[0] + math.sqrt(2 / 3), abs=1e-6)


def test_what_a_classifier_needs_and_lists_that_it_returns(code):
  code.write_text(f"{CODE}\n\ndef lists(*x):\n  return host_channels(*x).tolist()\n\n\n")
  with code.open("a") as file:
    file.write('lists.needs = ("bright",)\n')
  arrays, lists = (
    catalog.make_reward(f"parity?classifier=host:{code}:{name}")
    for name in ("host_channels", "lists")
  )
  assert (arrays.needs, lists.needs) == ((), ("bright",))
  given = colours(), ["a", "b"], [{"bright": 0.5}, {"bright": 0.5}]
  np.testing.assert_array_equal(lists.score(*given).values, arrays.score(*given).values)


@pytest.mark.parametrize(
  ("classifier", "message"),
  [
    ("mine", "classifier=mine is no function: write host:file.py:function"),
    ("jax:{code}:sets", r"takes sets of images \(is_set\)"),
    ("jax:{code}:nothing", "has no function 'nothing'"),
  ],
)
def test_what_is_no_classifier_is_refused(code, classifier, message):
  with pytest.raises(UserError, match=message):
    classifiers.parity_of(classifier.format(code=code))


def test_scores_are_no_probabilities(code):
  reward = classifiers.parity_of(f"jax:{code}:scores")
  with pytest.raises(UserError, match=r"returned float32\[8\], expected float32\[8, A\]"):
    reward.score(None, colours(), None)
  reward = classifiers.host_parity(lambda images, *_: [0.5] * len(images), "listed")
  with pytest.raises(UserError, match=r"'listed' returned float64\[8\], expected"):
    reward.score(colours(), ["a", "b"], [{}, {}])
