"""Winograd's forms: the published one, and what any of them must make."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlft.models.cpu import winograd

POINTS = {2: (0, 1, -1), 4: (0, 5 / 8, -5 / 8, 3 / 2, -3 / 2)}


def test_the_usual_form_of_two_rows():
  """Section 4.1 of https://arxiv.org/abs/1509.09308, but for signs, which cancel."""
  form = winograd.form(*POINTS[2])
  assert form.rows == 2
  np.testing.assert_array_equal(
    form.input, [[-1, 0, 1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -1, 0, 1]]
  )
  np.testing.assert_array_equal(
    form.kernel, [[-1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]
  )
  np.testing.assert_array_equal(form.output, [[1, 1, 1, 0], [0, 1, -1, 1]])


@pytest.mark.parametrize("rows", POINTS)
def test_a_form_convolves(rows):
  """Row i of the output is 1 d[i] + 10 d[i + 1] + 100 d[i + 2] for the kernel 1, 10, 100."""
  form = winograd.form(*POINTS[rows])
  seen = np.arange(1.0, rows + 3)
  products = np.array(form.input) @ seen * (np.array(form.kernel) @ [1, 10, 100])
  expected = [321, 432, 543, 654][:rows]
  np.testing.assert_allclose(np.array(form.output) @ products, expected, rtol=1e-12)


@pytest.mark.parametrize("rows", POINTS)
def test_cotangents_are_transposed_sums(rows):
  """<output(p), d> = <p, cotangent_sums(d)>, and so for the kernel."""
  form, rng = winograd.form(*POINTS[rows]), np.random.default_rng(0)
  count = rows + 2
  products = jnp.asarray(rng.normal(size=(count, 3, 2, 5, 4)), jnp.float32)
  d = jnp.asarray(rng.normal(size=(3, 2 * rows, 5, 4)), jnp.float32)
  there = jnp.vdot(winograd.output(form, list(products)), d)
  back = jnp.vdot(products, jnp.stack(winograd.cotangent_sums(form, d)))
  np.testing.assert_allclose(there, back, rtol=1e-4, atol=1e-3)
  kernel = jnp.asarray(rng.normal(size=(3, 3, 4, 2)), jnp.float32)
  sums = jnp.asarray(rng.normal(size=(count, 3, 4, 2)), jnp.float32)
  there = jnp.vdot(jnp.stack(winograd.kernel_sums(form, kernel)), sums)
  back = jnp.vdot(kernel, winograd.kernel_cotangent(form, list(sums)))
  np.testing.assert_allclose(there, back, rtol=1e-4, atol=1e-3)
