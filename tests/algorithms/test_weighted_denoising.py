"""Reward-weighted denoising: weights on literals, an update, and a whole run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_cases as cases

from rlft import catalog
from rlft.algorithms import weighted_denoising
from rlft.algorithms.weighted_denoising import RewardWeighted
from rlft.config import fields
from rlft.config.settings import AlgorithmSettings, TaskConfig
from rlft.diffusion import ddim
from rlft.models.files import pretrained
from rlft.types import UserError


def test_rewards_are_scaled_to_the_batchs_range():
  # (1 - 1) / 4, (3 - 1) / 4, (5 - 1) / 4; what could not be scored takes no part.
  found = weighted_denoising.min_max(jnp.array([1.0, 3.0, jnp.nan, 5.0]))
  np.testing.assert_allclose(found, [0.0, 0.5, 0.0, 1.0])
  np.testing.assert_array_equal(weighted_denoising.min_max(jnp.full(3, 2.0)), np.zeros(3))
  np.testing.assert_array_equal(weighted_denoising.min_max(jnp.full(3, jnp.nan)), np.zeros(3))


def test_exponential_weights_have_a_mean_of_one():
  # exp(0), exp(ln 3) of three images, one without a score: shares 1/4 and 3/4, times 2.
  rewards = jnp.array([0.0, 2 * np.log(3.0), jnp.nan])
  found = weighted_denoising.exponential(rewards, temperature=2.0)
  np.testing.assert_allclose(found, [0.5, 1.5, 0.0], rtol=1e-6)


def test_effective_share():
  # (1 + 1 + 0 + 0)^2 / (4 * 2) = 1/2; all equal: 1.
  share = weighted_denoising.effective_share
  np.testing.assert_allclose(share(jnp.array([1.0, 1.0, 0.0, 0.0])), 0.5)
  np.testing.assert_allclose(share(jnp.full(4, 0.3)), 1.0)
  assert share(jnp.zeros(4)) == 0


@pytest.mark.parametrize(
  ("spec", "expected"),
  [
    ("reward-weighted", RewardWeighted()),
    ("reward-weighted?draw=current&updates=3", RewardWeighted(draw="current", updates=3)),
    (
      "reward-weighted?weights=exponential&temperature=0.5",
      RewardWeighted(weights="exponential", temperature=0.5),
    ),
  ],
)
def test_options(spec, expected):
  assert catalog.make_algorithm(AlgorithmSettings(algorithm=spec)) == expected


def test_who_draws():
  assert RewardWeighted().draws_with == "base"
  assert RewardWeighted(weights="exponential").draws_with == "current"
  assert RewardWeighted(draw="current").draws_with == "current"


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"algorithm": "reward-wieghted"}, "is not known: did you mean reward-weighted?"),
    ({"algorithm": "reward-weighted?temperature=0"}, "temperature must be greater than 0"),
    ({"algorithm": "reward-weighted?updates=0"}, "updates must be greater than 0"),
    ({"algorithm": "reward-weighted?weights=max"}, "weights=max is not known: "),
    ({"algorithm": "reward-weighted?beta=1"}, "unknown option 'beta'"),
    (
      {"algorithm": "reward-weighted", "clip_range": 0.1},
      "--clip_range=0.1 has no effect with --algorithm=reward-weighted: leave it out",
    ),
    (
      {"algorithm": "policy-gradient?clip_range=0.1"},
      "clip_range is a flag of its own: give --clip_range=0.1",
    ),
  ],
)
def test_mistakes(settings, message):
  with pytest.raises(UserError) as error:
    catalog.make_algorithm(AlgorithmSettings(**settings))
  assert message in str(error.value) and "\n" not in str(error.value)


def test_a_single_set_has_one_weight():
  task = TaskConfig("t", "p", "r", batch_size=16, images_per_prompt=16)
  algorithm = RewardWeighted()
  algorithm.check_task(task, prompts=1, iterations=1, same_in_set=False)
  with pytest.raises(UserError, match="use batch_size=32 or more"):
    algorithm.check_task(task, prompts=1, iterations=1, same_in_set=True)


# ---------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Two iterations of two updates on 8 devices, with scores that are NaN; its calls and metrics."""
  folder = cases.folder(tmp_path_factory)
  workdir, calls = tmp_path_factory.mktemp("weighted"), []
  config = fields.replace(
    cases.config(folder, workdir, pretrain_weight=0.0),
    task=(cases.task(folder, "spread", "host:spread", images_per_prompt=2),),
    algorithm="reward-weighted?updates=2",
    max_nan_share=0.5,
    train_timesteps=5,
    clip_range=1e-4,
  )
  with cases.fast_compilation(folder / "cache"):
    cases.run(config, devices=8, calls=calls)
  return folder, calls, cases.metrics(workdir)


def test_the_base_draws(run):
  folder, calls, _ = run
  assert [call.name for call in calls] == ["update"] * 4
  base = pretrained.load(folder / "model").params["unet"]
  for call in calls:
    jax.tree.map(
      np.testing.assert_array_equal, jax.tree.map(np.asarray, call.args[0]["unet"]), base
    )
  # Both updates of an iteration see its images, with other noise.
  first, second, third, _ = (jax.tree.map(np.asarray, call.args[1:4]) for call in calls)
  jax.tree.map(np.testing.assert_array_equal, first, second)
  assert np.abs(first[0] - third[0]).max() > 0.1


def test_an_update_is_the_written_out_one(run):
  """Its gradient is that of mean(v * error), with errors of the same noise, by JAX alone."""
  folder, calls, metrics = run
  model = pretrained.load(folder / "model")
  latents, text, rewards = jax.device_get(calls[0].args[1:4])
  key = calls[0].args[4]
  alpha_bar = jnp.asarray(ddim.alphas_cumprod(model.scheduler), jnp.float32)
  time_key, noise_key = jax.random.split(key)
  timesteps = jax.random.randint(time_key, (8,), 0, 1000)
  noise = jax.random.normal(noise_key, latents.shape)
  valid = np.isfinite(rewards)
  assert 0 < valid.sum() < 8
  low, high = np.nanmin(rewards), np.nanmax(rewards)
  weights = np.where(valid, (np.asarray(rewards) - low) / (high - low), 0.0)

  def loss(params):
    alpha = alpha_bar[timesteps][:, None, None, None]
    noisy = jnp.sqrt(alpha) * latents + jnp.sqrt(1 - alpha) * noise
    output = model.unet.apply({"params": params}, noisy, timesteps, text)
    errors = jnp.square(output - noise).mean((1, 2, 3))
    return jnp.sum(jnp.where(valid, weights * errors, 0.0)) / valid.sum()

  gradient = jax.jit(jax.grad(loss))(model.params["unet"])
  norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradient)))
  assert float(calls[0].result[1]["grad_norm"]) == pytest.approx(norm, rel=1e-4)

  def updated(p, g):  # AdamW's first step
    g = g / max(norm, 1)
    return p - 1e-2 * (g / (np.abs(g) + 1e-2) + 1e-2 * p)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    calls[0].result[0].params,
    jax.tree.map(updated, model.params["unet"], gradient),
  )
  names = {"loss/denoising", "weights/effective_share", "grad_norm"}
  assert {f"{name}/spread" for name in names} | {"grad_norm"} <= metrics[0].keys()
  assert not [name for name in metrics[0] if name.startswith(("ratio/", "clip_fraction"))]
