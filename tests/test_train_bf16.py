"""Networks in bfloat16: trajectories stay float32, the ratio is 1, and samples hardly change."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_cases

from rlft.diffusion import rollout, sampler
from rlft.diffusion.policy import make_policy
from rlft.models import lora

TOLERANCE = 1e-5  # of the ratio before the first update
STEPS = 3
GUIDANCE = 7.0

# What makes other programs of sampling and training: guidance; low-rank weights, recomputation and
# gathered shards.
SETTINGS = {
  "guidance": {"guidance_scale": GUIDANCE},
  "lora, remat, shards": {"guidance_scale": 1.0, "lora_rank": 2, "remat": True, "fsdp": 2},
}


@pytest.fixture(scope="module")
def first_updates(tmp_path_factory):
  """Name of settings -> calls of the update, of two iterations.

  Every step of two sets of trajectories is trained on: one by the base model, and one after an
  update.
  """
  folder, runs = train_cases.folder(tmp_path_factory), {}

  def calls(name):
    if name not in runs:
      found = []
      config = train_cases.config(
        folder,
        tmp_path_factory.mktemp("run"),
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
      train_cases.run(config, devices=8 if "fsdp" in SETTINGS[name] else 1, calls=found)
      runs[name] = [call for call in found if call.name == "update"]
    return runs[name]

  # What XLA rounds where is decided before the optimizations that tests leave out.
  return calls


@pytest.mark.parametrize("name", SETTINGS)
def test_the_ratio_is_one_before_the_first_update(name, first_updates):
  metrics = [call.result[1] for call in first_updates(name)]
  assert len(metrics) == 2
  assert max(float(values["ratio/max_abs_deviation"]) for values in metrics) <= TOLERANCE
  assert min(float(values["grad_norm"]) for values in metrics) > 0


def test_samples_hardly_change_and_stay_float32(first_updates):
  call = first_updates("guidance")[0]
  path, text = next(
    (one, following)
    for one, following in zip(call.args, call.args[1:], strict=False)
    if hasattr(one, "log_probs")
  )
  chex.assert_type([path.latents, path.log_probs, *jax.tree.leaves(text)], jnp.float32)
  # Of latents that were rounded on the way, all would be numbers of bfloat16.
  assert (path.latents == path.latents.astype(jnp.bfloat16)).mean() < 0.01
  chex.assert_type(jax.tree.leaves(call.result[0].params), jnp.float32)

  model = train_cases.tiny_model()
  keys = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 0)
  policy = make_policy(model, sampling_steps=STEPS, guidance_scale=GUIDANCE)
  weights = lora.Weights(model.params["unet"])
  draw = jax.jit(lambda *args: rollout.sample(policy, weights, *args))
  exact = draw(path.latents[0], text, sampler.image_keys(keys, 0, train_cases.BATCH))
  difference = np.abs(path.latents[-1] - exact.latents[-1])
  assert 0 < difference.mean() < 0.02 * np.abs(exact.latents[-1]).mean()
