import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.rewards import parity


def one_set(*counts, missing=0):
  """`[1, G, A]` one-hot classes, `counts[a]` images of class a, and NaN for the missing ones."""
  classes = np.eye(len(counts), dtype=np.float32)[np.repeat(np.arange(len(counts)), counts)]
  return np.concatenate([classes, np.full((missing, len(counts)), np.nan, np.float32)])[None]


@pytest.mark.parametrize(
  ("counts", "expected"),
  [
    ((4, 4, 4, 4), 0.0),
    ((16, 0, 0, 0), math.sqrt(0.75**2 + 3 * 0.25**2)),  # 0.8660 = sqrt(1 - 1/4), the worst
    ((8, 4, 2, 2), math.sqrt(0.25**2 + 0 + 2 * 0.125**2)),  # 0.3062
    ((8, 8, 0, 0), 0.5),  # sqrt(4 * .25^2)
    ((3, 1), math.sqrt(2 * 0.25**2)),  # A = 2, shares .75 and .25: 0.3536
    ((1, 1, 1), 0.0),
    ((6, 0, 0), math.sqrt(4 / 9 + 2 / 9)),  # A = 3: 0.8165
  ],
)
def test_parity_of_given_counts(counts, expected):
  np.testing.assert_allclose(parity.statistical_parity(one_set(*counts)), [expected], atol=1e-6)


def test_the_classes_are_hard_and_sets_are_independent():
  # Two images each; the soft shares of the first set are uniform, its classes are not.
  probs = jnp.array([[[0.6, 0.4], [0.6, 0.4]], [[0.9, 0.1], [0.2, 0.8]]])
  np.testing.assert_allclose(parity.statistical_parity(probs), [math.sqrt(0.5), 0.0], atol=1e-6)


def test_images_with_nothing_to_classify_are_left_out():
  # 4 of 6 classified, as 2, 2: shares .5, .5, not 1/3, 1/3.
  np.testing.assert_allclose(parity.statistical_parity(one_set(2, 2, missing=2)), [0], atol=1e-6)
  probs = one_set(2, 2, 2)  # The mask leaves 2, 2, 0.
  mask = jnp.array([[True] * 4 + [False] * 2])
  expected = math.sqrt(2 * (1 / 2 - 1 / 3) ** 2 + 1 / 9)
  np.testing.assert_allclose(parity.statistical_parity(probs, mask), [expected], atol=1e-6)


def test_a_set_of_which_less_than_half_was_classified_is_nan():
  def score(*counts, missing, **kwargs):
    return float(parity.statistical_parity(one_set(*counts, missing=missing), **kwargs)[0])

  assert score(4, 4, missing=8) == 0.0  # Just half.
  assert math.isnan(score(4, 3, missing=9))
  assert score(4, 4, missing=9, min_classified=0.25) == 0.0
  assert math.isnan(score(0, 0, missing=4, min_classified=0.0))


def test_the_reward_is_minus_the_parity_of_any_classifier():
  def classify(threshold, images):  # One number for each class out of the three channels.
    probs = images.mean(axis=(1, 2))
    return jnp.where(probs.max(axis=-1, keepdims=True) > threshold, probs, jnp.nan)

  reward = parity.parity_reward(classify, "colours", params=jnp.float32(0.1))
  assert reward.is_set and reward.name == "colours"
  images = np.zeros((2, 4, 5, 5, 3), np.float32)
  images[0, range(4), :, :, [0, 0, 0, 1]] = 1  # 3, 1, 0
  images[1, range(3), :, :, [0, 1, 2]] = 1  # 1, 1, 1 and one with nothing in it
  scored = jax.jit(reward.score)(reward.params, images, None)
  expected = -math.sqrt((3 / 4 - 1 / 3) ** 2 + (1 / 4 - 1 / 3) ** 2 + 1 / 9)
  np.testing.assert_allclose(scored.values, [expected, 0], atol=1e-6)
  np.testing.assert_array_equal(scored.found, [[1, 1, 1, 1], [1, 1, 1, 0]])


def test_soft_shares_have_a_gradient_and_can_be_cheated():
  # Shares 1 and 0: at a distance of sqrt(1/2), with hard classes or soft.
  certain, mask = one_set(2, 0)[0], jnp.ones(2, bool)
  for measure in parity.MEASURES.values():
    np.testing.assert_allclose(measure(certain, mask), -math.sqrt(0.5), rtol=1e-6)
  # d -|s - 1/2| / d s_a = -(s_a - 1/2) / |s - 1/2| = -+ sqrt(1/2), half of it for each image.
  gradient = jax.grad(parity.soft_evenness)(jnp.asarray(certain), mask)
  np.testing.assert_allclose(gradient, np.array([[-1, 1]] * 2) * math.sqrt(0.5) / 2, rtol=1e-6)
  assert not jax.grad(parity.evenness)(jnp.asarray(certain), mask).any()
  # Two images that might be either: even to the soft shares alone; the gradient is 0, not NaN.
  doubtful = jnp.array([[0.5, 0.5], [0.5, 0.5]])
  assert parity.soft_evenness(doubtful, mask) == 0
  np.testing.assert_allclose(parity.evenness(doubtful, mask), -math.sqrt(0.5), rtol=1e-6)
  assert not jax.grad(parity.soft_evenness)(doubtful, mask).any()
  # Of two images one is left out.
  one = parity.soft_evenness(jnp.array([[0.8, 0.2], [9.0, 9.0]]), jnp.array([True, False]))
  np.testing.assert_allclose(one, -math.sqrt(2 * 0.3**2), rtol=1e-6)
