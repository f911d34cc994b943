"""Measures of diversity: by hand, against numpy, with masks, and their gradients."""

import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft import rewards
from rlft.catalog import make_reward
from rlft.rewards import diversity, sets
from rlft.types import UserError

ALL = jnp.ones(4, bool)
# Two equal, one orthogonal to them, one opposite to that.
MIXED = jnp.array([[3.0, 0], [1, 0], [0, 2], [0, -1]])


@pytest.fixture(scope="module")
def random():
  """`[6, 5]` embeddings and a mask that leaves four."""
  features = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
  return features, np.array([1, 0, 1, 1, 0, 1], bool)


def by_numpy(features):
  """Mean pairwise distance and Vendi score of `[n, F]`, in float64."""
  unit = features.astype(np.float64)
  unit /= np.linalg.norm(unit, axis=1, keepdims=True)
  kernel = unit @ unit.T
  values = np.linalg.eigvalsh(kernel / len(unit))
  values = values[values > 1e-12]
  above = np.triu_indices(len(unit), 1)
  return (1 - kernel)[above].mean(), math.exp(-(values * np.log(values)).sum())


@pytest.mark.parametrize(
  ("features", "distance", "vendi"),
  [
    (jnp.ones((4, 3)) * jnp.arange(1.0, 5)[:, None], 0, 1),  # All point the same way.
    (jnp.eye(4), 1, 4),  # Orthogonal.
    # Six pairs: 0 + 4 * 1 + 2. Eigenvalues of K / 4: 1/2, 1/2 (each block is rank one), 0, 0.
    (MIXED, 1, 2),
    # Three equal, one orthogonal: 3 * 0 + 3 * 1 of six; eigenvalues 3/4, 1/4.
    (jnp.eye(2)[jnp.array([0, 0, 0, 1])], 0.5, 4 / 3**0.75),
    # Opposite pairs on one line: 2 * 0 + 4 * 2 of six, the most that n = 4 allows: n / (n - 1).
    (jnp.array([[1.0], [1], [-1], [-1]]), 4 / 3, 1),
  ],
)
def test_by_hand(features, distance, vendi):
  assert diversity.pairwise_distance(features, ALL) == pytest.approx(distance, abs=1e-6)
  assert diversity.vendi(features, ALL) == pytest.approx(vendi, abs=1e-5)


def test_against_numpy_with_and_without_a_mask(random):
  features, mask = random
  for chosen in (mask, np.ones(6, bool)):
    # What is masked may hold anything.
    given = np.where(chosen[:, None], features, 1e6)
    found = diversity.pairwise_distance(given, chosen), diversity.vendi(given, chosen)
    np.testing.assert_allclose(found, by_numpy(features[chosen]), rtol=1e-5)


def test_one_image_and_none():
  one, none = jnp.array([0, 1, 0, 0], bool), jnp.zeros(4, bool)
  assert diversity.pairwise_distance(MIXED, one) == 0
  assert diversity.vendi(MIXED, one) == pytest.approx(1)
  assert np.isnan(diversity.pairwise_distance(MIXED, none))
  assert np.isnan(diversity.vendi(MIXED, none))


@pytest.mark.parametrize("measure", [diversity.pairwise_distance, diversity.vendi])
def test_gradient(measure, random):
  features, mask = random
  gradient = jax.grad(measure)(jnp.asarray(features), mask)
  assert not gradient[~mask].any() and np.abs(gradient[mask]).max() > 0.01
  function, step = 0 if measure is diversity.pairwise_distance else 1, 1e-5
  for row, column in ((0, 0), (3, 2), (5, 4)):
    change = np.zeros(features.shape)
    change[row, column] = step
    up, down = (by_numpy((features + s * change)[mask])[function] for s in (1, -1))
    assert gradient[row, column] == pytest.approx((up - down) / (2 * step), abs=1e-4)
  # Equal, orthogonal and empty embeddings: degenerate, but finite.
  for degenerate in (jnp.ones((6, 5)), jnp.eye(6, 5), jnp.zeros((6, 5))):
    assert np.isfinite(jax.grad(measure)(degenerate, mask)).all()


def test_leave_one_out_credit_of_the_vendi_score():
  # Without one of the equal three of four, eigenvalues 2/3, 1/3: 3 / 2^(2/3); without the other
  # one all are equal: 1.
  features = jnp.eye(2)[jnp.array([0, 0, 0, 1])][None]
  whole, common = 4 / 3**0.75, 3 / 2 ** (2 / 3)
  credit = sets.score_sets(features, diversity.vendi, credit="leave-one-out")
  np.testing.assert_allclose(credit.values, [[whole - common] * 3 + [whole - 1]], atol=1e-5)


def test_rewards_by_name(monkeypatch):
  def image_embedder(weights, dtype):
    assert (weights, dtype) == ("w", "bfloat16")
    return lambda params, images: images.mean(axis=(1, 2)) * params, np.float32(2)

  clip = types.ModuleType("rlft.rewards.clip")
  clip.image_embedder = image_embedder
  monkeypatch.setitem(sys.modules, clip.__name__, clip)
  monkeypatch.setattr(rewards, "clip", clip, raising=False)
  images = np.zeros((1, 4, 2, 2, 3), np.float32)
  images[0, range(4), :, :, [0, 0, 0, 1]] = 1  # As above: three equal, one orthogonal.
  for name, expected in (("clip-diversity", 0.5), ("clip-vendi", 4 / 3**0.75)):
    reward = make_reward(f"{name}?weights=w&dtype=bfloat16")
    assert reward.is_set and reward.is_measure
    assert reward.score(reward.params, images, None).values == pytest.approx(expected, abs=1e-5)
    credit = make_reward(f"{name}?weights=w&dtype=bfloat16&credit=leave-one-out")
    assert not credit.is_measure
    assert credit.score(credit.params, images, None).values.shape == (1, 4)
    with pytest.raises(UserError, match="credit=one is not known: use one of leave-one-out, set"):
      make_reward(f"{name}?weights=w&credit=one")
