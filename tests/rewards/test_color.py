"""CIELAB by hand, and as scikit-image has it."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlft.rewards import color


def test_cielab_by_hand():
  # sRGB white is L* 100; mid-grey 0.5 is linear 0.21404, L* = 116 * 0.21404**(1/3) - 16 = 53.39;
  # pure red is (53.24, 80.09, 67.20).
  lab = color.cielab(jnp.array([[1.0, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0]]))
  np.testing.assert_allclose(lab, [[100, 0, 0], [53.39, 0, 0], [53.24, 80.09, 67.20]], atol=0.05)


def test_cielab_is_that_of_scikit_image():
  skimage_color = pytest.importorskip("skimage.color", reason="needs scikit-image")
  rgb = np.random.RandomState(0).uniform(size=(64, 3)).astype(np.float32)
  rgb[:4] *= 0.05  # the linear part
  # Their white is rounded to five digits.
  np.testing.assert_allclose(color.cielab(rgb), skimage_color.rgb2lab(rgb), atol=0.05)
