"""Features and distances by which losses are seen."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlft.evaluation import guards


def test_cells_are_mean_colours_and_texture():
  images = np.zeros((2, 8, 8, 3), np.float32)
  images[0, :4, :4] = [0.3, 0.6, 0.9]  # one of 2 x 2 cells
  images[1, 4:, :4, :] = np.arange(2).repeat(2)[:, None]  # half black, half white
  found = np.asarray(guards.cells(images, 2))
  assert found.shape == (2, 4, 4)
  luma, red_green, yellow_blue, texture = found[0, :, 0]
  assert luma == pytest.approx(1.8 / 3**0.5)
  assert red_green == pytest.approx(-0.3 / 2**0.5)
  assert yellow_blue == pytest.approx((0.9 - 1.8) / 6**0.5)
  assert texture == pytest.approx(0, abs=1e-6) and not found[0, :, 1:].any()
  # Luma is 0 or 3 / sqrt(3), as often: the deviation is half of that.
  np.testing.assert_allclose(found[1, :, 2], [3**0.5 / 2, 0, 0, 3**0.5 / 2], atol=1e-6)


def test_grain_is_seen_in_the_texture_alone():
  rng = np.random.default_rng(0)
  plain = np.full((1, 32, 32, 3), 0.5, np.float32)
  grain = plain + 0.2 * np.where(rng.random((1, 32, 32, 1)) < 0.5, -1, 1).astype(np.float32)
  before, after = np.asarray(guards.cells(plain)), np.asarray(guards.cells(grain))
  assert np.abs(after[:, :3] - before[:, :3]).mean() < 0.05
  assert (after[:, 3] - before[:, 3]).mean() > 0.3


def test_other_sizes_are_brought_to_one():
  ramp = np.broadcast_to((np.arange(64) + 0.5) / 64, (64, 64))
  large = np.stack([ramp * ramp.T, ramp, ramp.T], axis=-1)[None].astype(np.float32)
  small = large.reshape(1, 32, 2, 32, 2, 3).mean((2, 4))
  np.testing.assert_allclose(guards.cells(large), guards.cells(small), atol=0.01)


def test_distance_on_literals():
  # F = 1. k(1, 1) = 8 and k(1, 0) = k(0, 0) = 1.
  ones, zeros = jnp.ones((2, 1)), jnp.zeros((3, 1))
  assert float(guards.kernel_distance(ones, zeros)) == pytest.approx(8 + 1 - 2)
  assert float(guards.kernel_distance(ones, ones)) == 0
  # x = (1, -1): k(1, -1) = 0 within; with y = (1, 0): k = 8, 1, 0, 1, of mean 2.5; within y 1.
  found = guards.kernel_distance(jnp.array([[1.0], [-1]]), jnp.array([[1.0], [0]]))
  assert float(found) == pytest.approx(0 + 1 - 5)


def test_distance_is_unbiased():
  rng = np.random.default_rng(0)
  same = [float(guards.kernel_distance(*rng.normal(size=(2, 6, 4)))) for _ in range(400)]
  assert np.mean(same) == pytest.approx(0, abs=3 * float(np.std(same)) / 20) and min(same) < 0
  apart = [
    guards.kernel_distance(rng.normal(size=(6, 4)) + 1, rng.normal(size=(6, 4))) for _ in range(100)
  ]
  assert np.mean(apart) > 10 * np.std(same) / 20


def test_likeness_is_that_of_the_most_similar():
  drawn = jnp.array([[3.0, 0], [1, 1]])
  real = jnp.array([[[0.0, 1], [2, 0]], [[0, -1], [1, 0]]])
  np.testing.assert_allclose(guards.likeness(drawn, real), [1, 0.5**0.5], atol=1e-6)
