"""Parts of a batch give what the whole gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.parallel import microbatch, sharding

ROWS = {"x": jnp.arange(24.0).reshape(12, 2), "y": jnp.arange(12.0)}


def test_mapped_keeps_the_order():
  def function(rows):
    return {"sum": rows["x"].sum(1) + rows["y"], "rank": rows["y"] - rows["y"].mean()}

  whole = microbatch.mapped(function, ROWS, 0)
  parts = microbatch.mapped(function, ROWS, 3)
  np.testing.assert_array_equal(parts["sum"], whole["sum"])
  # What is seen at once are three neighbours.
  np.testing.assert_array_equal(parts["rank"], np.tile([-1.0, 0.0, 1.0], 4))


@pytest.mark.parametrize("size", [0, 4, 12])
def test_summed_gradients_are_those_of_the_whole(size):
  def loss(weight, rows):
    values = jnp.tanh(rows["x"] @ weight) * rows["y"]
    return values.sum(), values

  weight = jnp.array([0.1, -0.05])
  expected, outputs = jax.grad(loss, has_aux=True)(weight, ROWS)
  found, rows = microbatch.summed(
    lambda part: jax.grad(loss, has_aux=True)(weight, part), weight, ROWS, size
  )
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  np.testing.assert_allclose(rows, outputs, rtol=1e-6)


def test_sums_of_bfloat16_gradients_are_float32():
  def function(rows):
    return rows["y"].sum().astype(jnp.bfloat16), rows["y"]

  total, _ = microbatch.summed(function, jnp.zeros(()), {"y": jnp.ones(512)}, 1)
  assert total.dtype == jnp.float32 and total == 512  # In bfloat16, 256 + 1 is 256.


def test_parts_have_to_fit():
  with pytest.raises(ValueError, match="12 rows cannot be divided into parts of 5"):
    microbatch.mapped(lambda rows: rows, ROWS, 5)


def test_the_size_that_is_asked_for():
  assert microbatch.size(2, 64, sharding.make_mesh(), jnp.float32) == 2
