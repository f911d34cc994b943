"""Which rewards have a gradient, and the gradient of a batch's scores."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft import catalog
from rlft.config.settings import TaskConfig
from rlft.emoji import prompts as emoji_prompts
from rlft.emoji import world
from rlft.parallel import sharding
from rlft.rewards import diversity, sets
from rlft.rewards.scoring import gradient, scorer
from rlft.rewards.scoring.scorer import Scorer
from rlft.rewards.scoring.task import task_reward
from rlft.types import HostReward, JaxReward, Prompt, UserError

B = 8
IMAGES = jax.ShapeDtypeStruct((B, 4, 4, 3), jnp.float32)


def mean(images):
  return images.mean((1, 2, 3))


def called_back(images):
  return jax.pure_callback(mean, jax.ShapeDtypeStruct((B,), jnp.float32), images)


@pytest.mark.parametrize(
  ("function", "expected"),
  [
    (mean, True),
    (jax.jit(mean), True),
    (lambda x: jnp.maximum(mean(x), 2.0), True),  # A derivative that happens to be 0.
    (lambda x: mean(x) > 0.5, False),
    (jax.jit(lambda x: (mean(x) > 0.5).astype(jnp.float32)), False),
    (lambda x: jnp.argmax(x.mean((1, 2)), axis=1).astype(jnp.float32), False),
    (lambda x: mean(jnp.round(255 * x) / 255), False),
    (lambda x: mean((255 * x).astype(jnp.uint8).astype(jnp.float32)), False),
    (lambda x: jax.lax.map(lambda one: jnp.floor(one).mean(), x), False),
    (lambda x: mean(jax.lax.stop_gradient(x)), False),
    (called_back, False),
  ],
)
def test_what_can_be_differentiated(function, expected):
  assert gradient.is_differentiable(function, IMAGES) == expected


def test_a_mistake_in_a_reward_is_no_missing_gradient():
  with pytest.raises(ValueError, match="its own"):
    gradient.is_differentiable(lambda x: (_ for _ in ()).throw(ValueError("its own")), IMAGES)


# Of those that need files of weights, the gradients are compared with PyTorch's in their own tests.
@pytest.mark.parametrize(
  ("name", "kind", "expected"),
  [
    ("emoji-objects", "pair", True),
    ("emoji-preference", "preference", True),
    ("emoji-tone-parity", "portrait", False),
    ("emoji-tone-parity?shares=soft", "portrait", True),
    ("skin-tone-parity", "portrait", False),
    ("oracle-both", "pair", False),
    ("oracle-presence", "pair", False),
    ("oracle-preference", "preference", True),
    ("oracle-parity", "portrait", False),
  ],
)
def test_which_rewards_have_a_gradient(name, kind, expected):
  reward = catalog.make_reward(name)
  prompts = emoji_prompts.prompts(kind, "train")[:2]
  assert gradient.has_gradient(reward, prompts, 4, (32, 32, 3)) == expected


@pytest.mark.parametrize("name", ["emoji-objects", "emoji-preference", "oracle-preference"])
def test_gradients_are_the_slopes_of_scores(name):
  """Along the gradient itself, where all of it counts, and along a random direction."""
  reward = catalog.make_reward(name)
  prompts = emoji_prompts.prompts("pair", "train")[:2]
  features = scorer.prepared(reward, prompts)
  random = np.random.RandomState(0)
  # Grainy pictures of the prompts: of grain alone the last reward is 0, and flat.
  scenes = [
    world.render_scene(np.random.default_rng(0), "pair", objects=prompt.metadata["objects"]).image
    / 255
    for prompt in prompts
  ]
  images = 0.7 * np.stack(scenes) + 0.3 * random.uniform(0.2, 0.8, (2, 32, 32, 3))
  images = jnp.asarray(images.astype(np.float32))

  @jax.jit
  def total(images):
    return scorer.apply(reward, 1, reward.params, images, features).values.sum()

  found = jax.jit(lambda x: scorer.slope(reward, 1, reward.params, x, features).gradient)(images)
  for direction in (found, random.standard_normal(images.shape)):
    direction = direction / np.linalg.norm(direction)
    step = 3e-3
    slope = (total(images + step * direction) - total(images - step * direction)) / (2 * step)
    np.testing.assert_allclose(np.vdot(found, direction), slope, rtol=0.02, atol=1e-3)
  assert float(jnp.abs(found).max()) > 1e-6


def batch(devices, values, group=1):
  """A mesh's sharding, `[B, 2, 2, 3]` images of these values, and prompts in sets."""
  rows = sharding.batch(sharding.make_mesh(count=devices))
  images = np.broadcast_to(np.float32(values)[:, None, None, None], (B, 2, 2, 3))
  return rows, jax.device_put(images, rows), [Prompt(f"{i // group}") for i in range(B)]


def slope(reward, rows, images, prompts, group=1):
  settings = {"batch_size": B, "images_per_prompt": group, "timeout_s": 1.0, "threads": 1}
  with Scorer(reward, batch_sharding=rows, **settings) as made:
    found = made.slope(images, prompts)
  assert all(x.sharding.is_equivalent_to(rows, x.ndim) for x in (found.scores, found.gradient))
  return np.asarray(found.scores), np.asarray(found.gradient)


@pytest.mark.parametrize("devices", [1, 8])
def test_an_image_without_a_score_has_no_gradient(devices):
  values = [1.0, 2.0, -1.0, 0.5, 0.0, 3.0, 4.0, -2.0]
  # The root of what is below 0 is NaN, its derivative too; at 0 that is infinite.
  reward = JaxReward("root", lambda params, x, _: jnp.sqrt(params * x.mean((1, 2, 3))), params=4.0)
  found, change = slope(reward, *batch(devices, values))
  np.testing.assert_allclose(found, np.sqrt(4 * np.where(np.array(values) < 0, np.nan, values)))
  # d sqrt(4 m) / d x = 2 / sqrt(4 m) / 12 for each of 12 numbers.
  expected = [1 / 12, 0.5**0.5 / 12, 0, 2**0.5 / 12, np.inf, 3**-0.5 / 12, 1 / 24, 0]
  np.testing.assert_allclose(change[:, 0, 0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_score_of_a_set_counts_for_each_of_its_images(devices):
  # Minus the variance of the four means of a set: d / d m_i = -2 (m_i - mean) / 4.
  def evenness(params, images, features):
    return -jnp.var(images.mean((2, 3, 4)), axis=1)

  values = np.array([1.0, 2.0, 3.0, 6.0, 0.0, 0.0, 0.0, 4.0])
  reward = JaxReward("even", evenness, is_set=True)
  found, change = slope(reward, *batch(devices, values, group=4), group=4)
  np.testing.assert_allclose(found, np.repeat([-3.5, -3.0], 4), rtol=1e-6)
  means = np.repeat([3.0, 1.0], 4)
  expected = 4 * -2 * (values - means) / 4 / 12
  np.testing.assert_allclose(change[:, 1, 1, 2], expected, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------------- what is refused

SETS = {
  "vendi": sets.set_reward("v", lambda _, x: x.mean((1, 2)), diversity.vendi),
  "credit": sets.set_reward(
    "c", lambda _, x: x.mean((1, 2)), diversity.vendi, credit="leave-one-out"
  ),
  "host": HostReward("host", lambda images, prompts, metadata: images.mean((1, 2, 3))),
  "step": JaxReward("step", lambda params, x, _: (mean(x) > 0.5).astype(jnp.float32)),
  "mean": JaxReward("mean", lambda params, x, _: mean(x)),
}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"reward": "host"}, "reward=host is computed on the host"),
    ({"reward": "jpeg"}, "reward=jpeg is computed on the host"),
    ({"reward": "credit"}, "is the credit of images within their set, .*: use it with credit=set"),
    ({"reward": "mean + 2*vendi"}, "adds up rewards relative to their batch.*: give one reward"),
    ({"reward": "mean", "veto": "step>=1"}, "veto=step>=1, which only ranks images"),
    ({"reward": "step"}, "reward=step has no gradient: its score changes in steps"),
    (
      {"reward": "emoji-tone-parity"},
      "reward=emoji-tone-parity has no gradient.*follows the reward's gradient: use another reward",
    ),
  ],
)
def test_rewards_without_a_gradient_are_refused_by_name(changes, message):
  def check(**changes):
    task = TaskConfig(name="t", prompts="-", images_per_prompt=4, **changes)
    reward = task_reward(task, lambda name: SETS.get(name) or catalog.make_reward(name))
    gradient.check_kind(task, reward, "refl?last=5")
    gradient.check_path(task, reward, "refl?last=5", [Prompt("a")], (32, 32, 3))

  check(reward="mean", watch="host")
  check(reward="vendi")
  with pytest.raises(UserError, match=message) as error:
    check(**changes)
  assert "\n" not in str(error.value) and "--algorithm=refl?last=5" in str(error.value)
  assert re.match("--task=name=t: reward=", str(error.value))
