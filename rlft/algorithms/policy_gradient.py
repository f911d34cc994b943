"""Clipped policy gradient: the paper's algorithm (arXiv 2401.12244), DDPO's and DPOK's.

    J = sum_t min(w_t A, clip(w_t, 1 - e, 1 + e) A) - kl_weight * KL(p || p_base)
    w_t = p(x_{t-1} | x_t, prompt) / p_old(x_{t-1} | x_t, prompt)

with advantages A from the batch's rewards, at K randomly drawn timesteps. The paper takes one step
of the optimizer for each timestep; DDPO (2305.13301) one for all, with statistics for each prompt;
DPOK (2305.16381) adds the KL divergence to the base model.

p_old are the weights that drew the task's images, so that every task has a trust region of its own.
Algorithm 1 of the paper fixes them once an iteration, for all tasks: the images of the second would
come from weights that the first has left behind, most of them outside of the clip range.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlft.algorithms import losses
from rlft.algorithms.advantages import PromptHistory
from rlft.algorithms.base import Batch, Call, Learner, Numbers
from rlft.config import fields
from rlft.config.settings import AlgorithmSettings, PolicySettings, TaskConfig
from rlft.data import shuffle
from rlft.models.lora import Weights
from rlft.parallel import sharding
from rlft.rewards.scoring import statistics
from rlft.types import (
  Collect,
  Drawn,
  Guidance,
  Moment,
  Process,
  TrainState,
  Trajectory,
  UserError,
)

_TIMESTEP_STREAM = 2**16  # streams below are the tasks' prompts


@dataclasses.dataclass(frozen=True)
class PolicyGradient:
  """The settings; a field without default is the flag of that name.

  Attributes:
    first: timesteps are drawn from the first so many steps of sampling, which decide what is in a
      picture; 0: from all.
    timestep_weights: 'equal', as in the paper; or 'prediction': a timestep counts the less, the
      more a change of the network's prediction changes the log-probability of its step, see
      `timestep_weights` below.
  """

  train_timesteps: int
  accumulate_timesteps: bool
  clip_range: float
  advantage: Literal["batch", "prompt", "group"]
  advantage_clip: float
  prompt_history: int
  prompt_history_min: int
  kl_weight: float
  ratio_tolerance: float
  first: int = 0
  timestep_weights: Literal["equal", "prediction"] = "equal"

  collects: ClassVar[Collect] = "trajectory"
  draws_with: ClassVar[Literal["current", "base"]] = "current"
  slopes: ClassVar[int] = 0

  @property
  def needs_base(self) -> bool:
    """The KL divergence is to the base."""
    return self.kl_weight > 0

  def check(self, policy: PolicySettings, tasks: Sequence[TaskConfig]) -> None:
    """Raises UserError where settings contradict each other."""
    if not 0 <= self.first <= policy.sampling_steps:
      raise UserError(
        f"--algorithm: first={self.first} is out of range: give at most"
        f" --sampling_steps={policy.sampling_steps}, or 0 for all"
      )
    if self.first and self.train_timesteps > self.first:
      raise UserError(
        f"--train_timesteps={self.train_timesteps} is more than first={self.first} of --algorithm:"
        " train at most as many, or 0 for all of them"
      )
    if self.train_timesteps > policy.sampling_steps:
      raise UserError(
        f"--train_timesteps={self.train_timesteps} is more than"
        f" --sampling_steps={policy.sampling_steps}: train at most as many as are sampled"
      )
    if self.prompt_history_min > self.prompt_history:
      raise UserError(
        f"--prompt_history_min={self.prompt_history_min} is more than"
        f" --prompt_history={self.prompt_history}: the history would never be full enough, lower it"
      )
    known = fields.leaves(AlgorithmSettings)
    for name in ("prompt_history", "prompt_history_min"):
      value = getattr(self, name)
      if self.advantage != "prompt" and value != known[name].default:
        raise UserError(
          f"--{name}={value} has no effect with --advantage={self.advantage}: leave it out, or give"
          " --advantage=prompt"
        )
    for task in tasks:
      if self.advantage == "group" and task.images_per_prompt == 1:
        raise UserError(
          f"--task=name={task.name}: with --advantage=group and images_per_prompt=1 every advantage"
          " is 0: give images_per_prompt of 2 or more, or --advantage=batch"
        )

  def check_task(
    self, task: TaskConfig, *, prompts: int, iterations: int, same_in_set: bool
  ) -> None:
    """Raises UserError where every advantage would be 0, or no prompt's history be filled."""
    where = f"--task=name={task.name}"
    if same_in_set and self.advantage == "group":
      raise UserError(
        f"{where}: all images of a prompt get the score of their set, so with --advantage=group"
        " every advantage is 0: use --advantage=batch"
      )
    if same_in_set and self.advantage == "batch" and task.batch_size == task.images_per_prompt:
      raise UserError(
        f"{where}: all images of a prompt get the score of their set, and a batch of a single set"
        f" has advantages of 0: use batch_size={2 * task.images_per_prompt} or more"
      )
    if self.advantage != "prompt":
      return
    if same_in_set and self.prompt_history_min <= task.images_per_prompt:
      raise UserError(
        f"{where}: all images of a prompt get the score of their set, and in a history of a single"
        " set every advantage is 0: use"
        f" --prompt_history_min={task.images_per_prompt + 1} or more, and --prompt_history as much"
      )
    seen = max(iterations * task.batch_size / prompts, task.images_per_prompt)
    if seen < self.prompt_history_min:
      raise UserError(
        f"{where}: {prompts} prompts are seen {seen:.2g} times each, fewer than"
        f" --prompt_history_min={self.prompt_history_min}: lower it, draw as many for each prompt,"
        " or use --advantage=batch"
      )

  def compared(self, images_per_prompt: int) -> int | None:
    """Advantages are relative to a prompt's images, or to the batch."""
    return images_per_prompt if self.advantage == "group" else None

  def memory(self) -> PromptHistory | None:
    """The rewards of each prompt, for advantages relative to them."""
    if self.advantage != "prompt":
      return None
    return PromptHistory(length=self.prompt_history, minimum=self.prompt_history_min)

  def bind(self, learner: Learner) -> "Learning":
    """Makes the programs; raises UserError if too few of the process's steps are random."""
    process = learner.policy.process
    random, steps = trainable(process, self.first), self.first or len(process.timesteps)
    if len(random) < max(self.train_timesteps, 1):
      raise UserError(
        f"--train_timesteps={self.train_timesteps}: only {len(random)} of the {steps} sampling"
        " steps are random; lower it, or raise --sampling_steps"
      )
    return Learning(self, learner)


@functools.wraps(PolicyGradient, assigned=())  # Settings and options are the same.
def ddpo(**settings: Any) -> PolicyGradient:
  """DDPO (arXiv 2305.13301): statistics for each prompt, one update on all timesteps.

  Raises:
    UserError: the settings are not DDPO's.
  """
  made = PolicyGradient(**settings)
  if made.advantage != "prompt" or not made.accumulate_timesteps:
    raise UserError(
      f"--algorithm=ddpo contradicts --advantage={made.advantage}"
      f" --accumulate_timesteps={made.accumulate_timesteps}: it has --advantage=prompt and"
      " --accumulate_timesteps, leave them out, or use --algorithm=policy-gradient"
    )
  return made


@functools.wraps(PolicyGradient, assigned=())
def dpok(**settings: Any) -> PolicyGradient:
  """DPOK (arXiv 2305.16381): with the KL divergence to the base model on the visited states.

  Its code has the same weight, 0.01, but for the squared difference of the predictions and beside
  an advantage that counts 100 times; and a learnt value of x_t in the place of the batch's mean.

  Raises:
    UserError: the divergence has no weight.
  """
  made = PolicyGradient(**settings)
  if not made.kl_weight:
    raise UserError(
      "--algorithm=dpok contradicts --kl_weight=0: give a weight above 0, or use"
      " --algorithm=policy-gradient"
    )
  return made


def trainable(process: Any, first: int = 0) -> np.ndarray:
  """`[n]` int: the steps that have a log-probability (std > 0), of the `first` or of all (0)."""
  return np.flatnonzero(np.asarray(process.std)[: first or None] > 0)


# ---------------------------------------------------------------------------- pure functions


def timestep_weights(process: Process, first: int = 0) -> jax.Array:
  """`[T]` float32 weights that make timesteps count alike in terms of the network's prediction.

  A change d of the prediction moves the mean of step t by c_t d, and so the log-probability by
  z c_t d / std_t, with z the standard normal noise of the step. That factor is greatest in the last
  steps, where the noise is least. With the weights std_t / |c_t| all gradients are of the size that
  the prediction's own gradient has, as in the denoising loss.

  Returns:
    Weights with a mean of 1 over the `trainable` steps; 0 elsewhere.
  """
  steps = trainable(process, first)
  still = jnp.zeros((len(steps), 1, 1, 1))
  moved = process.mean(steps, still, still + 1) - process.mean(steps, still, still)
  weights = jnp.asarray(process.std)[steps] / jnp.abs(moved[:, 0, 0, 0])
  return jnp.zeros(len(process.timesteps)).at[steps].set(weights / weights.mean())


def step_errors(
  learner: Learner, settings: PolicyGradient, trained: Any, base: Any, rows: Any, index: jax.Array
) -> dict[str, jax.Array]:
  """The policy's log-ratio at steps that were taken, and its divergence from the base.

  Args:
    learner: has the policy.
    settings: say whether the divergence is wanted.
    trained, base: parameters, whole.
    rows: (x_t, x_{t-1}, log-probability when it was drawn, texts) of n images.
    index: scalar or `[n]`, which step it was.

  Returns:
    `log_ratio` `[n]`, and `kl` `[n]` with a KL weight.
  """
  before, after, old_log_prob, text = rows

  def step(weights):
    return learner.policy.log_prob(weights, index, before, after, text)

  log_prob, mean = step(learner.weights(trained, base))
  found = {"log_ratio": log_prob - old_log_prob}
  if settings.kl_weight:
    _, base_mean = step(Weights(base))
    std = jnp.asarray(learner.policy.process.std)[index]
    found["kl"] = losses.gaussian_kl(mean, base_mean, std)
  return found


def policy_gradient(
  learner: Learner,
  settings: PolicyGradient,
  state: TrainState,
  frozen: Any,
  path: Trajectory,
  text: Guidance,
  advantages: jax.Array,
  mask: jax.Array,
  indices: jax.Array,
) -> tuple[Any, dict[str, jax.Array]]:
  """The gradient of -J at some timesteps, averaged over images and timesteps.

  Args:
    learner, settings: see there.
    state: sharded.
    frozen: 'unet' is the base, where it is needed.
    path: of B images.
    text: `[B, ...]`.
    advantages: `[B]`.
    mask: `[B]` bool; images without a score are left out.
    indices: `[K]` int, the timesteps' places in the schedule.

  Returns:
    The gradient, laid out as `state.params`; `grad_norm`, and what `losses.ratio_metrics` says.
  """
  count, images = len(indices), len(mask) // learner.mesh.size

  def loss(trained, base, part):
    index, step, advantages, weights = part
    # One number for all images of a timestep, as in sampling: XLA rounds the same then.
    index = index if len(index) > images else index[0]
    found = step_errors(learner, settings, trained, base, step, index)
    values = losses.clipped_surrogate(
      found["log_ratio"], advantages, clip_range=settings.clip_range
    )
    if settings.kl_weight:
      values += settings.kl_weight * found["kl"]
    return losses.weighted_sum(values, weights), found

  # What belongs to an image belongs to each of its timesteps: everything becomes [K, B, ...].
  text, advantages, weights = jax.tree.map(
    lambda x: jnp.broadcast_to(x, (count, *x.shape)),
    (text, advantages, losses.mean_weights(mask) / count),
  )
  counted = weights
  if settings.timestep_weights == "prediction":
    by_step = timestep_weights(learner.policy.process, settings.first)
    counted = weights * by_step[indices][:, None]
  index = jnp.broadcast_to(indices[:, None], weights.shape)
  steps = (path.latents[indices], path.latents[indices + 1], path.log_probs[indices])
  # An image that is left out may hold NaN, and 0 times the gradient of NaN is NaN.
  steps = losses.zero_where_not(mask, steps)
  rows = (index, (*steps, text), advantages, counted)
  gradient, found = learner.gradient(loss, state, frozen, rows)
  # Images first: they are what is spread over the devices, and stay where they are.
  found, advantages, weights = jax.tree.map(lambda x: x.T.ravel(), (found, advantages, weights))
  metrics = losses.ratio_metrics(
    found["log_ratio"], advantages, weights, clip_range=settings.clip_range
  )
  if settings.kl_weight:
    metrics["kl_to_base"] = losses.weighted_sum(found["kl"], weights)
  return gradient, metrics | {"grad_norm": optax.tree.norm(gradient)}


def picked_timesteps(settings: PolicyGradient, random: np.ndarray, moment: Moment) -> np.ndarray:
  """`[updates, n]` int32: the timesteps of each update, drawn from the `random` ones.

  One update for each of K timesteps, or one for all where they are accumulated.
  """
  drawn = shuffle.subset(
    moment.seed,
    _TIMESTEP_STREAM + moment.task,
    moment.iteration,
    count=settings.train_timesteps or len(random),
    size=len(random),
  )
  picked = random[drawn].astype(np.int32)
  return picked[None] if settings.accumulate_timesteps else picked[:, None]


def summary(updates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """The ratio before the first update; of everything else the mean over the updates."""
  metrics = {}
  for key in updates[0]:
    values = [float(update[key]) for update in updates]
    metrics[key] = values[0] if key.startswith("ratio/") else float(np.mean(values))
  return metrics


# ---------------------------------------------------------------------------- programs


class Learning:
  """The algorithm with its programs.

  Attributes:
    normalise: `(scores [B], group size or None) -> advantages [B]`.
    update: `(state, frozen, path, text, advantages, mask, indices) -> (state, metrics)`: one step
      of the optimizer on some timesteps; the state is donated.
  """

  def __init__(self, settings: PolicyGradient, learner: Learner):
    self._settings = settings
    self._learner = learner
    self._random = trainable(learner.policy.process, settings.first)
    gradient = functools.partial(policy_gradient, learner, settings)

    def update(state, *batch):
      change, metrics = gradient(state, *batch)
      return learner.step(state, change), metrics

    def normalise(rewards, group):
      return statistics.normalise(rewards, clip=settings.advantage_clip, group_size=group)

    self.update = sharding.jit(update, donate_argnums=0)
    self.normalise = sharding.jit(
      normalise, static_argnums=1, out_shardings=sharding.batch(learner.mesh)
    )

  def learn(
    self, state: TrainState, frozen: Any, batch: Batch, memory: PromptHistory | None
  ) -> tuple[TrainState, Numbers]:
    """One update for each drawn timestep, or one for all; see `base.Learning`.

    The numbers raise UserError if the ratio before the first update is not 1.
    """
    advantages, mask = self._advantages(batch, memory), jnp.isfinite(batch.scores)
    path, text = batch.drawn.collected, batch.drawn.text
    updates = []
    for indices in picked_timesteps(self._settings, self._random, batch.moment):
      state, values = self.update(state, frozen, path, text, advantages, mask, indices)
      updates.append(values)
    return state, functools.partial(self._numbers, updates)

  def _numbers(self, updates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    metrics = summary(jax.device_get(updates))
    deviation, tolerance = metrics["ratio/max_abs_deviation"], self._settings.ratio_tolerance
    if not deviation <= tolerance:
      raise UserError(
        f"the ratio before the first update deviates from 1 by {deviation:.2e}, more than"
        f" --ratio_tolerance={tolerance:g}: sampling and training disagree; use"
        " --compute_dtype=float32, or raise the tolerance knowingly"
      )
    return metrics

  def _advantages(self, batch: Batch, memory: PromptHistory | None) -> jax.Array:
    """`[B]` float32, sharded like the images."""
    if memory is None:
      return self.normalise(batch.scores, self._settings.compared(batch.images_per_prompt))
    values = memory.advantages(
      [prompt.text for prompt in batch.prompts],
      sharding.fetch(batch.scores).tolist(),
      clip=self._settings.advantage_clip,
    )
    return sharding.put(np.asarray(values, np.float32), sharding.batch(self._learner.mesh))

  def calls(self, state: Any, frozen: Any, drawn: Drawn) -> Iterator[Call]:
    """The update; see `base.Learning`."""
    mesh, settings = self._learner.mesh, self._settings
    count = len(drawn.images)
    steps, times = settings.train_timesteps or len(self._random), 1
    if not settings.accumulate_timesteps:
      steps, times = times, steps
    rows = sharding.batch(mesh)
    signal = (
      jax.ShapeDtypeStruct((count,), jnp.float32, sharding=rows),
      jax.ShapeDtypeStruct((count,), jnp.bool_, sharding=rows),
      jax.ShapeDtypeStruct((steps,), jnp.int32),
    )
    yield Call(self.update, (state, frozen, drawn.collected, drawn.text, *signal), times)
