"""Attention: every implementation computes the same, and each platform gets its own."""

import jax
import jax.numpy as jnp
import models_cases
import numpy as np
import pytest

from rlft.models import attention, dispatch


def arrays(queries, keys, heads=2, features=40, batch=2, dtype=jnp.float32):
  return tuple(
    jax.random.normal(jax.random.key(i), (batch, n, heads, features), dtype)
    for i, n in enumerate((queries, keys, keys))
  )


def with_gradients(function):
  def loss(*x):
    return jnp.sum(jnp.sin(3 * function(*x).astype(jnp.float32)))

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


def lowered(platform, *shapes, implementation="auto"):
  def function(*x):
    return attention.attention(*x, implementation=implementation)

  with dispatch.for_platform(platform):
    traced = with_gradients(function).trace(*shapes)
  return traced.lower(lowering_platforms=(platform,)).as_text()


def shapes(queries, keys, dtype=jnp.bfloat16, features=64):
  return [jax.ShapeDtypeStruct((2, n, 2, features), dtype) for n in (queries, keys, keys)]


@pytest.fixture
def cudnn():
  with models_cases.cudnn():
    yield


def test_xla_is_the_formula():
  query, key, value = (np.asarray(x, np.float64) for x in arrays(5, 7))
  logits = np.einsum("bnhd,bmhd->bhnm", query, key) / np.sqrt(40)
  weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  expected = np.einsum("bhnm,bmhd->bnhd", weights, value)
  np.testing.assert_allclose(attention.attention(*arrays(5, 7)), expected, atol=2e-6)


def test_a_mask_forbids():
  causal = jnp.tril(jnp.ones((6, 6), bool))
  query, key, value = arrays(6, 6)
  found = attention.attention(query, key, value, causal)
  np.testing.assert_allclose(found[:, 0], value[:, 0], atol=1e-6)
  changed = attention.attention(query, key.at[:, 5].add(1.0), value, causal)
  np.testing.assert_array_equal(found[:, :5], changed[:, :5])


def test_splash_is_exact_forward_and_backward():
  # 384 is not a power of two and 40 features not a multiple of the lanes.
  inputs = arrays(384, 384, batch=1)
  found, gradients = with_gradients(lambda *x: attention.splash(*x, interpret=True))(*inputs)
  expected, expected_gradients = with_gradients(attention.xla)(*inputs)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  for one, other in zip(gradients, expected_gradients, strict=True):
    np.testing.assert_allclose(one, other, atol=2e-5)


def test_tpus_get_the_kernel_for_long_self_attention_only():
  kernel = "tpu_custom_call"
  assert lowered("tpu", *shapes(1024, 1024)).count(kernel) >= 2  # forward and backward
  assert kernel not in lowered("tpu", *shapes(1024, 77))
  assert kernel not in lowered("tpu", *shapes(256, 256))
  assert kernel not in lowered("tpu", *shapes(1024, 1024), implementation="xla")
  for platform in ("cpu", "cuda"):
    assert kernel not in lowered(platform, *shapes(1024, 1024))


def test_gpus_get_cudnn_in_half_precision(cudnn):
  kernel = "cudnn$fmha"
  for keys in (1024, 77):
    text = lowered("cuda", *shapes(1024, keys))
    assert "fmhaSoftmaxBackward" in text and text.count(kernel) >= 2
  assert kernel not in lowered("cuda", *shapes(1024, 1024, dtype=jnp.float32))
  assert kernel not in lowered("cuda", *shapes(1024, 1024, features=260))
  assert kernel not in lowered("cpu", *shapes(1024, 1024))


def test_without_cudnn_gpus_get_xla():
  assert "cudnn" not in lowered("cuda", *shapes(1024, 1024))


def test_the_choice_costs_no_memory():
  """What only another platform's backward pass keeps, here padded heads, is not even zeros."""
  padded = f"1024,{attention._LANES}]"
  compiled = with_gradients(attention.attention).lower(*shapes(1024, 1024)).compile().as_text()
  assert padded not in compiled
  assert "1024,64]" in compiled


def test_an_unknown_implementation_is_refused():
  with pytest.raises(ValueError, match="flash"):
    attention.attention(*arrays(4, 4), implementation="flash")
