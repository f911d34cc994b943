"""LoRA: where it sits, that it starts as nothing, and what merging computes."""

import jax
import jax.numpy as jnp
import numpy as np

from rlft import lora

PARAMS = {
  "block": {
    "attn1": {
      "to_q": {"kernel": jnp.arange(6.0).reshape(2, 3)},
      "to_out_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)},
    },
    "conv": {"kernel": jnp.ones((3, 3, 2, 2))},
  }
}


def test_targets_are_the_attention_projections():
  assert lora.targets(PARAMS) == {"block/attn1/to_q": (2, 3), "block/attn1/to_out_0": (3, 2)}


def test_starts_as_nothing():
  adapter = lora.init(jax.random.key(0), PARAMS, rank=4)
  assert adapter["block/attn1/to_q"]["a"].shape == (2, 4)
  assert adapter["block/attn1/to_q"]["b"].shape == (4, 3)
  merged = lora.merge(PARAMS, adapter, 1.0)
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), merged, PARAMS))


def test_merge():
  # a b = [[1], [2]] [[1, 0, -1]] = [[1, 0, -1], [2, 0, -2]], times 0.5, added to 0..5
  adapter = {
    "block/attn1/to_q": {"a": jnp.array([[1.0], [2.0]]), "b": jnp.array([[1.0, 0.0, -1.0]])}
  }
  merged = lora.merge(PARAMS, adapter, 0.5)
  expected = [[0.5, 1.0, 1.5], [4.0, 4.0, 4.0]]
  np.testing.assert_allclose(merged["block"]["attn1"]["to_q"]["kernel"], expected)
  np.testing.assert_array_equal(PARAMS["block"]["attn1"]["to_q"]["kernel"][0], [0.0, 1.0, 2.0])


def test_scale():
  assert lora.scale(0, 0.0) == 0.0
  assert lora.scale(4, 0.0) == 1.0
  assert lora.scale(4, 8.0) == 2.0
