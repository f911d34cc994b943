"""Normalised scores on literals."""

import jax.numpy as jnp
import numpy as np

from rlft.rewards.scoring.statistics import normalise

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


def test_equal_rewards_have_no_advantage():
  # 0.1 is no float32; its rounding error must not become an advantage.
  assert jnp.abs(normalise(jnp.full((64,), 0.1), clip=10.0)).max() < 0.1
