"""DDIM: a written-out step, diffusers' scheduler, and what the configuration may not ask for."""

import math
from pathlib import Path

import chex
import jax.numpy as jnp
import models_cases
import numpy as np
import pytest

from rlft.algorithms.policy_gradient import trainable
from rlft.diffusion import ddim
from rlft.diffusion.policy import log_prob
from rlft.types import UserError

FIXTURE = Path(__file__).parents[1] / "fixtures" / "ddim.npz"
SD = {
  "num_train_timesteps": 1000,
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "steps_offset": 1,
  "set_alpha_to_one": False,
  "clip_sample": False,
}


def one_step(prediction_type: str, eta: float) -> ddim.DDIM:
  """A schedule of one step from alpha_bar 0.36 to 0.64."""
  variance = (1 - 0.64) / (1 - 0.36) * (1 - 0.36 / 0.64)  # 0.5625 * 0.4375 = 0.24609375
  return ddim.DDIM(
    timesteps=np.array([7], np.int32),
    alpha=np.array([0.36], np.float32),
    alpha_prev=np.array([0.64], np.float32),
    std=np.array([eta * math.sqrt(variance)], np.float32),
    alpha_bar=np.array([0.64, 0.36], np.float32),
    prediction_type=prediction_type,
  )


def scalar(value: float):
  return jnp.full((1, 1, 1, 1), value, jnp.float32)


def test_written_out_step():
  # x = 1, epsilon = 0.5: clean = (1 - 0.8 * 0.5) / 0.6 = 1.0
  # direction = sqrt(1 - 0.64 - 0.24609375) = sqrt(0.11390625) = 0.3375
  # mean = 0.8 * 1.0 + 0.3375 * 0.5 = 0.96875
  schedule = one_step("epsilon", eta=1.0)
  mean = schedule.mean(0, scalar(1.0), scalar(0.5))
  np.testing.assert_allclose(mean, 0.96875, rtol=1e-6)
  # std = sqrt(0.24609375) = 0.4960783; one std above the mean:
  # log N = -1/2 - ln 0.4960783 - ln(2 pi) / 2 = -0.5 + 0.7010215 - 0.9189385 = -0.7179170
  value = mean + schedule.std[0]
  np.testing.assert_allclose(log_prob(value, mean, schedule.std[0]), -0.7179170, rtol=1e-5)


def test_deterministic_step():
  # eta = 0: mean = 0.8 * 1.0 + 0.6 * 0.5 = 1.1
  mean = one_step("epsilon", eta=0.0).mean(0, scalar(1.0), scalar(0.5))
  np.testing.assert_allclose(mean, 1.1, rtol=1e-6)


def test_v_prediction_is_the_same_step():
  # v = sqrt(a) epsilon - sqrt(1 - a) clean = 0.6 * 0.5 - 0.8 * 1.0 = -0.5
  mean = one_step("v_prediction", eta=1.0).mean(0, scalar(1.0), scalar(-0.5))
  np.testing.assert_allclose(mean, 0.96875, rtol=1e-6)
  clean = one_step("v_prediction", eta=1.0).clean(0, scalar(1.0), scalar(-0.5))
  np.testing.assert_allclose(clean, 1.0, rtol=1e-6)
  process, timestep = one_step("v_prediction", eta=1.0), jnp.array([1])
  target = process.target(scalar(1.0), scalar(0.5), timestep)
  np.testing.assert_allclose(target, -0.5, rtol=1e-6)
  # x = sqrt(a) clean + sqrt(1 - a) epsilon = 0.6 + 0.4 = 1.0
  noisy = process.corrupt(scalar(1.0), scalar(0.5), timestep)
  np.testing.assert_allclose(noisy, 1.0, rtol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_step_equals_diffusers(prediction_type):
  stored = np.load(FIXTURE)
  schedule = ddim.make({**models_cases.SCHEDULER, "prediction_type": prediction_type}, 50, eta=1.0)
  np.testing.assert_allclose(
    ddim.alphas_cumprod(models_cases.SCHEDULER), stored["alphas_cumprod"], rtol=2e-6
  )
  for i, timestep in enumerate(stored["timesteps"]):
    (index,) = np.flatnonzero(schedule.timesteps == timestep)
    # diffusers takes the root of a float32 difference, which costs it digits where sigma is small.
    np.testing.assert_allclose(schedule.std[index], stored["sigma"][i], rtol=1e-4)
    mean = schedule.mean(index, jnp.asarray(stored["sample"]), jnp.asarray(stored["model_output"]))
    step = mean + schedule.std[index] * stored["noise"]
    chex.assert_trees_all_close(
      np.asarray(step), stored[f"{prediction_type}/prev_sample"][i], rtol=1e-5, atol=2e-5
    )


def test_known_figures_of_stable_diffusion():
  # sigma of the last of 50 steps is 0.0206 with steps_offset 1 and set_alpha_to_one False, and
  # exactly 0 with either the other way round.
  schedule = ddim.make(SD, 50)
  assert schedule.timesteps[0] == 981 and schedule.timesteps[-1] == 1
  assert schedule.std[-1] == pytest.approx(0.0206, abs=5e-5)
  assert len(trainable(schedule)) == 50
  for change in ({"steps_offset": 0}, {"set_alpha_to_one": True}):
    other = ddim.make({**SD, **change}, 50)
    assert other.std[-1] == 0
    assert list(trainable(other)) == list(range(49))


@pytest.mark.parametrize("case", models_cases.SCHEDULES)
def test_eight_steps_equal_diffusers(case):
  stored = np.load(FIXTURE)
  config = models_cases.SCHEDULER | models_cases.SCHEDULES[case]
  sample, output = (jnp.asarray(stored[name][:1, :2]) for name in ("sample", "model_output"))
  for eta in (0, 1):
    schedule = ddim.make(config, 8, eta=eta)
    np.testing.assert_array_equal(schedule.timesteps, stored[f"{case}/timesteps"])
    np.testing.assert_allclose(schedule.std, eta * stored[f"{case}/sigma"], rtol=1e-4, atol=1e-7)
    means = [schedule.mean(i, sample, output) for i in range(8)]
    chex.assert_trees_all_close(np.stack(means), stored[f"{case}/{eta}/mean"], rtol=2e-5, atol=2e-5)


def test_steps_without_noise_are_not_trained():
  schedule = ddim.make(models_cases.SCHEDULER | models_cases.SCHEDULES["linspace"], 8)
  assert schedule.timesteps[-1] == 0 and schedule.std[-1] == 0
  assert list(trainable(schedule)) == list(range(7))


def test_nothing_is_left_of_the_image_at_zero_snr():
  config = models_cases.SCHEDULER | models_cases.SCHEDULES["zero_snr"]
  alpha_bar = ddim.alphas_cumprod(config)
  plain = ddim.alphas_cumprod(models_cases.SCHEDULER)
  assert alpha_bar[-1] == 0 and alpha_bar[0] == pytest.approx(plain[0])
  # clean = -v, and a step of eta = 1 forgets the noise: mean = sqrt(alpha_prev) * 0.5.
  schedule = ddim.make(config, 8)
  mean = schedule.mean(0, scalar(3.0), scalar(-0.5))
  np.testing.assert_allclose(mean, 0.5 * np.sqrt(schedule.alpha_prev[0]), rtol=1e-3)


def test_refuses_an_offset_past_the_end():
  with pytest.raises(UserError, match="steps_offset=20 leads past 1000 timesteps; lower it"):
    ddim.make({**SD, "steps_offset": 20}, 50)


@pytest.mark.parametrize("steps", [0, 1001])
def test_refuses_impossible_numbers_of_steps(steps):
  with pytest.raises(UserError, match="from 1 to 1000"):
    ddim.make(SD, steps)
