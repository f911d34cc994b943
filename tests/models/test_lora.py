"""LoRA: where it sits, that it starts as nothing, and what merging computes."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rlft.models import lora

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


class Net(nn.Module):
  """Two projections, one with a LoRA's name; the second is computed twice in the backward pass."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(3, name="to_q")(x)
    return nn.remat(nn.Dense)(2, name="to_out_0")(jnp.tanh(x))


def test_an_adapted_network_is_the_merged_one():
  x = jax.random.normal(jax.random.key(1), (5, 4))
  params = Net().init(jax.random.key(0), x)["params"]
  adapter = {
    name: {
      key: jax.random.normal(jax.random.key(i), shape)
      for i, (key, shape) in enumerate({"a": (n, 2), "b": (2, m)}.items())
    }
    for name, (n, m) in {"to_q": (4, 3), "to_out_0": (3, 2)}.items()
  }

  def adapted(adapter):
    with lora.adapted(adapter, 0.5):
      return Net().apply({"params": params}, x)

  def merged(adapter):
    return Net().apply({"params": lora.merge(params, adapter, 0.5)}, x)

  np.testing.assert_allclose(adapted(adapter), merged(adapter), rtol=1e-5, atol=1e-6)
  assert not np.allclose(adapted(adapter), adapted(None), rtol=1e-2)
  gradients = [jax.grad(lambda a, f=f: (f(a) ** 2).sum())(adapter) for f in (adapted, merged)]
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), *gradients)


def test_a_small_adapter_is_not_lost_in_bfloat16():
  x, params = jnp.ones((1, 4)), {"kernel": jnp.array([[1.0], [-1.0], [1.0], [-1.0]])}
  adapter = {"": {"a": jnp.full((4, 1), 1e-2), "b": jnp.full((1, 1), 1e-2)}}
  with lora.adapted(adapter, 1.0):
    output = nn.Dense(1, use_bias=False, dtype=jnp.bfloat16).apply({"params": params}, x)
  # 1 + 1e-4 is 1 in bfloat16.
  np.testing.assert_allclose(output.astype(jnp.float32), [[4e-4]], rtol=1e-2)


def test_scale():
  assert lora.scale(0, 0.0) == 0.0
  assert lora.scale(4, 0.0) == 1.0
  assert lora.scale(4, 8.0) == 2.0
