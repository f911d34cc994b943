"""Normalised scores on literals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.rewards.scoring.statistics import constant_share, mean_std, normalise

NAN = float("nan")


def test_batch():
  # mean 3, population variance (4 + 1 + 0 + 9) / 4 = 3.5 -> std 1.8708287
  rewards = jnp.array([1.0, 2.0, 3.0, 6.0])
  expected = [-1.0690449, -0.5345225, 0.0, 1.6035675]
  np.testing.assert_allclose(normalise(rewards, clip=10.0), expected, rtol=1e-5)


def test_nan_takes_no_part():
  rewards = jnp.array([1.0, NAN, 2.0, 3.0, 6.0])
  expected = [-1.0690449, 0.0, -0.5345225, 0.0, 1.6035675]
  np.testing.assert_allclose(normalise(rewards, clip=10.0), expected, rtol=1e-5)
  assert (normalise(jnp.array([NAN, NAN]), clip=10.0) == 0).all()


def test_clip():
  rewards = jnp.array([1.0, 2.0, 3.0, 6.0])
  expected = [-1.0, -0.5345225, 0.0, 1.0]
  np.testing.assert_allclose(normalise(rewards, clip=1.0), expected, rtol=1e-5)


def test_groups():
  rewards = jnp.array([1.0, 3.0, 10.0, 30.0, 5.0, 5.0])
  expected = [-1.0, 1.0, -1.0, 1.0, 0.0, 0.0]
  result = normalise(rewards, clip=10.0, group_size=2)
  np.testing.assert_allclose(result, expected, rtol=1e-5)


@pytest.mark.parametrize("value", [0.1, 5.3, -23.417, 87.65, -0.8660254])
@pytest.mark.parametrize("batch", [48, 64, 2048])
def test_equal_rewards_have_no_advantage(value, batch):
  """Their mean, rounded, is not theirs; all of them would be a deviation away from it."""
  equal = jnp.full((batch,), value).at[3].set(NAN)
  assert not jax.jit(lambda x: normalise(x, clip=10.0))(equal).any()
  assert mean_std(equal)[1] == 0
  # Nor in a group beside others.
  groups = jnp.concatenate([equal[:16], jnp.arange(16.0)])
  found = jax.jit(lambda x: normalise(x, clip=10.0, group_size=16))(groups)
  assert not found[:16].any() and found[16:].all()


def test_mean_and_deviation():
  # Of 1 and 3, without NaN.
  np.testing.assert_allclose(mean_std(jnp.array([1.0, NAN, 3.0])), [2, 1])
  np.testing.assert_array_equal(mean_std(jnp.array([NAN, NAN])), [0, 0])


@pytest.mark.parametrize("rewards", [[1.0, NAN, 3.0], [2.0, 2.0, NAN], [NAN, NAN, NAN]])
def test_what_is_masked_does_not_poison_the_gradient(rewards):
  rewards = jnp.array(rewards)
  for function in (
    lambda x: normalise(x, clip=10.0)[0],
    lambda x: normalise(x, clip=10.0, group_size=3)[0],
    lambda x: sum(mean_std(x)),
  ):
    gradient = jax.grad(function)(rewards)
    assert np.isfinite(gradient).all() and not gradient[np.isnan(rewards)].any()


def test_gradient_of_a_normalised_reward():
  # (r0 - mean) / std of two is -1 or 1, whatever they are.
  gradient = jax.grad(lambda x: normalise(x, clip=10.0)[0])(jnp.array([1.0, 3.0]))
  np.testing.assert_allclose(gradient, [0, 0], atol=1e-5)


def test_share_from_which_nothing_is_learned():
  rewards = np.array([1, 1, NAN, 2, 0.1, 0.1, NAN, NAN], np.float32)
  assert constant_share(rewards) == 0
  # (1, 1) are the same, (NaN, 2) has no other, (NaN, NaN) none.
  assert constant_share(rewards, 2) == 1
  assert constant_share(rewards, 4) == 0.5
  assert constant_share(np.full(64, 0.1, np.float32)) == constant_share(np.full(4, NAN)) == 1
