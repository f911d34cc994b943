"""AdamW with what it stores in bfloat16, against AdamW in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlft.algorithms import optimizer

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 4096), "b": jnp.zeros(3)}
SETTINGS = {
  "learning_rate": 1e-3,
  "b1": 0.9,
  "b2": 0.999,
  "eps": 1e-8,
  "weight_decay": 1e-2,
  "max_grad_norm": 1.0,
}


def run(transformation, params, steps=200, seed=0):
  """`steps` updates with noisy gradients around the parameters themselves."""

  @jax.jit
  def step(params, state, key):
    gradient = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(key, p.shape), params)
    updates, state = transformation.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  state = transformation.init(params)
  for i in range(steps):
    params, state = step(params, state, jax.random.fold_in(jax.random.key(seed), i))
  return params, state


def test_it_is_optax_adamw():
  found, state = run(optimizer.make_optimizer(**SETTINGS), PARAMS)
  rest = {k: v for k, v in SETTINGS.items() if k != "max_grad_norm"}
  expected, _ = run(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(**rest)), PARAMS)
  np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-6, atol=1e-7)
  assert optimizer.full_precision(found, state) is found


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 1e3, float("nan")])
def test_it_clips_as_optax_does(scale):
  gradient = {"w": scale * jnp.linspace(-1.0, 1.0, 5), "b": jnp.full(3, scale)}
  ours, theirs = optimizer.clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0)
  found, _ = ours.update(gradient, ours.init(gradient))
  expected, _ = theirs.update(gradient, theirs.init(gradient))
  for name in gradient:
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)


def test_moments_in_bfloat16_are_right_on_average():
  whole, exact = run(optimizer.make_optimizer(**SETTINGS), PARAMS)
  half, stored = run(optimizer.make_optimizer(**SETTINGS, moments_dtype="bfloat16"), PARAMS)
  exact, stored = exact[1][0], stored[1][0].inner
  assert stored.mu["w"].dtype == stored.nu["w"].dtype == jnp.bfloat16
  # To the nearest, nu could not pass 2^-9 / (1 - b2) = 2 times the share that it gets in a step.
  ratio = stored.nu["w"].astype(jnp.float32).sum() / exact.nu["w"].sum()
  np.testing.assert_allclose(ratio, 1.0, atol=5e-3)
  distance = jnp.abs(half["w"] - whole["w"]).mean() / jnp.abs(whole["w"] - PARAMS["w"]).mean()
  assert distance < 0.02


@pytest.mark.parametrize("value", [1.0, 1.001, -3.3e-5])
def test_rounding_keeps_the_mean(value):
  x = jnp.full(100_000, value)
  found = optimizer._round(jax.random.key(0), x, jnp.bfloat16).astype(jnp.float32)
  assert len(np.unique(found)) <= 2 and np.abs(found / value - 1).max() < 2**-7
  np.testing.assert_allclose(found.mean(), value, rtol=5e-5)


def test_parameters_in_bfloat16_follow_their_float32_master():
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
  found, state = run(optimizer.make_optimizer(**SETTINGS, param_dtype="bfloat16"), low)
  master = optimizer.full_precision(found, state)
  assert found["w"].dtype == jnp.bfloat16 and master["w"].dtype == jnp.float32
  # What is used is the rounded master, bit for bit; the master moves by less than that shows.
  np.testing.assert_array_equal(found["w"], master["w"].astype(jnp.bfloat16))
  exact, _ = run(optimizer.make_optimizer(**SETTINGS), PARAMS)
  np.testing.assert_allclose(master["w"], exact["w"], atol=5e-3)
