"""The policy gradient on literals, and what settings and tasks may not ask of it."""

import dataclasses
import math
import types

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlft import catalog
from rlft.algorithms import policy_gradient
from rlft.algorithms.base import Learner
from rlft.algorithms.policy_gradient import PolicyGradient
from rlft.config import fields
from rlft.config.settings import AlgorithmSettings, PolicySettings, TaskConfig
from rlft.diffusion.ddim import DDIM
from rlft.diffusion.policy import Policy
from rlft.parallel import sharding
from rlft.types import Conditioning, Guidance, Moment, TrainState, Trajectory, UserError

# One step from alpha_bar 0.36 to 0.64; its variance is 0.5625 * 0.4375 = 0.24609375.
STD = math.sqrt(0.24609375)
PROCESS = DDIM(
  timesteps=np.array([7], np.int32),
  alpha=np.array([0.36], np.float32),
  alpha_prev=np.array([0.64], np.float32),
  std=np.array([STD], np.float32),
  alpha_bar=np.array([0.64, 0.36], np.float32),
  prediction_type="epsilon",
)
# A second step, from 0.64 to 0.81; its variance is 0.19 / 0.36 * (1 - 0.64 / 0.81) = 0.1107682.
TWO_STEPS = dataclasses.replace(
  PROCESS,
  timesteps=np.array([7, 3], np.int32),
  alpha=np.array([0.36, 0.64], np.float32),
  alpha_prev=np.array([0.64, 0.81], np.float32),
  std=np.array([STD, math.sqrt(0.1107682)], np.float32),
)
W = 0.5
TASK = TaskConfig("t", "p", "r", batch_size=32, images_per_prompt=16)


class Scale(nn.Module):
  """A network of one weight: it predicts w x."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, timesteps, text):
    return self.param("w", nn.initializers.constant(W), ()) * x


def settings(**changes) -> PolicyGradient:
  values = fields.flat(AlgorithmSettings())
  del values["algorithm"]
  return PolicyGradient(**(values | {"clip_range": 0.1, "train_timesteps": 1} | changes))


def gradient(algorithm, advantages, *, w=W, old=W, latent=1.0, mask=None, process=PROCESS):
  """The gradient with respect to w of images of x_t = `latent` whose step was mean + std."""
  policy = Policy(Scale(), process, guidance_scale=1.0)
  learner = Learner(policy, optax.sgd(1.0), sharding.make_mesh(count=1))
  count = len(advantages)
  # As in test_ddim.py: epsilon = 0.5, so that the mean is 0.96875 at w = 0.5, x = 1.
  after = (0.8 * (1 - 0.8 * old) / 0.6 + 0.3375 * old + STD) * jnp.ones((count, 1, 1, 1))
  before = jnp.ones((count, 1, 1, 1)) * jnp.reshape(jnp.asarray(latent), (-1, 1, 1, 1))
  # z = 1 under the weights that drew: log p = -1/2 - ln std - ln(2 pi) / 2.
  log_prob = jnp.full((1, count), -0.5 - math.log(STD) - 0.5 * math.log(2 * math.pi))
  base = {"w": jnp.float32(0.0)}
  found, metrics = policy_gradient.policy_gradient(
    learner,
    algorithm,
    TrainState({"w": jnp.float32(w)}, None, None),
    {"unet": base} if algorithm.needs_base else {},
    Trajectory(jnp.stack([before, after]), log_prob),
    Guidance(Conditioning(jnp.zeros((count, 1, 1)))),
    jnp.asarray(advantages, jnp.float32),
    jnp.ones(count, bool) if mask is None else jnp.asarray(mask),
    jnp.array([0]),
  )
  return float(found["w"]), {name: float(value) for name, value in metrics.items()}


def test_the_gradient_of_the_first_update():
  # d mean / d w = 0.8 * (-0.8 / 0.6) + 0.3375 = -0.7291667; d log p / d w = z / std * that.
  # With a ratio of 1 the gradient of -A log p is A * 0.7291667 / 0.4960783 = 1.4698621 A.
  found, metrics = gradient(settings(), [2.0, 1.0])
  assert found == pytest.approx(1.4698621 * 1.5, rel=1e-5)
  assert metrics["grad_norm"] == pytest.approx(found)
  assert metrics["ratio/max_abs_deviation"] < 1e-6 and metrics["clip_fraction"] == 0


def test_a_clipped_image_has_no_gradient():
  # At w = 0.4 the mean is 0.0729167 higher, and z = 1 - 0.1469862: the ratio is exp(0.1361837).
  found, metrics = gradient(settings(), [1.0], w=0.4)
  assert found == 0 and metrics["clip_fraction"] == 1
  assert metrics["ratio/max_abs_deviation"] == pytest.approx(0.1459, abs=1e-4)
  # A worse image is not clipped on that side: ratio * z / std * 0.7291667 = 1.4367.
  found, metrics = gradient(settings(), [-1.0], w=0.4)
  assert found == pytest.approx(-1.4367, abs=1e-3) and metrics["clip_fraction"] == 0


def test_an_image_without_a_score_leaves_nothing_behind():
  alone, _ = gradient(settings(), [1.0])
  for broken in (3.0, np.nan):
    found, metrics = gradient(settings(), [1.0, 0.0], latent=[1.0, broken], mask=[True, False])
    assert found == pytest.approx(alone, rel=1e-6)
    assert all(np.isfinite(value) for value in metrics.values())


def test_the_divergence_from_the_base():
  # The base has w = 0, so its mean is 0.8 / 0.6; the difference is 0.7291667 * 0.5 = 0.3645833, and
  # the divergence that squared / (2 std^2) = 0.2700617, with a gradient of 2 * 0.2700617 / 0.5.
  plain, _ = gradient(settings(), [1.0])
  found, metrics = gradient(settings(kl_weight=0.1), [1.0])
  assert metrics["kl_to_base"] == pytest.approx(0.2700617, rel=1e-5)
  assert found - plain == pytest.approx(0.1 * 1.0802469, rel=1e-4)


def test_weights_of_timesteps():
  # d mean / d prediction is -0.7291667 in the first step (see above), and in the second
  # -0.9 * 0.6 / 0.8 + sqrt(0.19 - 0.1107682) = -0.3935187. std / that: 0.6803365 and 0.8457502, of
  # which the mean is 0.7630434.
  weights = policy_gradient.timestep_weights(TWO_STEPS)
  np.testing.assert_allclose(weights, [0.8916092, 1.1083908], rtol=1e-5)
  np.testing.assert_array_equal(policy_gradient.timestep_weights(TWO_STEPS, first=1), [1.0, 0.0])
  plain, _ = gradient(settings(), [1.0], process=TWO_STEPS)
  algorithm = settings(timestep_weights="prediction")
  found, metrics = gradient(algorithm, [1.0], process=TWO_STEPS, w=0.45)
  unclipped, expected = gradient(settings(), [1.0], process=TWO_STEPS, w=0.45)
  assert found == pytest.approx(0.8916092 * unclipped, rel=1e-5) and 0 < unclipped < plain
  # What is said of the ratio is as without weights.
  for name in metrics.keys() - {"grad_norm"}:
    assert metrics[name] == pytest.approx(expected[name]), name


def test_timesteps_are_drawn_anew_and_without_repetition():
  random = np.array([1, 2, 5, 7])
  each = [
    policy_gradient.picked_timesteps(settings(train_timesteps=3), random, Moment(0, i, 0))
    for i in range(20)
  ]
  assert {found.shape for found in each} == {(3, 1)}
  assert all(len(set(found.ravel())) == 3 and set(found.ravel()) <= set(random) for found in each)
  assert len({tuple(found.ravel()) for found in each}) > 5
  one = policy_gradient.picked_timesteps(
    settings(train_timesteps=3, accumulate_timesteps=True), random, Moment(0, 0, 0)
  )
  np.testing.assert_array_equal(one, each[0].T)
  for accumulate, shape in ((False, (4, 1)), (True, (1, 4))):
    all_ = settings(train_timesteps=0, accumulate_timesteps=accumulate)
    found = policy_gradient.picked_timesteps(all_, random, Moment(0, 0, 0))
    assert found.shape == shape and set(found.ravel()) == set(random)


def test_only_the_first_steps_are_trained():
  assert policy_gradient.trainable(TWO_STEPS).tolist() == [0, 1]
  assert policy_gradient.trainable(TWO_STEPS, first=1).tolist() == [0]


def bound(process=TWO_STEPS, **changes):
  policy = Policy(Scale(), process, guidance_scale=1.0)
  learner = Learner(policy, optax.sgd(1.0), sharding.make_mesh(count=1))
  return settings(**changes).bind(learner)


def advantages(scores, *, images_per_prompt=1, **changes):
  batch = types.SimpleNamespace(scores=jnp.array(scores), images_per_prompt=images_per_prompt)
  return np.asarray(bound(**changes)._advantages(batch, None)).tolist()


def test_a_run_normalises_as_its_flags_say():
  scores = [1.0, 3.0, 10.0, 30.0]
  assert advantages(scores, images_per_prompt=2, advantage="group") == pytest.approx([-1, 1, -1, 1])
  # Mean 11, deviation 11.467.
  assert advantages(scores) == pytest.approx([-0.872, -0.698, -0.087, 1.657], abs=1e-3)
  assert advantages(scores, advantage_clip=0.5) == pytest.approx(
    [-0.5, -0.5, -0.087, 0.5], abs=1e-3
  )
  assert bound(first=1)._random.tolist() == [0] and bound()._random.tolist() == [0, 1]


@pytest.mark.parametrize("deviation", [2e-5, float("nan")])
def test_a_ratio_that_is_not_one_ends_a_run(deviation):
  def numbers(deviation):
    return bound()._numbers([{"ratio/max_abs_deviation": deviation, "grad_norm": 1.0}])

  assert numbers(1e-6)["grad_norm"] == 1
  with pytest.raises(UserError, match="deviates from 1 by .* more than --ratio_tolerance=1e-05"):
    numbers(deviation)


def test_the_ratio_counts_before_the_first_update_only():
  updates = [{"ratio/max_abs_deviation": 0.0, "grad_norm": 1.0}]
  updates.append({"ratio/max_abs_deviation": 0.5, "grad_norm": 3.0})
  assert policy_gradient.summary(updates) == {"ratio/max_abs_deviation": 0.0, "grad_norm": 2.0}


def test_who_is_compared_and_what_is_remembered():
  for advantage, group in (("batch", None), ("prompt", None), ("group", 16)):
    algorithm = settings(advantage=advantage)
    assert algorithm.compared(16) == group
    assert (algorithm.memory() is None) == (advantage != "prompt")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"train_timesteps": 60}, "--train_timesteps=60 is more than --sampling_steps=50"),
    ({"prompt_history_min": 33}, "--prompt_history_min=33 is more than --prompt_history=32"),
    ({"prompt_history": 64}, "--prompt_history=64 has no effect with --advantage=batch: leave it"),
    ({"prompt_history_min": 8}, "--prompt_history_min=8 has no effect with --advantage=batch"),
    ({"advantage": "group"}, "images_per_prompt=1 every advantage is 0"),
    ({"first": 60}, "first=60 is out of range: give at most --sampling_steps=50, or 0 for all"),
    ({"first": 3, "train_timesteps": 4}, "--train_timesteps=4 is more than first=3"),
  ],
)
def test_contradictions(changes, message):
  single = dataclasses.replace(TASK, images_per_prompt=1)
  settings().check(PolicySettings(), [single])
  with pytest.raises(UserError, match=message):
    settings(**changes).check(PolicySettings(), [single])


@pytest.mark.parametrize(
  ("changes", "task", "message"),
  [
    ({"advantage": "group"}, {}, "--advantage=group every advantage is 0"),
    ({}, {"batch_size": 16}, "use batch_size=32 or more"),
    ({"advantage": "prompt"}, {}, "use --prompt_history_min=17 or more"),
    (
      {"advantage": "prompt"},
      {"images_per_prompt": 2},
      "1000 prompts are seen 3.2 times each, fewer than",
    ),
  ],
)
def test_tasks_that_cannot_be_learnt_from(changes, task, message):
  def check(algorithm, task, same_in_set=True, prompts=1000):
    algorithm.check_task(task, prompts=prompts, iterations=100, same_in_set=same_in_set)

  task = dataclasses.replace(TASK, **task)
  with pytest.raises(UserError, match=message):
    check(settings(**changes), task)
  check(settings(**changes), task, same_in_set=False, prompts=200)


def test_a_prompts_own_images_may_fill_its_history():
  algorithm = settings(advantage="prompt", prompt_history_min=16)
  algorithm.check_task(TASK, prompts=10**6, iterations=1, same_in_set=False)


# ---------------------------------------------------------------------------- DDPO and DPOK


def made(**given):
  return catalog.make_algorithm(fields.make(AlgorithmSettings, **given))


def test_named_relatives():
  ddpo = made(algorithm="ddpo?first=6")
  assert isinstance(ddpo, PolicyGradient)
  assert (ddpo.advantage, ddpo.accumulate_timesteps, ddpo.train_timesteps) == ("prompt", True, 0)
  assert (ddpo.first, ddpo.kl_weight, ddpo.clip_range) == (6, 0.0, 1e-4)
  dpok = made(algorithm="dpok")
  assert (dpok.kl_weight, dpok.needs_base, dpok.clip_range) == (0.01, True, 1e-4)
  assert dataclasses.replace(dpok, kl_weight=0.0) == made(algorithm="policy-gradient")
  assert made(algorithm="dpok", kl_weight=0.1, advantage="prompt").kl_weight == 0.1
  assert made(algorithm="ddpo", train_timesteps=5).train_timesteps == 5


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"algorithm": "ddpo", "advantage": "batch"}, "ddpo contradicts --advantage=batch"),
    ({"algorithm": "ddpo", "accumulate_timesteps": False}, "leave them out, or use --algorithm="),
    ({"algorithm": "dpok", "kl_weight": 0.0}, "dpok contradicts --kl_weight=0: give a weight"),
    ({"algorithm": "dpok?last=3"}, "unknown option 'last'"),
  ],
)
def test_a_name_is_not_given_to_what_it_is_not(given, message):
  with pytest.raises(UserError) as error:
    made(**given)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_too_few_random_steps():
  policy = Policy(Scale(), PROCESS, guidance_scale=1.0)
  learner = Learner(policy, optax.sgd(1.0), jax.make_mesh((1,), ("data",)))
  with pytest.raises(UserError, match="only 1 of the 1 sampling steps are random; lower it"):
    settings(train_timesteps=2).bind(learner)
