"""ReFL and DRaFT: on literals, in a whole run, against finite differences and PyTorch."""

import functools
import shutil

import blip_cases
from flax import linen as nn
import jax
import jax.numpy as jnp
import models_cases
import numpy as np
import optax
import pytest
import train_cases as cases

from rlft import catalog
from rlft.algorithms.base import Batch, Learner
from rlft.algorithms.reward_gradient import DRaFT, ReFL
from rlft.config.settings import AlgorithmSettings, PolicySettings
from rlft.diffusion import rollout
from rlft.diffusion.ddim import DDIM
from rlft.diffusion.decoder import Decoder
from rlft.diffusion.policy import Policy, make_policy
from rlft.models import stable_diffusion
from rlft.models.files import pretrained, torch_layout
from rlft.models.lora import Weights
from rlft.parallel import sharding
from rlft.parallel.compiled import compilations
from rlft.rewards.scoring.scorer import Scorer
from rlft.run import state as state_lib
from rlft.types import (
  Conditioning,
  Drawn,
  Guidance,
  Moment,
  Prompt,
  Slope,
  TrainState,
  Trajectory,
  UserError,
)

# An optimizer that keeps the gradient for its state.
KEEP = optax.GradientTransformation(
  lambda params: jax.tree.map(jnp.zeros_like, params),
  lambda gradient, state, params: (jax.tree.map(jnp.zeros_like, gradient), gradient),
)


def learn(learning, params, path, slope, *, text=None, moment=None, frozen=None):
  """The gradient and the metrics of an iteration, from latents `[T+1, B, H, W, C]`."""
  count = path.shape[1]
  text = text or Guidance(Conditioning(jnp.zeros((count, 1, 1))))
  drawn = Drawn(jnp.zeros((count, 2, 2, 3)), text, Trajectory(path, jnp.zeros(path.shape[:2])))
  batch = Batch([Prompt("a")] * count, 1, drawn, jnp.zeros(count), moment or Moment(0, 0, 0), slope)
  state = TrainState(params, KEEP.init(params), None)
  state, numbers = learning.learn(state, frozen or {}, batch, None)
  return state.opt, numbers()


# ---------------------------------------------------------------------------- literals

# Two steps, from alpha_bar 0.36 over 0.64 to 0.81.
PROCESS = DDIM(
  timesteps=np.array([1, 0], np.int32),
  alpha=np.array([0.36, 0.64], np.float32),
  alpha_prev=np.array([0.64, 0.81], np.float32),
  std=np.array([0.48, 0.3], np.float32),
  alpha_bar=np.array([0.64, 0.36], np.float32),
  prediction_type="epsilon",
)
W = 0.5
# With epsilon = w x: d x0hat / d w = -0.8 x / 0.6 at the first step, -0.6 x / 0.8 at the last; the
# means are 0.8 x0hat + 0.36 epsilon (0.36^2 = 1 - 0.64 - 0.48^2), and 0.9 x0hat + 0.1^0.5 epsilon.
CLEAN = (-0.8 / 0.6, -0.6 / 0.8)
MEAN = (0.8 * CLEAN[0] + 0.36, 0.9 * CLEAN[1] + 0.1**0.5)
PATH = np.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.7]], np.float32)[..., None, None, None]


class Scale(nn.Module):
  """A network of one weight: it predicts w x."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, timesteps, text):
    return self.param("w", nn.initializers.constant(W), ()) * x


def literal(algorithm, *, scores=(0.0, 0.0), rises=(1.0, 1.0), path=PATH, **moment):
  """The gradient with respect to w of two images with these scores and slopes."""
  learner = Learner(Policy(Scale(), PROCESS, guidance_scale=1.0), KEEP, sharding.make_mesh(count=1))
  graded = []

  def slope(latents):
    graded.append(np.asarray(latents).ravel())
    rise = jnp.asarray(rises, np.float32)[:, None, None, None]
    return Slope(jnp.asarray(scores, jnp.float32), jnp.broadcast_to(rise, latents.shape))

  moment = Moment(**({"seed": 0, "iteration": 0, "task": 0} | moment))
  params = {"w": jnp.float32(W)}
  found, metrics = learn(algorithm.bind(learner), params, path, slope, moment=moment)
  return float(found["w"]), metrics, graded


def refl_step(iteration):
  return ReFL(last=2).step(2, Moment(0, iteration, 0))


def test_refl_takes_the_prediction_at_one_of_the_last_steps():
  assert {refl_step(i) for i in range(8)} == {0, 1}
  for iteration in range(3):
    step = refl_step(iteration)
    found, metrics, (graded,) = literal(ReFL(last=2), iteration=iteration)
    x = PATH[step].ravel()
    signal, noise = ((0.6, 0.8), (0.8, 0.6))[step]
    np.testing.assert_allclose(graded, (x - noise * W * x) / signal, rtol=1e-6)
    # -1e-3 * mean(d x0hat / d w)
    assert found == pytest.approx(-1e-3 * CLEAN[step] * x.mean(), rel=1e-5)
    assert metrics == pytest.approx(
      {"graded/reward": 0, "graded/over_target": 0, "grad_norm": abs(found)}
    )


def test_steps_of_refl_are_the_last_ones_and_drawn_anew():
  steps = [ReFL().step(40, Moment(3, i, 0)) for i in range(200)]
  assert set(steps) == set(range(30, 40))
  assert steps[:20] != [ReFL().step(40, Moment(3, i, 1)) for i in range(20)]


def test_an_image_that_is_good_enough_has_no_gradient():
  step = refl_step(0)
  found, metrics, _ = literal(ReFL(last=2, target=1.5, scale=0.1), scores=(1.0, 1.5))
  assert found == pytest.approx(-0.1 * CLEAN[step] * PATH[step, 0].item() / 2, rel=1e-5)
  assert metrics["graded/over_target"] == 0.5 and metrics["graded/reward"] == 1.25


def test_nothing_to_learn_is_said_in_the_first_iteration():
  message = r"no slope at any image \(their mean is 22\), .* or, of refl, a target above it"
  with pytest.raises(UserError, match=message):
    literal(ReFL(last=2), scores=(21.0, 23.0))
  with pytest.raises(UserError, match="no slope at any image"):
    literal(DRaFT(), rises=(0.0, 0.0))
  found, metrics, _ = literal(ReFL(last=2), scores=(21.0, 23.0), iteration=1)
  assert found == 0 and metrics["graded/over_target"] == 1


def test_draft_takes_the_last_step():
  found, metrics, (graded,) = literal(DRaFT(noises=0), scores=(1.0, 4.0))
  np.testing.assert_array_equal(graded, PATH[2].ravel())
  # -r: minus the mean of d mean / d w, whatever the score.
  assert found == pytest.approx(-MEAN[1] * PATH[1].mean(), rel=1e-5)
  assert metrics == pytest.approx({"graded/reward": 2.5, "grad_norm": abs(found)})


def test_draft_lv_adds_noise_again():
  found, _, graded = literal(DRaFT(), rises=(1.0, 3.0), iteration=2)
  key = jax.random.fold_in(Moment(0, 2, 0).key(), 2**31)
  noise = np.asarray(jax.random.normal(key, (2, 2, 1, 1, 1)))
  again = (0.8 * PATH[2] + 0.6 * noise).reshape(2, 2)
  assert len(graded) == 3 and np.abs(again[0] - again[1]).min() > 0.1
  np.testing.assert_array_equal(graded[0], PATH[2].ravel())
  np.testing.assert_allclose(graded[1:], again * (1 - 0.6 * W) / 0.8, rtol=1e-6)
  # The mean over the drawn images and both noises.
  rises = np.array([1.0, 3.0])
  drawn, others = MEAN[1] * PATH[1].ravel() @ rises / 2, CLEAN[1] * again @ rises / 2
  assert found == pytest.approx(-(drawn + others.sum()) / 3, rel=1e-5)
  other, _, _ = literal(DRaFT(), rises=(1.0, 3.0), iteration=2, task=1)
  assert other != found


def test_draft_k_goes_through_several_steps():
  found, _, (graded,) = literal(DRaFT(truncate=2, noises=0))
  np.testing.assert_array_equal(graded, PATH[2].ravel())
  # The last mean is x (0.9 (1 - 0.6 w) / 0.8 + 0.1^0.5 w) with x as drawn; and d x / d w is that of
  # the first mean, as the noise between is a constant.
  slope = 0.9 * (1 - 0.6 * W) / 0.8 + 0.1**0.5 * W
  expected = PATH[1].mean() * MEAN[1] + PATH[0].mean() * MEAN[0] * slope
  assert found == pytest.approx(-expected, rel=1e-5)


@pytest.mark.parametrize("algorithm", [ReFL(last=2), DRaFT(), DRaFT(truncate=2, noises=0)])
def test_an_image_without_a_score_leaves_nothing_behind(algorithm):
  alone, expected, _ = literal(algorithm, path=PATH[:, :1], scores=(3e-3,), rises=(1.0,))
  for broken in (3.0, np.nan):
    path = np.concatenate([PATH[:, :1], np.full_like(PATH[:, :1], broken)], axis=1)
    # A slope is 0 where there is no score.
    found, metrics, _ = literal(algorithm, path=path, scores=(3e-3, np.nan), rises=(1.0, 0.0))
    if isinstance(algorithm, DRaFT) and algorithm.noises:  # Noise of another shape.
      assert np.isfinite(found) and metrics["graded/reward"] == pytest.approx(3e-3)
    else:
      assert found == pytest.approx(alone, rel=1e-6) and metrics == pytest.approx(expected)


# ---------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
  ("spec", "expected"),
  [
    ("refl", ReFL(last=10, target=2.0, scale=1e-3, guidance=True)),
    ("refl?last=5&target=0.9&scale=1&guidance=false", ReFL(5, 0.9, 1.0, False)),
    ("draft", DRaFT(truncate=1, noises=2)),
    ("draft?truncate=10&noises=0", DRaFT(10, 0)),
  ],
)
def test_options(spec, expected):
  found = catalog.make_algorithm(AlgorithmSettings(algorithm=spec))
  assert found == expected
  assert found.slopes == (1 if spec.startswith("refl") else 1 + found.noises)


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("refl?last=1", "last=1 grades the very last prediction only.*: give 2 or more"),
    ("refl?scale=0", "scale must be greater than 0"),
    ("refl?last=60", "last=60 is more than --sampling_steps=50"),
    ("draft?truncate=0", "truncate must be at least 1"),
    ("draft?noises=-1", "noises must be at least 0"),
    ("draft?truncate=3", r"give noises=0 with it \(DRaFT-K\), or truncate=1"),
    ("draft?truncate=51&noises=0", "truncate=51 is more than --sampling_steps=50"),
  ],
)
def test_mistakes(spec, message):
  with pytest.raises(UserError, match=message) as error:
    algorithm = catalog.make_algorithm(AlgorithmSettings(algorithm=spec))
    algorithm.check(PolicySettings(sampling_steps=50), [])
  assert "\n" not in str(error.value) and f"--algorithm={spec.split('?')[0]}?" in str(error.value)


# ---------------------------------------------------------------------------- a whole model


B = len(blip_cases.PROMPTS)
GUIDANCE, STEPS = 2.0, 3
ALGORITHMS = {
  "refl": ReFL(last=2),
  "refl_unguided": ReFL(last=2, guidance=False),
  "draft": DRaFT(),
  "draft_2": DRaFT(truncate=2, noises=0),
}


@functools.cache
def model():
  return cases.tiny_model()


def policy():
  return make_policy(model(), sampling_steps=STEPS, guidance_scale=GUIDANCE)


@functools.cache
def given():
  """The texts' states, a trajectory `[T+1, B, 4, 4, 4]`, and the noise of its steps."""
  prompt, empty = np.random.RandomState(1).standard_normal((2, B, 16, 8)).astype(np.float32)
  empty[:] = empty[0]
  text = Guidance(Conditioning(prompt), Conditioning(empty))
  keys, shape = jax.random.split(jax.random.key(0), B), (4, 4, 4)

  @jax.jit
  def walk(params):
    start = rollout.normal(keys, STEPS, shape)
    return rollout.sample(policy(), Weights(params), start, text, keys).latents

  noise = [rollout.normal(keys, index, shape) for index in range(STEPS)]
  return text, np.asarray(walk(model().params["unet"])), np.stack(noise)


REWARD = blip_cases.reward("small")
PROMPTS = [Prompt(text) for text in blip_cases.PROMPTS]


@functools.cache
def chain(name):
  """The gradient by the algorithm's programs, with the decoder and ImageReward; and metrics."""
  mesh = sharding.make_mesh(count=1)
  learning = ALGORITHMS[name].bind(Learner(policy(), KEEP, mesh))
  decoder = Decoder(model(), mesh, chunk=1)
  rows = sharding.batch(mesh)
  settings = {"batch_size": B, "images_per_prompt": 1, "timeout_s": 1.0, "threads": 1}
  with Scorer(REWARD, batch_sharding=rows, **settings) as made:

    def slope(latents):
      found = made.slope(decoder.decode(model().params["vae"], latents), PROMPTS)
      return Slope(found.scores, decoder.pull(model().params["vae"], latents, found.gradient))

    return learn(learning, model().params["unet"], given()[1], slope, text=given()[0])


def by_torch(name):
  """The same gradient by diffusers' UNet, VAE and scheduler and PyTorch's ImageReward."""
  import diffusers
  import torch

  algorithm, guided = ALGORITHMS[name], name != "refl_unguided"
  unet, vae = (
    models_cases.torch_model(getattr(model(), n), model().params[n]) for n in ("unet", "vae")
  )
  scheduler = diffusers.DDIMScheduler.from_config(dict(model().scheduler))
  scheduler.set_timesteps(STEPS)
  text, path, noise = given()
  prompt, empty = torch.from_numpy(text.prompt.text), torch.from_numpy(text.empty.text)
  reward = blip_cases.torch_reward("small")

  def first(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)

  def stepped(index, latents, **settings):
    timestep = scheduler.timesteps[index]
    output = unet(latents, timestep, prompt).sample
    if guided:
      unconditional = unet(latents, timestep, empty).sample
      output = unconditional + GUIDANCE * (output - unconditional)
    return scheduler.step(output, timestep, latents, eta=1.0, **settings)

  step = algorithm.step(STEPS, Moment(0, 0, 0))
  finals = []
  if algorithm.truncate:
    latents = first(path[step])
    for index in range(step, STEPS):
      latents = stepped(index, latents, variance_noise=first(noise[index])).prev_sample
    finals.append(latents)
    key = jax.random.fold_in(Moment(0, 0, 0).key(), 2**31)
    for again in jax.random.normal(key, (algorithm.noises, *path.shape[1:])):
      noisy = scheduler.add_noise(first(path[-1]), first(again), scheduler.timesteps[step])
      finals.append(stepped(step, noisy).pred_original_sample)
  else:
    finals.append(stepped(step, first(path[step])).pred_original_sample)
  losses = []
  for latents in finals:
    images = vae.decode(latents / vae.config.scaling_factor).sample
    scores = reward((images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))
    relu = torch.nn.functional.relu
    losses.append(-scores.mean() if algorithm.truncate else 1e-3 * relu(2 - scores).mean())
  torch.stack(losses).mean().backward()
  return {key: value.grad.numpy() for key, value in unet.named_parameters()}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradients_are_those_of_pytorch(name):
  pytest.importorskip("torch")
  pytest.importorskip("diffusers")
  pytest.importorskip("transformers")
  found = torch_layout.to_torch(jax.tree.map(np.asarray, chain(name)[0]))
  expected = by_torch(name)
  assert found.keys() == expected.keys()
  size = np.sqrt(sum(np.square(x).sum() for x in expected.values()))
  for key, value in expected.items():
    np.testing.assert_allclose(found[key], value, rtol=1e-3, atol=1e-5 * size, err_msg=key)


# ---------------------------------------------------------------------------- a run

# On sets of two images; the prompt "two cats" cannot be scored. FAILS_AT is a call of `prepare`:
# after two before the run, an iteration has one to score and three to learn.
_REWARDS = """
import os

import jax.numpy as jnp
import numpy as np

calls = 0


def contrast(images, features):
  return jnp.log(jnp.var(images, axis=(1, 2, 3, 4)) * features[:, 0])


def prepare(prompts, metadata):
  global calls
  calls += 1
  if calls == int(os.environ.get("FAILS_AT", 0)):
    raise ValueError("no luck")
  return np.array([-1.0 if prompt == "two cats" else 1.0 for prompt in prompts], np.float32)


contrast.is_set = True
contrast.prepare = prepare


def bright(images):
  return (images.mean((1, 2, 3)) > 0.5).astype(jnp.float32)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = cases.folder(tmp_path_factory)
  (folder / "gradient_rewards.py").write_text(_REWARDS)
  return folder


def config(folder, workdir, reward="jax:contrast", **changes):
  """DRaFT-LV of a LoRA, without a pretraining loss, as in the paper."""
  rewards = folder / "gradient_rewards.py"
  settings = {
    "task": (cases.task(folder, "t", reward, rewards, images_per_prompt=2),),
    "algorithm": "draft",
    "lora_rank": 2,
    "pretrain_weight": 0.0,
    "max_nan_share": 0.5,
    "train_timesteps": 5,
    "clip_range": 1e-4,
  }
  return cases.config(folder, workdir, **(settings | changes))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
  """Two iterations on one device: its directory and the calls of its updates."""
  workdir, calls = tmp_path_factory.mktemp("draft"), []
  cases.run(config(folder, workdir), calls=calls)
  return workdir, calls


def test_a_run_learns_and_says_what_it_did(run):
  workdir, calls = run
  first, second = cases.metrics(workdir)
  assert 0 < first["reward/t/unscored"] <= 0.5
  assert first["grad_norm"] == first["grad_norm/t"] > 0
  # One of three versions of each image is the drawn one; the others are near it.
  assert first["graded/reward/t"] == pytest.approx(first["reward/t/mean"], abs=0.1)
  assert not [key for key in first if "constant" in key or key.startswith("ratio/")]
  assert second["graded/reward/t"] != first["graded/reward/t"]
  before, after = (call.result[0].params for call in calls)
  assert max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), before, after))) > 0


def test_the_gradient_is_the_slope_of_the_loss(folder, run, tmp_path):
  """By finite differences along itself, where all of it counts, with the loss written out."""
  _, path, noisy, text, step, slopes = run[1][0].args
  state, metrics = run[1][0].result
  # Adam's first mean is a tenth of the gradient, whose norm is within its bound.
  gradient = jax.tree.map(lambda mean: 10 * mean, optax.tree.get(state.opt, "mu"))
  norm = float(metrics["grad_norm"])
  assert norm == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5) and 0 < norm < 1
  base = pretrained.load(folder / "model")
  adapter = state_lib.make_trained(config(folder, tmp_path), base.params["unet"])
  policy = make_policy(base, sampling_steps=3, guidance_scale=2.0, lora_scale=1.0)
  before, drawn = path.latents[2:]
  assert int(step) == 2 and noisy.shape == (2, *drawn.shape)
  scored = np.isfinite(slopes[0].scores)[::2]
  assert 0 < scored.sum() < 4

  @jax.jit
  def finals(adapter):
    def output(latents):
      weights = Weights(base.params["unet"], adapter)
      return policy.output(weights, 2, latents, policy.conditioned(weights, text))

    predicted = [policy.process.clean(2, latents, output(latents)) for latents in noisy]
    return policy.process.mean(2, before, output(before)), *predicted

  noise = drawn - finals(adapter)[0]

  @jax.jit
  def loss(way):
    mean, *predicted = finals(jax.tree.map(lambda a, g: a + way / norm * g, adapter, gradient))
    scores = []
    for latents in (mean + noise, *predicted):
      images = stable_diffusion.decode(base, base.params["vae"], latents)
      scores.append(jnp.log(jnp.var(images.reshape(4, -1), axis=1))[scored])
    return -jnp.mean(jnp.stack(scores))

  way = 0.05
  assert (loss(way) - loss(-way)) / (2 * way) == pytest.approx(norm, rel=0.02)


def test_sets_may_be_spread_over_devices(folder, run, tmp_path):
  """On eight devices each has one image, half a set."""
  calls = []
  cases.run(config(folder, tmp_path, iterations=1), devices=8, calls=calls)
  expected, found = run[1][0].result, calls[0].result
  for name, value in expected[1].items():
    np.testing.assert_allclose(found[1][name], value, rtol=1e-4, err_msg=name)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    found[0].params,
    expected[0].params,
  )


def test_a_reward_that_fails_while_it_is_learnt_from_loses_nothing(
  folder, run, tmp_path, monkeypatch
):
  # A copy, for its own count of calls: those of the first iteration are 3 to 6.
  rewards = shutil.copy(folder / "gradient_rewards.py", tmp_path)
  task = cases.task(folder, "t", "jax:contrast", rewards, images_per_prompt=2)
  settings = config(folder, tmp_path / "run", task=(task,))
  monkeypatch.setenv("FAILS_AT", "9")
  with pytest.raises(UserError, match="task t, iteration 1: .* raised ValueError: no luck"):
    cases.run(settings)
  assert len(cases.metrics(tmp_path / "run")) == 1
  cases.run(settings)
  cases.assert_same_run(tmp_path / "run", run[0])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"task": ("green", "host:green")},
      "is computed on the host, .* and --algorithm=refl.last=2 follows",
    ),
    ({"reward": "jax:bright"}, "gradient_rewards.py:bright has no gradient: its score changes in"),
  ],
)
def test_a_reward_without_a_gradient_stops_a_run_before_it_draws(
  folder, tmp_path, changes, message
):
  if "task" in changes:
    changes = {"task": (cases.task(folder, *changes["task"]),)}
  calls = []
  with pytest.raises(UserError, match=message), compilations() as compiled:
    cases.run(config(folder, tmp_path, algorithm="refl?last=2", **changes), calls=calls)
  assert not calls and not [name for name in compiled if "sample" in name]
