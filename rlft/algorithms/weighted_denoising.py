"""Reward-weighted denoising: the ordinary denoising loss on drawn images, weighted by reward.

    loss = 1 / B sum_i v_i |prediction(x_t, prompt_i) - target|^2,   x_t from the drawn latent i

There are two in the literature, and both are called reward-weighted regression:
  - Lee et al., "Aligning Text-to-Image Models using Human Feedback" (arXiv 2302.12192), as the
    paper (arXiv 2401.12244) runs it: the *base* model draws, and v is the reward scaled to [0, 1]
    by the batch's least and largest. Its beta, 0.5 there, is --pretrain_weight.
  - Peng & Levine's weights, as in DDPO's paper (arXiv 2305.13301): v is exp(r / temperature),
    normalised over the batch, and the current model draws.
"""

from collections.abc import Iterator, Sequence
import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlft.algorithms import losses
from rlft.algorithms.base import Batch, Call, Learner
from rlft.config.settings import PolicySettings, TaskConfig
from rlft.parallel import sharding
from rlft.types import Collect, Drawn, TrainState, UserError

_NOISE_STREAM = 2**31  # streams below are the images' own keys


@dataclasses.dataclass(frozen=True)
class RewardWeighted:
  """The settings.

  Attributes:
    weights: 'min-max' (Lee et al.) or 'exponential' (Peng & Levine).
    temperature: of the exponential, in units of the reward.
    draw: whose weights draw, the 'base' model's or the 'current' ones; by default as the source of
      the weights has it.
    updates: steps of the optimizer on an iteration's images, each with noise of its own.
  """

  weights: Literal["min-max", "exponential"] = "min-max"
  temperature: float = 1.0
  draw: Literal["base", "current"] | None = None
  updates: int = 1

  collects: ClassVar[Collect] = "latents"

  def __post_init__(self):
    for name in ("temperature", "updates"):
      if getattr(self, name) <= 0:
        raise UserError(
          f"--algorithm=reward-weighted?{name}={getattr(self, name):g}: {name} must be greater than"
          " 0"
        )

  @property
  def draws_with(self) -> Literal["current", "base"]:
    """Whose weights draw the images."""
    return self.draw or ("base" if self.weights == "min-max" else "current")

  @property
  def needs_base(self) -> bool:
    """The loss itself knows no base."""
    return False

  def check(self, policy: PolicySettings, tasks: Sequence[TaskConfig]) -> None:
    """Every policy and task will do."""

  def check_task(
    self, task: TaskConfig, *, prompts: int, iterations: int, same_in_set: bool
  ) -> None:
    """Raises UserError where all images would have one weight."""
    if same_in_set and task.batch_size == task.images_per_prompt:
      raise UserError(
        f"--task=name={task.name}: all images of a prompt get the score of their set, so all of a"
        " batch of a single set weigh the same: use"
        f" batch_size={2 * task.images_per_prompt} or more"
      )

  def compared(self, images_per_prompt: int) -> None:
    """Weights are relative to the whole batch."""

  def memory(self) -> None:
    """Nothing is remembered from one iteration to the next."""

  def bind(self, learner: Learner) -> "Learning":
    """Makes the program."""
    return Learning(self, learner)


def min_max(rewards: jax.Array) -> jax.Array:
  """(r - min) / (max - min) over the batch: `[B]` in [0, 1]; 0 where r is NaN, or all are equal."""
  valid = jnp.isfinite(rewards)
  low = jnp.min(rewards, where=valid, initial=jnp.inf)
  high = jnp.max(rewards, where=valid, initial=-jnp.inf)
  spread = high - low
  scaled = (rewards - low) / jnp.where(spread > 0, spread, 1.0)
  return jnp.where(valid & (spread > 0), scaled, 0.0)


def exponential(rewards: jax.Array, temperature: float) -> jax.Array:
  """exp(r / temperature), normalised to a mean of 1 over the valid rewards; `[B]`, 0 for NaN."""
  valid = jnp.isfinite(rewards)
  shares = jax.nn.softmax(jnp.where(valid, rewards / temperature, -jnp.inf))
  return jnp.where(valid, shares * valid.sum(), 0.0)


def image_weights(settings: RewardWeighted, rewards: jax.Array) -> jax.Array:
  """`[B]` weights v of the images, from `[B]` rewards."""
  if settings.weights == "min-max":
    return min_max(rewards)
  return exponential(rewards, settings.temperature)


def effective_share(weights: jax.Array) -> jax.Array:
  """(sum v)^2 / (B sum v^2): the share of the images that equal weights would have to fall on."""
  return weights.sum() ** 2 / jnp.maximum(len(weights) * jnp.sum(weights**2), 1e-9)


class Learning:
  """The algorithm with its program.

  Attributes:
    update: `(state, frozen, latents, text, rewards, key) -> (state, metrics)`: one step of the
      optimizer; the state is donated.
  """

  def __init__(self, settings: RewardWeighted, learner: Learner):
    self._settings = settings
    self._learner = learner
    process = learner.policy.process

    def update(state, frozen, latents, text, rewards, key):
      timesteps, noise = losses.denoising_noise(key, latents.shape, process.train_timesteps)
      mask = jnp.isfinite(rewards)
      weights, means = image_weights(settings, rewards), losses.mean_weights(mask)

      def loss(trained, base, part):
        *inputs, weight = part
        denoise = learner.policy.denoiser(learner.weights(trained, base))
        errors = losses.denoising_error(denoise, process, *inputs)
        return losses.weighted_sum(errors, weight), errors

      rows = jax.tree.map(lambda x: x[None], (latents, text, timesteps, noise, weights * means))
      gradient, errors = learner.gradient(loss, state, frozen, losses.zero_where_not(mask, rows))
      metrics = {
        "loss/denoising": losses.weighted_sum(errors[0], means),
        "weights/effective_share": effective_share(weights),
        "grad_norm": optax.tree.norm(gradient),
      }
      return learner.step(state, gradient), metrics

    self.update = sharding.jit(update, donate_argnums=0)

  def learn(
    self, state: TrainState, frozen: Any, batch: Batch, memory: None
  ) -> tuple[TrainState, dict[str, float]]:
    """`updates` steps, each with noise and timesteps of its own; see `base.Learning`."""
    del memory
    key = jax.random.fold_in(batch.moment.key(), _NOISE_STREAM)
    found = []
    for number in range(self._settings.updates):
      state, values = self.update(
        state,
        frozen,
        batch.drawn.collected,
        batch.drawn.text.prompt,
        batch.scores,
        jax.random.fold_in(key, number),
      )
      found.append(values)
    found = jax.device_get(found)
    return state, {name: float(np.mean([one[name] for one in found])) for name in found[0]}

  def calls(self, state: Any, frozen: Any, drawn: Drawn) -> Iterator[Call]:
    """The update; see `base.Learning`."""
    mesh = self._learner.mesh
    rewards = jax.ShapeDtypeStruct((len(drawn.images),), jnp.float32, sharding=sharding.batch(mesh))
    key = jax.eval_shape(lambda: jax.random.key(0))
    args = (state, frozen, drawn.collected, drawn.text.prompt, rewards, key)
    yield Call(self.update, args, self._settings.updates)
