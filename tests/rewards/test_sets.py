"""Scores of sets, and the credit of each image: hand-computed, masked, on devices and on hosts."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from rlft import catalog
from rlft.config.settings import EvalConfig, ScoringSettings
from rlft.evaluation.metric import MetricScorer
from rlft.parallel import sharding
from rlft.rewards import parity, sets
from rlft.rewards.scoring import scorer as scoring
from rlft.types import HostReward, JaxReward, Prompt, UserError

NAN = float("nan")
ROOT = math.sqrt


def total(features, mask):
  """Sum of the numbers in a set; NaN of the empty set."""
  return jnp.where(mask.any(), jnp.sum(features[:, 0] * mask), jnp.nan)


def spread(features, mask):
  """Largest minus smallest."""
  numbers = features[:, 0]
  return jnp.max(numbers, where=mask, initial=-1e9) - jnp.min(numbers, where=mask, initial=1e9)


def tone_parity(classes, credit):
  """Of two classes; -1: nothing to classify. `classes` is `[P, G]`."""
  probs = np.where(np.array(classes)[..., None] == [0, 1], 1.0, 0.0).astype(np.float32)
  probs[np.array(classes) < 0] = np.nan
  reward = parity.parity_reward(lambda _, images: images[:, 0, 0, :2], "p", credit=credit)
  images = np.zeros((*probs.shape[:2], 2, 2, 3), np.float32)
  images[:, :, 0, 0, :2] = probs
  found = reward.score(None, images, None)
  # What the set is worth is known beside its images' credit, and who was looked at.
  if credit != "set":
    np.testing.assert_array_equal(found.whole, tone_parity(classes, "set"))
  np.testing.assert_array_equal(found.found, np.array(classes) >= 0)
  return np.asarray(found.values)


def test_leave_one_out_credit_of_parity_by_hand():
  # Shares (3/4, 1/4): S = -sqrt(2 (1/4)^2) = -0.3536. Without one of the three: (2/3, 1/3),
  # -sqrt(2 (1/6)^2) = -0.2357, so it costs 0.1179. Without the rare one: (1, 0), -sqrt(1/2), so it
  # brings 0.3536.
  whole, common, rare = -ROOT(2) / 4, -ROOT(2) / 6, -ROOT(1 / 2)
  found = tone_parity([[0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]], "leave-one-out")
  # Even: without any one (1/3, 2/3), each brings 0.2357. All the same: nothing that one could do.
  expected = [[whole - common] * 3 + [whole - rare], [ROOT(2) / 6] * 4, [0] * 4]
  np.testing.assert_allclose(found, expected, atol=1e-6)
  assert tone_parity([[0, 0, 0, 1]], "set") == pytest.approx(whole)


def test_an_unusable_image_is_in_no_set_and_has_no_credit():
  # As (0, 0, 1) alone: S = -0.2357; without a 0 it is 0, without the 1 -0.7071.
  found = tone_parity([[0, -1, 0, 1]], "leave-one-out")
  np.testing.assert_allclose(
    found, [[-ROOT(2) / 6, NAN, -ROOT(2) / 6, ROOT(1 / 2) - ROOT(2) / 6]], atol=1e-6
  )
  # The set's score goes to all of its images.
  np.testing.assert_allclose(tone_parity([[0, -1, 0, 1]], "set"), [-ROOT(2) / 6], atol=1e-6)
  # Two of five: too few for a score, so for credit, too. Of two, exactly half: a score, but nothing
  # is left without the one.
  for credit in sets.CREDITS:
    assert np.isnan(tone_parity([[0, 1, -1, -1, -1]], credit)).all()
  assert tone_parity([[0, -1]], "set") == pytest.approx(-ROOT(1 / 2))
  assert np.isnan(tone_parity([[0, -1]], "leave-one-out")).all()


def test_credit_of_any_measure():
  features = jnp.array([[[1.0], [2.0], [7.0]], [[5.0], [5.0], [jnp.inf]]])
  np.testing.assert_allclose(sets.score_sets(features, total).values, [10, 10])
  found = sets.score_sets(features, total, credit="leave-one-out")
  np.testing.assert_allclose(found.values, [[1, 2, 7], [5, 5, NAN]])
  found = sets.score_sets(features, spread, credit="leave-one-out")
  np.testing.assert_allclose(found.values, [[6 - 5, 0, 6 - 1], [0, 0, NAN]])
  found = sets.score_sets(features, total, min_usable=0.7)
  assert np.isnan(found.values).tolist() == [False, True]


def test_gradient_with_respect_to_the_images():
  features = jnp.array([[[1.0], [2.0], [7.0], [jnp.nan]]])
  gradient = jax.grad(lambda x: jnp.nansum(sets.score_sets(x, spread).values))(features)
  np.testing.assert_allclose(gradient[0, :, 0], [-1, 0, 1, 0])
  credit = lambda x: sets.score_sets(x, spread, credit="leave-one-out").values  # noqa: E731
  gradient = jax.grad(lambda x: credit(x)[0, 2])(features)
  np.testing.assert_allclose(gradient[0, :, 0], [0, -1, 1, 0])  # (7 - 1) - (2 - 1) = 7 - 2


def test_an_unknown_credit_is_refused():
  with pytest.raises(UserError, match="credit=loo is not known: use set or leave-one-out"):
    sets.set_reward("r", lambda params, images: images, total, credit="loo")


# On a mesh.


def run(reward, images, devices, group):
  mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
  rows = NamedSharding(mesh, PartitionSpec("data"))
  with scoring.Scorer(
    reward,
    batch_size=len(images),
    images_per_prompt=group,
    batch_sharding=rows,
    timeout_s=30,
    threads=2,
  ) as scorer:
    scored = scorer.score(jax.device_put(images, rows), [Prompt("")] * len(images))
    return np.asarray(scored.values)


@pytest.mark.parametrize("credit", sets.CREDITS)
def test_one_device_and_eight_agree(credit):
  images = np.random.default_rng(0).random((40, 4, 4, 3), np.float32)  # 5 sets on 8 devices
  images[3] = np.nan

  def embed(params, images):
    return images.mean(axis=(1, 2)) @ params

  weights = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
  reward = sets.set_reward("r", embed, total, weights, credit=credit)
  one, eight = (run(reward, images, devices, 8) for devices in (1, 8))
  np.testing.assert_allclose(one, eight, atol=1e-5)
  numbers = (images.mean(axis=(1, 2)) @ weights)[:, 0].reshape(5, 8)
  expected = numbers if credit == "leave-one-out" else np.nansum(numbers, 1)[:, None].repeat(8, 1)
  np.testing.assert_allclose(one.reshape(5, 8), expected, atol=1e-5)


@pytest.mark.parametrize("kind", [HostReward, JaxReward])
def test_a_users_set_reward_may_give_each_image_its_own(kind):
  images = np.broadcast_to(np.arange(16.0, dtype=np.float32)[:, None, None, None], (16, 2, 2, 3))
  score = lambda *arrays: arrays[kind is JaxReward].mean(axis=(2, 3, 4))  # noqa: E731
  np.testing.assert_allclose(run(kind("r", score, is_set=True), images, 8, 4), range(16))
  wrong = lambda *arrays: arrays[kind is JaxReward].mean(axis=(2, 3))  # noqa: E731
  # The host's four sets are dealt to two threads.
  sizes = (2, 4) if kind is HostReward else (4, 4)
  message = rf"expected float32\[{sizes[0]}\] or float32\[{sizes[0]}, 4\]: return one number"
  with pytest.raises(scoring.RewardError, match=message):
    run(kind("r", wrong, is_set=True), images, 8, 4)
  # A reward that is not on sets has no such choice.
  with pytest.raises(scoring.RewardError, match=r"expected float32\[\d+\]: return one number for"):
    run(kind("r", lambda *_: np.zeros((16, 1), np.float32)), images, 8, 4)


def test_a_users_function_says_that_it_gives_credit(tmp_path):
  (tmp_path / "own.py").write_text(
    "def score(images):\n  return images[..., 0, 0, 0]\nscore.is_set = True\n"
    "def credit(images, prompts, metadata):\n  return images[..., 0, 0, 0]\n"
    "credit.is_set, credit.is_measure = True, False\n"
  )
  names = (f"jax:{tmp_path}/own.py:score", f"host:{tmp_path}/own.py:credit")
  score, credit = map(catalog.make_reward, names)
  assert score.is_set and score.is_measure and credit.is_set and not credit.is_measure


# As a metric.


def test_credit_is_no_metric(tmp_path):
  entry = EvalConfig("e", "emoji:portrait/test", "emoji-tone-parity?credit=leave-one-out")
  message = "--eval=name=e: .*-parity.* is the credit of images within their set.* credit=set"
  with pytest.raises(UserError, match=message):
    catalog.make_specs([entry])

  def own(images, prompts, metadata):
    return images.mean(axis=(2, 3, 4))

  rows = sharding.batch(sharding.make_mesh())
  images = np.random.default_rng(0).random((8, 2, 2, 3), np.float32)
  with (
    MetricScorer(rows=rows, scoring=ScoringSettings(reward_threads=1)) as score,
    pytest.raises(UserError, match="'own' gives the images of a set different scores"),
  ):
    score([HostReward("own", own, is_set=True)], [images], [Prompt("")] * 8, 2)
