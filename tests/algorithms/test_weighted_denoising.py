"""Denoising of drawn images: weights and choices on literals, an update, and whole runs."""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import train_cases as cases

from rlft import catalog
from rlft.algorithms import losses, weighted_denoising
from rlft.algorithms.base import Batch, Learner
from rlft.algorithms.weighted_denoising import Raft, RewardWeighted
from rlft.config import fields
from rlft.config.settings import AlgorithmSettings, PolicySettings, TaskConfig
from rlft.diffusion import ddim
from rlft.diffusion.policy import Policy
from rlft.models.files import pretrained
from rlft.parallel import sharding
from rlft.types import Conditioning, Drawn, Guidance, Moment, Prompt, TrainState, UserError


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
    ("raft", Raft()),
    ("raft?one_in=4&choose=sets&updates=2", Raft(one_in=4, choose="sets", updates=2)),
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
    (
      {"algorithm": "reward-weighted?temperature=2"},
      "temperature=2 has no effect on weights=min",
    ),
    ({"algorithm": "reward-weighted?updates=0"}, "updates must be greater than 0"),
    ({"algorithm": "reward-weighted?weights=max"}, "weights=max is not known: "),
    ({"algorithm": "reward-weighted?beta=1"}, "unknown option 'beta'"),
    ({"algorithm": "raft?one_in=1"}, "raft?one_in=1: one_in must be at least 2"),
    ({"algorithm": "raft?updates=0"}, "raft?updates=0: updates must be at least 1"),
    (
      {"algorithm": "raft", "kl_weight": 0.1},
      "--kl_weight=0.1 has no effect with --algorithm=raft",
    ),
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


# ---------------------------------------------------------------------------- RAFT

NAN = float("nan")


def test_the_best_of_each_neighbourhood():
  scores = np.array([0.1, 0.5, NAN, 0.3, 2.0, -1.0, 2.0, 2.0])
  best = weighted_denoising.best
  # Of 0.1, 0.5, NaN, 0.3 the second; of 2, -1, 2, 2 the first of the equal ones.
  assert best(scores, compared=4, one_in=4).tolist() == [1, 4]
  assert best(scores, compared=4, one_in=2).tolist() == [1, 3, 4, 6]
  assert best(scores, compared=8, one_in=4).tolist() == [4, 6]
  # There are always as many: who could not be scored comes last, and is left out by the mask.
  assert best(np.array([NAN, NAN, NAN, 7.0]), compared=4, one_in=2).tolist() == [3, 0]


def test_whole_sets_are_chosen_among_those_of_the_batch():
  # Sets of two with means 1, 3, 2 (of one image) and nothing: the best two.
  scores = np.array([1.0, 1.0, 3.0, 3.0, NAN, 2.0, NAN, NAN])
  found = weighted_denoising.kept(Raft(one_in=2, choose="sets"), scores, 2)
  assert found.tolist() == [2, 3, 4, 5]
  found = weighted_denoising.kept(Raft(one_in=2), scores, 2)
  assert found.tolist() == [0, 2, 5, 6]
  # With one image for each prompt, the best of the batch.
  found = weighted_denoising.kept(Raft(one_in=4, choose="sets"), scores, 1)
  assert found.tolist() == [2, 3]


@pytest.mark.parametrize(
  ("algorithm", "task", "message"),
  [
    (Raft(), {}, "1 of 24 images, which does not divide 16: use images_per_prompt=24 or another"),
    (Raft(choose="sets"), {}, "does not divide 4: use batch_size=384 or .*, or raft.one_in=4$"),
    (Raft(one_in=8), {"images_per_prompt": 1}, "does not divide 1: .* another multiple of 8$"),
  ],
)
def test_too_few_to_choose_from(algorithm, task, message):
  few = TaskConfig("t", "p", "r", **{"batch_size": 64, "images_per_prompt": 16} | task)
  with pytest.raises(UserError, match=message):
    algorithm.check(PolicySettings(), [few])
  task = TaskConfig("t", "p", "r", batch_size=64, images_per_prompt=16)
  Raft(one_in=4).check(PolicySettings(), [task])
  Raft(one_in=2, choose="sets").check(PolicySettings(), [task])


def test_equal_scores_of_a_set_choose_among_sets():
  task = TaskConfig("t", "p", "r", batch_size=64, images_per_prompt=16)
  with pytest.raises(UserError, match="choose among the sets of the batch with raft.choose=sets"):
    Raft().check_task(task, prompts=1, iterations=1, same_in_set=True)
  Raft().check_task(task, prompts=1, iterations=1, same_in_set=False)
  Raft(choose="sets").check_task(task, prompts=1, iterations=1, same_in_set=True)
  assert (Raft().compared(16), Raft(choose="sets").compared(16)) == (16, None)


class Scale(nn.Module):
  """A network of one weight: it predicts w x."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, timesteps, text):
    return self.param("w", nn.initializers.constant(0.5), ()) * x


@pytest.mark.parametrize(("devices", "microbatch"), [(1, 0), (8, 0), (2, 2)])
def test_an_update_of_raft(devices, microbatch):
  alpha_bar = np.linspace(0.9, 0.1, 10, dtype=np.float32)
  process = ddim.DDIM(*np.zeros((4, 1), np.float32), alpha_bar, "epsilon")
  mesh = sharding.make_mesh(count=devices)
  policy = Policy(Scale(), process, guidance_scale=2.0)
  learner = Learner(policy, optax.sgd(1.0), mesh, microbatch=microbatch)
  learning = Raft(one_in=4, updates=2).bind(learner)
  latents = np.random.RandomState(0).normal(size=(16, 2, 2, 1)).astype(np.float32)
  # Of each four the best: number 2, 7, 8 (the first of the equal ones), none.
  scores = np.array([1, NAN, 3, 2, 0, 0, 0, 1, 5, 5, 5, 5, *[NAN] * 4], np.float32)
  latents[12] = np.nan
  place = functools.partial(sharding.put, sharding=sharding.batch(mesh))
  text = Guidance(Conditioning(place(np.zeros((16, 1, 1), np.float32))))
  moment = Moment(seed=3, iteration=1, task=0)
  drawn = Drawn(place(np.zeros((16, 1, 1, 3), np.float32)), text, place(latents))
  batch = Batch([Prompt("a")] * 16, 4, drawn, place(scores), moment, slope=None)
  state = TrainState({"w": jnp.float32(0.5)}, learner.optimizer.init({"w": 0.5}), None)
  state, numbers = learning.learn(state, {}, batch, None)
  metrics = numbers()

  # By hand: two steps of w -= d/dw mean (w x_t - noise)^2 over the three that are kept.
  w, errors, norms = 0.5, [], []
  count = max(4, devices, 2 * microbatch)  # Filled up to a whole part for every device.
  for number in range(2):
    key = jax.random.fold_in(jax.random.fold_in(moment.key(), 2**31), number)
    timesteps, noise = losses.denoising_noise(key, (count, 2, 2, 1), 10)
    alpha = alpha_bar[np.asarray(timesteps)[:3]][:, None, None, None]
    noise = np.asarray(noise)[:3]
    noisy = np.sqrt(alpha) * latents[[2, 7, 8]] + np.sqrt(1 - alpha) * noise
    errors.append(np.mean((w * noisy - noise) ** 2))
    norms.append(np.mean(2 * (w * noisy - noise) * noisy))
    w -= norms[-1]
  assert float(state.params["w"]) == pytest.approx(w, rel=1e-5)
  assert metrics["loss/denoising"] == pytest.approx(np.mean(errors), rel=1e-5)
  assert metrics["grad_norm"] == pytest.approx(np.mean(np.abs(norms)), rel=1e-5)
  assert metrics["kept/reward"] == 3.0  # (3 + 1 + 5) / 3
  # The shapes of its program are those that compilation ahead of time is told.
  (call,) = learning.calls(state, {}, drawn)
  assert call.times == 2 and call.args[4].shape == (count,)
  cached = call.program._cache_size()
  learning.learn(state, {}, dataclasses.replace(batch, scores=place(scores[::-1].copy())), None)
  assert call.program._cache_size() == cached


# ---------------------------------------------------------------------------- a weighted run


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
