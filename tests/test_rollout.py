"""Sampling: a whole guided run against diffusers' pipeline, and the policy's invariants."""

from pathlib import Path

import jax
import jax.numpy as jnp
import models_cases
import numpy as np
import pytest

from rlft import ddim, rollout, sampler

FIXTURE = Path(__file__).parent / "fixtures" / "pipeline.npz"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_guided_sampling_equals_diffusers(prediction_type):
  """10 guided DDIM steps, eta 0, from the same noise: latents and decoded images to 1e-4."""
  stored = np.load(FIXTURE)
  model = models_cases.tiny_pipeline(prediction_type)
  schedule = ddim.make_schedule(model.scheduler, models_cases.STEPS, eta=0.0)
  assert list(schedule.timesteps) == list(stored["timesteps"])
  assert len(schedule.trainable) == 0

  @jax.jit
  def run(noise, ids, empty):
    text = sampler.embed(model, model.params["text_encoder"], ids, empty)
    path = rollout.sample(
      lambda *args: model.unet.apply({"params": model.params["unet"]}, *args),
      schedule,
      noise,
      text,
      jax.random.split(jax.random.key(0), len(noise)),
      guidance_scale=models_cases.GUIDANCE,
    )
    return path, sampler.decode(model, model.params["vae"], path.latents[-1])

  path, images = run(stored["initial_latents"], stored["ids"], stored["empty_ids"][0])
  latents = stored[f"{prediction_type}/latents"]
  scale = max(1.0, np.abs(latents).max())
  np.testing.assert_allclose(path.latents[-1], latents, atol=1e-4 * scale, rtol=0)
  np.testing.assert_allclose(images, stored[f"{prediction_type}/images"], atol=1e-4, rtol=0)
  assert (path.log_probs == 0).all()


def linear(x, timesteps, text):
  """A network that is easy to reason about: depends on the latent, the time and the text."""
  return (
    0.1 * x + 1e-4 * timesteps[:, None, None, None] + text.mean(axis=(1, 2))[:, None, None, None]
  )


SCHEDULE = ddim.make_schedule(models_cases.SCHEDULER, 6, eta=1.0)
TEXT = jnp.stack([jnp.zeros((4, 3, 2)), jnp.arange(24.0).reshape(4, 3, 2) / 24])
KEYS = sampler.image_keys(jax.random.key(3), 0, 4)
NOISE = rollout.normal(KEYS, 6, (2, 2, 1))


def sample(keys=KEYS, noise=NOISE, text=TEXT, guidance_scale=3.0):
  return rollout.sample(linear, SCHEDULE, noise, text, keys, guidance_scale=guidance_scale)


def test_log_probs_are_those_of_the_steps_taken():
  path = sample()
  assert path.latents.shape == (7, 4, 2, 2, 1) and path.log_probs.shape == (6, 4)
  for index in range(6):
    log_prob, mean = rollout.policy_log_prob(
      linear,
      SCHEDULE,
      index,
      path.latents[index],
      path.latents[index + 1],
      TEXT,
      guidance_scale=3.0,
    )
    np.testing.assert_allclose(jnp.exp(log_prob - path.log_probs[index]), 1.0, atol=1e-5)
    # The step is its mean plus std times standard normal noise: log p is known from the noise.
    noise = (path.latents[index + 1] - mean) / SCHEDULE.std[index]
    expected = -0.5 * (noise**2).mean((1, 2, 3)) - np.log(SCHEDULE.std[index]) - 0.9189385
    np.testing.assert_allclose(log_prob, expected, rtol=1e-4, atol=1e-5)


def test_an_image_depends_on_its_own_key_only():
  alone = sample(KEYS[2:3], NOISE[2:3], TEXT[:, 2:3])
  np.testing.assert_allclose(alone.latents[:, 0], sample().latents[:, 2], rtol=1e-6, atol=1e-6)


def test_guidance_mixes_both_outputs():
  x, time = NOISE, jnp.int32(500)
  uncond = linear(x, jnp.full((4,), 500), TEXT[0])
  cond = linear(x, jnp.full((4,), 500), TEXT[1])
  for scale in (1.0, 7.0):
    guided = rollout.guided_output(linear, x, time, TEXT, guidance_scale=scale)
    np.testing.assert_allclose(guided, uncond + scale * (cond - uncond), rtol=1e-5, atol=1e-6)
