"""The ordinary denoising loss on drawn images: weighted by reward, or on the best of them.

    loss = 1 / B sum_i v_i |prediction(x_t, prompt_i) - target|^2,   x_t from the drawn latent i

There are two of the first kind, and both are called reward-weighted regression:
  - Lee et al., "Aligning Text-to-Image Models using Human Feedback" (arXiv 2302.12192), as the
    paper (arXiv 2401.12244) runs it: the *base* model draws, and v is the reward scaled to [0, 1]
    by the batch's least and largest. Its beta, 0.5 there, is --pretrain_weight.
  - Peng & Levine's weights, as in DDPO's paper (arXiv 2305.13301): v is exp(r / temperature),
    normalised over the batch, and the current model draws.

RAFT (arXiv 2304.06767): the current model draws, and v is 1 for the best, which alone are denoised.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlft.algorithms import losses
from rlft.algorithms.base import Batch, Call, Learner, Numbers
from rlft.config.settings import PolicySettings, TaskConfig
from rlft.parallel import sharding
from rlft.rewards.scoring.statistics import EPSILON
from rlft.types import Collect, Conditioning, Drawn, TrainState, UserError

_NOISE_STREAM = 2**31  # streams below are the images' own keys


# ---------------------------------------------------------------------------- weights of images


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
  slopes: ClassVar[int] = 0

  def __post_init__(self):
    for name in ("temperature", "updates"):
      if getattr(self, name) <= 0:
        raise UserError(
          f"--algorithm=reward-weighted?{name}={getattr(self, name):g}: {name} must be greater than"
          " 0"
        )
    if self.weights != "exponential" and self.temperature != RewardWeighted.temperature:
      raise UserError(
        f"--algorithm=reward-weighted?temperature={self.temperature:g} has no effect on weights="
        f"{self.weights}: leave it out, or add weights=exponential"
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
  differ = spread > EPSILON
  return jnp.where(valid & differ, (rewards - low) / jnp.where(differ, spread, 1.0), 0.0)


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


def denoising_step(
  learner: Learner,
  state: TrainState,
  frozen: Any,
  latents: jax.Array,
  text: Conditioning,
  weights: jax.Array,
  mask: jax.Array,
  key: jax.Array,
) -> tuple[TrainState, jax.Array, jax.Array]:
  """One step of the optimizer on the weighted sum of the denoising errors of images.

  Args:
    learner, state, frozen: see there.
    latents: `[B, H, W, C]`.
    text: `[B, ...]`.
    weights: `[B]`, of the errors in their sum.
    mask: `[B]` bool; images to be left out.
    key: consumed; of timesteps and noise.

  Returns:
    The state, `[B]` errors, and the gradient's norm.
  """
  process = learner.policy.process
  timesteps, noise = losses.denoising_noise(key, latents.shape, process.train_timesteps)

  def loss(trained, base, part):
    *inputs, weight = part
    denoise = learner.policy.denoiser(learner.weights(trained, base))
    errors = losses.denoising_error(denoise, process, *inputs)
    return losses.weighted_sum(errors, weight), errors

  rows = jax.tree.map(lambda x: x[None], (latents, text, timesteps, noise, weights))
  gradient, errors = learner.gradient(loss, state, frozen, losses.zero_where_not(mask, rows))
  return learner.step(state, gradient), errors[0], optax.tree.norm(gradient)


def repeated(
  update: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
  state: TrainState,
  frozen: Any,
  batch: Batch,
  signal: Sequence[Any],
  count: int,
) -> tuple[TrainState, Numbers]:
  """`count` updates on the images of a batch, each with noise of its own; the means of its metrics.

  Args:
    update: `(state, frozen, latents, text, *signal, key) -> (state, metrics)`.
    state: donated.
    frozen, batch: see `base.Learning`.
    signal: what is learnt from.
    count: of updates.
  """
  key = jax.random.fold_in(batch.moment.key(), _NOISE_STREAM)
  latents, text = batch.drawn.collected, batch.drawn.text.prompt
  found = []
  for number in range(count):
    own = jax.random.fold_in(key, number)
    state, values = update(state, frozen, latents, text, *signal, own)
    found.append(values)

  def numbers():
    fetched = jax.device_get(found)
    return {name: float(np.mean([one[name] for one in fetched])) for name in fetched[0]}

  return state, numbers


def _a_key() -> jax.ShapeDtypeStruct:
  return jax.eval_shape(lambda: jax.random.key(0))


class Learning:
  """Reward-weighted regression with its program.

  Attributes:
    update: `(state, frozen, latents, text, rewards, key) -> (state, metrics)`: one step of the
      optimizer; the state is donated.
  """

  def __init__(self, settings: RewardWeighted, learner: Learner):
    self._settings = settings
    self._learner = learner

    def update(state, frozen, latents, text, rewards, key):
      mask = jnp.isfinite(rewards)
      weights, means = image_weights(settings, rewards), losses.mean_weights(mask)
      signal = weights * means, mask, key
      state, errors, norm = denoising_step(learner, state, frozen, latents, text, *signal)
      metrics = {
        "loss/denoising": losses.weighted_sum(errors, means),
        "weights/effective_share": effective_share(weights),
        "grad_norm": norm,
      }
      return state, metrics

    self.update = sharding.jit(update, donate_argnums=0)

  def learn(
    self, state: TrainState, frozen: Any, batch: Batch, memory: None
  ) -> tuple[TrainState, Numbers]:
    """`updates` steps, each with noise and timesteps of its own; see `base.Learning`."""
    del memory
    signal = (batch.scores,)
    return repeated(self.update, state, frozen, batch, signal, self._settings.updates)

  def calls(self, state: Any, frozen: Any, drawn: Drawn) -> Iterator[Call]:
    """The update; see `base.Learning`."""
    rows = sharding.batch(self._learner.mesh)
    rewards = jax.ShapeDtypeStruct((len(drawn.images),), jnp.float32, sharding=rows)
    args = (state, frozen, drawn.collected, drawn.text.prompt, rewards, _a_key())
    yield Call(self.update, args, self._settings.updates)


# ---------------------------------------------------------------------------- the best images


@dataclasses.dataclass(frozen=True)
class Raft:
  """The settings of RAFT.

  Attributes:
    one_in: 1 of so many is kept; the acceptance ratio is 1 / 24 in the paper's comparison.
    choose: of what: of each prompt's 'images'; or whole 'sets' out of those of the batch, where
      all images of a prompt have the same score (and single images, with one for each prompt).
    updates: steps of the optimizer on what is kept of an iteration, each with noise of its own.
  """

  one_in: int = 24
  choose: Literal["images", "sets"] = "images"
  updates: int = 1

  collects: ClassVar[Collect] = "latents"
  draws_with: ClassVar[Literal["current", "base"]] = "current"
  needs_base: ClassVar[bool] = False
  slopes: ClassVar[int] = 0

  def __post_init__(self):
    for name, least in (("one_in", 2), ("updates", 1)):
      if getattr(self, name) < least:
        raise UserError(
          f"--algorithm=raft?{name}={getattr(self, name)}: {name} must be at least {least}"
        )

  def check(self, policy: PolicySettings, tasks: Sequence[TaskConfig]) -> None:
    """Raises UserError where the share that is kept is no whole number."""
    for task in tasks:
      sets = task.batch_size // task.images_per_prompt
      name, count, step = "images_per_prompt", task.images_per_prompt, self.one_in
      if self.choose == "sets":
        name, count, step = "batch_size", sets, self.one_in * task.images_per_prompt
      if count % self.one_in:
        other = f", or raft?one_in={count}" if count > 1 else ""
        raise UserError(
          f"--task=name={task.name}: --algorithm=raft keeps 1 of {self.one_in} {self.choose}, which"
          f" does not divide {count}: use {name}={step} or another multiple of {step}{other}"
        )

  def check_task(
    self, task: TaskConfig, *, prompts: int, iterations: int, same_in_set: bool
  ) -> None:
    """Raises UserError where the images to choose from all have one score."""
    if same_in_set and self.choose == "images":
      raise UserError(
        f"--task=name={task.name}: all images of a prompt get the score of their set, so that none"
        " is better than another: choose among the sets of the batch with raft?choose=sets"
      )

  def compared(self, images_per_prompt: int) -> int | None:
    """The images of a prompt, or the batch."""
    return images_per_prompt if self.choose == "images" else None

  def memory(self) -> None:
    """Nothing is remembered from one iteration to the next."""

  def bind(self, learner: Learner) -> "BestLearning":
    """Makes the program."""
    return BestLearning(self, learner)


def best(scores: np.ndarray, *, compared: int, one_in: int) -> np.ndarray:
  """The places of the best scores, a fixed number.

  Args:
    scores: `[N]`; NaN is worse than any number.
    compared: neighbours among which 1 of `one_in` is kept; divides N, and is divided by `one_in`.
    one_in: see there.

  Returns:
    `[N / one_in]` int64, the best of each `compared` first; of equal ones, that which comes first.
  """
  groups = np.where(np.isnan(scores), -np.inf, scores).reshape(-1, compared)
  order = np.argsort(-groups, axis=1, kind="stable")[:, : compared // one_in]
  return (order + compared * np.arange(len(groups))[:, None]).ravel()


def kept(settings: Raft, scores: np.ndarray, images_per_prompt: int) -> np.ndarray:
  """`[B / one_in]` places of the images to learn from, by `[B]` scores."""
  if settings.choose == "images":
    return best(scores, compared=images_per_prompt, one_in=settings.one_in)
  sets = scores.reshape(-1, images_per_prompt)
  scored = ~np.isnan(sets)
  means = np.where(scored, sets, 0).sum(axis=1) / np.maximum(scored.sum(axis=1), 1)
  means = np.where(scored.any(axis=1), means, np.nan)
  places = best(means, compared=len(sets), one_in=settings.one_in)
  return (places[:, None] * images_per_prompt + np.arange(images_per_prompt)).ravel()


class BestLearning:
  """RAFT with its program.

  Attributes:
    update: `(state, frozen, latents, text, places, mask, key) -> (state, metrics)`: one step of
      the optimizer on the images at `[n]` places, without those where `[n]` mask is False; the
      state is donated.
  """

  def __init__(self, settings: Raft, learner: Learner):
    self._settings = settings
    self._learner = learner

    def update(state, frozen, latents, text, places, mask, key):
      latents, text = jax.tree.map(lambda x: x[places], (latents, text))
      weights = losses.mean_weights(mask)
      signal = weights, mask, key
      state, errors, norm = denoising_step(learner, state, frozen, latents, text, *signal)
      return state, {"loss/denoising": losses.weighted_sum(errors, weights), "grad_norm": norm}

    self.update = sharding.jit(update, donate_argnums=0)

  def learn(
    self, state: TrainState, frozen: Any, batch: Batch, memory: None
  ) -> tuple[TrainState, Numbers]:
    """`updates` steps on the best images; see `base.Learning`."""
    del memory
    scores = sharding.fetch(batch.scores)
    places = kept(self._settings, scores, batch.images_per_prompt)
    mask = np.isfinite(scores[places])
    chosen = scores[places][mask]
    # Every device gets as many, in whole parts.
    padding = self._padded(len(places)) - len(places)
    signal = np.pad(places, (0, padding)).astype(np.int32), np.pad(mask, (0, padding))
    updates = self._settings.updates
    state, numbers = repeated(self.update, state, frozen, batch, signal, updates)
    own = {"kept/reward": float(chosen.mean())} if len(chosen) else {}
    return state, lambda: numbers() | own

  def _padded(self, count: int) -> int:
    """The next multiple of what the devices take at once."""
    unit = self._learner.mesh.size * max(self._learner.microbatch, 1)
    return -(-count // unit) * unit

  def calls(self, state: Any, frozen: Any, drawn: Drawn) -> Iterator[Call]:
    """The update; see `base.Learning`."""
    count = self._padded(len(drawn.images) // self._settings.one_in)
    places = jax.ShapeDtypeStruct((count,), jnp.int32)
    mask = jax.ShapeDtypeStruct((count,), jnp.bool_)
    rows = drawn.collected, drawn.text.prompt
    args = (state, frozen, *rows, places, mask, _a_key())
    # What is kept may lie anywhere: its rows are summed over the devices, of which one has each.
    moved = sum(x.dtype.itemsize * x.size // len(x) * count for x in jax.tree.leaves(rows))
    yield Call(self.update, args, self._settings.updates, moved=moved)
