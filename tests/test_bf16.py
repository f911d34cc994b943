"""Networks in bfloat16: trajectories stay float32, the ratio is 1, and samples hardly change."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_cases

from rlft import lora, sampler

TOLERANCE = 1e-5  # of the ratio before the first update
STEPS = 3

# What makes other programs of sampling and training: guidance, low-rank weights, recomputation,
# gathered shards.
SETTINGS = {
  "guidance": {"guidance_scale": 7.0},
  "lora": {"guidance_scale": 1.0, "lora_rank": 2, "lora_alpha": 4.0, "remat": True},
  "shards": {"guidance_scale": 7.0, "fsdp": 2, "remat": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return train_cases.folder(tmp_path_factory)


@pytest.fixture(autouse=True, scope="module")
def _fast(folder):
  # What XLA rounds where is decided before the optimizations that are left out here.
  with train_cases.fast_compilation(folder / "cache"):
    yield


@pytest.mark.parametrize("name", SETTINGS)
def test_the_ratio_is_one_before_the_first_update(name, folder, tmp_path):
  sharded, calls = "fsdp" in SETTINGS[name], []
  config = train_cases.config(
    folder,
    tmp_path,
    task=(train_cases.task(folder),),
    iterations=2,
    compute_dtype="bfloat16",
    sampling_steps=STEPS,
    train_timesteps=STEPS,
    accumulate_timesteps=True,
    pretrain_weight=0.0,
    report_images=0,
    **SETTINGS[name],
  )
  train_cases.run(config, devices=8 if sharded else 1, calls=calls)
  found = [call.result[1] for call in calls if call.name == "accumulate"]
  # Every step of two sets of trajectories: by the base model, and after the first update.
  assert len(found) == 2 * STEPS
  assert max(float(metrics["ratio/max_abs_deviation"]) for metrics in found) <= TOLERANCE
  assert min(float(metrics["grad_norm"]) for metrics in found) > 0


def test_samples_hardly_change_and_stay_float32():
  def draw(dtype):
    model = train_cases.tiny_model()
    model = dataclasses.replace(model, unet=model.unet.clone(dtype=dtype))
    made = sampler.Sampler(model, batch_size=8, sampling_steps=10, guidance_scale=7.0)
    ids, _ = model.tokenize(["two cats"] * 8)
    weights = lora.Weights(model.params["unet"])
    path, images, _ = made.rollout(weights, ids, sampler.image_keys(jax.random.key(0), 0, 8))
    return path, images

  (exact, exact_images), (rounded, images) = draw(jnp.float32), draw(jnp.bfloat16)
  chex.assert_trees_all_equal_dtypes(rounded, exact)
  chex.assert_type([rounded.latents, rounded.log_probs, images], jnp.float32)
  # A trajectory that was rounded on the way would have nothing below bfloat16's eight bits.
  kept = rounded.latents == rounded.latents.astype(jnp.bfloat16)
  assert kept.mean() < 0.01
  np.testing.assert_array_equal(rounded.latents[0], exact.latents[0])
  drift = np.abs(rounded.latents[-1] - exact.latents[-1])
  assert 0 < drift.mean() < 0.02 * np.abs(exact.latents[-1]).mean()
  assert np.abs(images - exact_images).mean() < 0.01
