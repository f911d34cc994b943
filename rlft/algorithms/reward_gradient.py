"""ReFL and DRaFT: the gradient of the reward itself, through the decoder and the last steps.

    loss = 1 / (R B) sum phi(r(D(x_0), prompt))         over B images, each in R versions of x_0

with the decoder D, a reward r that has a gradient, and x_0 as a function of the weights: what one
evaluation of the network makes of a noisy latent that it cannot change. All earlier steps are
sampled without a gradient.

  - ReFL, "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation"
    (arXiv 2304.05977, algorithm 1): x_0 is the prediction at a step j, which is drawn uniformly
    from the last ones, and phi(r) = scale * relu(target - r).
  - DRaFT-K and DRaFT-LV, "Directly Fine-Tuning Diffusion Models on Differentiable Rewards" (arXiv
    2309.17400): x_0 is what the last K steps lead to, and phi(r) = -r. DRaFT-LV (K = 1) adds noise
    to the image's x_0 again, n times, and takes its gradient at these predictions, too: less
    variance for the price of no further sampling.

The chain rule is taken in three programs: the network's predictions; the reward's gradient with
respect to them (`Batch.slope`); and the network's gradient, which that is multiplied into. So the
network's activations never share the memory with the decoder's and the reward's, and a reward on
sets may see images of all devices. The price is that predictions are made twice, which is little
beside the sampling.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
import optax

from rlft.algorithms import losses
from rlft.algorithms.base import Batch, Call, Learner, Numbers
from rlft.config.settings import PolicySettings, TaskConfig
from rlft.data import shuffle
from rlft.diffusion.policy import Policy
from rlft.models.lora import Weights
from rlft.parallel import sharding
from rlft.types import (
  Collect,
  Drawn,
  Guidance,
  Moment,
  Process,
  Slope,
  TrainState,
  UserError,
)

_STEP_STREAM = 2**16  # streams below are the tasks' prompts
_NOISE_STREAM = 2**31  # streams below are the images' own keys


class _RewardGradient:
  """What the two have in common."""

  collects: ClassVar[Collect] = "trajectory"
  draws_with: ClassVar[Literal["current", "base"]] = "current"
  needs_base: ClassVar[bool] = False

  def check_task(
    self, task: TaskConfig, *, prompts: int, iterations: int, same_in_set: bool
  ) -> None:
    """Nothing is compared, so every task with a reward that has a gradient will do."""

  def compared(self, images_per_prompt: int) -> int:
    """No image is compared with another."""
    return 0

  def memory(self) -> None:
    """Nothing is remembered from one iteration to the next."""

  def bind(self, learner: Learner) -> "Learning":
    """Makes the programs."""
    return Learning(self, learner)


@dataclasses.dataclass(frozen=True)
class ReFL(_RewardGradient):
  """The settings of ReFL.

  Attributes:
    last: the step is drawn from so many last ones: in the original 10 of 40, and never the very
      last alone. With fewer steps, give fewer.
    target: a reward from which on an image is good enough, and has no gradient. 2 is for rewards
      with a mean of 0 and a deviation of 1, as ImageReward has over pictures of all kinds. One that
      no image can reach has no effect; one that all have reached leaves nothing to learn.
    scale: of the loss. It matters beside the pretraining loss, which shares Adam's averages, to
      --max_grad_norm, and where --adam_eps is not small beside the gradient.
    guidance: whether the prediction is guided as the policy is, as in the paper's comparison (arXiv
      2401.12244). The original has no guidance there; --guidance_scale=1 has none anywhere.
  """

  last: int = 10
  target: float = 2.0
  scale: float = 1e-3
  guidance: bool = True

  slopes: ClassVar[int] = 1
  truncate: ClassVar[int] = 0  # steps of the sampler that are differentiated

  def __post_init__(self):
    if self.last < 2:
      raise UserError(
        f"--algorithm=refl?last={self.last} grades the very last prediction only, which ReFL never"
        " does: give 2 or more, or --algorithm=draft"
      )
    if self.scale <= 0:
      raise UserError(f"--algorithm=refl?scale={self.scale:g}: scale must be greater than 0")

  def check(self, policy: PolicySettings, tasks: Sequence[TaskConfig]) -> None:
    """Raises UserError if there are fewer steps than the last ones."""
    if self.last > policy.sampling_steps:
      raise UserError(
        f"--algorithm=refl?last={self.last} is more than --sampling_steps={policy.sampling_steps}:"
        " draw from at most as many steps as are sampled"
      )

  def step(self, steps: int, moment: Moment) -> int:
    """The place in the schedule of `steps` at which the predictions of an iteration are made."""
    stream = _STEP_STREAM + moment.task
    (drawn,) = shuffle.subset(moment.seed, stream, moment.iteration, count=1, size=self.last)
    return steps - self.last + int(drawn)

  def policy(self, policy: Policy) -> Policy:
    """What predicts."""
    return policy if self.guidance else dataclasses.replace(policy, guidance_scale=1.0)

  def noisy(
    self, process: Process, latents: jax.Array, step: jax.Array, key: jax.Array
  ) -> jax.Array:
    """`[1, B, H, W, C]` x_t at `step` of the trajectory `[T+1, B, H, W, C]`."""
    return latents[step][None]

  def loss(self, scores: jax.Array) -> jax.Array:
    """phi(r), elementwise."""
    return self.scale * jax.nn.relu(self.target - scores)

  def metrics(self, scores: jax.Array, weights: jax.Array) -> dict[str, jax.Array]:
    """The share of `[n]` images that are good enough; weights as of `losses.weighted_sum`."""
    reached = (scores >= self.target).astype(jnp.float32)
    return {"graded/over_target": losses.weighted_sum(reached, weights)}


@dataclasses.dataclass(frozen=True)
class DRaFT(_RewardGradient):
  """The settings of DRaFT-LV, and of DRaFT-K with `truncate=K&noises=0`.

  The paper (arXiv 2401.12244) trains LoRA with it (--lora_rank=32), without a pretraining loss
  (--pretrain_weight=0); neither is asked for here.

  Attributes:
    truncate: K, the last steps of the sampler that are differentiated, from latents that are not.
    noises: n, how often noise is added to x_0 again.
  """

  truncate: int = 1
  noises: int = 2

  def __post_init__(self):
    for name, least in (("truncate", 1), ("noises", 0)):
      value = getattr(self, name)
      if value < least:
        raise UserError(f"--algorithm=draft?{name}={value}: {name} must be at least {least}")
    if self.truncate > 1 and self.noises:
      raise UserError(
        f"--algorithm=draft?truncate={self.truncate}: noise is added again (noises={self.noises})"
        " where the last step alone is differentiated (DRaFT-LV): give noises=0 with it (DRaFT-K),"
        " or truncate=1"
      )

  @property
  def slopes(self) -> int:
    """One for the drawn images, and one for each noise."""
    return 1 + self.noises

  def check(self, policy: PolicySettings, tasks: Sequence[TaskConfig]) -> None:
    """Raises UserError if there are fewer steps than are differentiated."""
    if self.truncate > policy.sampling_steps:
      raise UserError(
        f"--algorithm=draft?truncate={self.truncate} is more than"
        f" --sampling_steps={policy.sampling_steps}: differentiate at most as many as are sampled"
      )

  def step(self, steps: int, moment: Moment) -> int:
    """The place in the schedule of `steps` of the first step that is differentiated."""
    return steps - self.truncate

  def policy(self, policy: Policy) -> Policy:
    """What draws is what is differentiated."""
    return policy

  def noisy(
    self, process: Process, latents: jax.Array, step: jax.Array, key: jax.Array
  ) -> jax.Array:
    """`[n, B, H, W, C]`: x_0 of the trajectory `[T+1, B, H, W, C]` with noise, as at its last step.

    `key` is consumed.
    """
    noise = jax.random.normal(key, (self.noises, *latents.shape[1:]))
    timesteps = jnp.full(latents.shape[1], jnp.asarray(process.timesteps)[step])
    return jax.vmap(lambda noise: process.corrupt(latents[-1], noise, timesteps))(noise)

  def loss(self, scores: jax.Array) -> jax.Array:
    """phi(r), elementwise."""
    return -scores

  def metrics(self, scores: jax.Array, weights: jax.Array) -> dict[str, jax.Array]:
    """Nothing of its own."""
    return {}


# ---------------------------------------------------------------------------- pure functions


def prediction(
  policy: Policy, weights: Weights, step: jax.Array, latents: jax.Array, text: Guidance
) -> jax.Array:
  """`[n, H, W, C]`: x_0 as the network sees it in `[n, H, W, C]` latents at `step` (scalar)."""
  output = policy.output(weights, step, latents, policy.conditioned(weights, text))
  return policy.process.clean(step, latents, output)


def final_latents(
  policy: Policy,
  weights: Weights,
  step: jax.Array,
  latents: jax.Array,
  following: Sequence[jax.Array],
  is_drawn: jax.Array,
  text: Guidance,
) -> jax.Array:
  """x_0 as a function of the weights, up to the noise of the last step, which is a constant.

  Args:
    policy: what draws.
    weights: of the network.
    step: scalar int, the first step to be taken.
    latents: `[n, H, W, C]` before it; constants.
    following: those after each step but the last, as they were drawn. Their noise is a constant, as
      in "reparametrised" sampling.
    is_drawn: `[n]` bool; where True x_0 is what the last step of the sampler leads to, else it is
      the network's prediction there.
    text: `[n, ...]`.
  """
  process, conditioning = policy.process, policy.conditioned(weights, text)

  def take(latents, taken):
    step, after = taken
    mean = process.mean(step, latents, policy.output(weights, step, latents, conditioning))
    return mean + jax.lax.stop_gradient(after - mean), None

  if following:
    steps = step + jnp.arange(len(following))
    # Of all steps but one at a time, latents are kept and nothing else.
    latents, _ = jax.lax.scan(jax.checkpoint(take), latents, (steps, jnp.stack(following)))
    step += len(following)
  output = policy.output(weights, step, latents, conditioning)
  return jnp.where(
    is_drawn[:, None, None, None],
    process.mean(step, latents, output),
    process.clean(step, latents, output),
  )


def downhill(
  settings: ReFL | DRaFT, slopes: Sequence[Slope]
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
  """The gradient of the loss with respect to what was graded.

  Args:
    settings: have the loss.
    slopes: R of them, of the same images in R versions.

  Returns:
    `[R, B, H, W, C]` gradient; `[B]` bool, which images count: those of which all versions could be
    scored; metrics.
  """
  scores = jnp.stack([slope.scores for slope in slopes])
  mask = jnp.isfinite(scores).all(axis=0)
  weights = jnp.broadcast_to(losses.mean_weights(mask) / len(slopes), scores.shape)
  # The score of a set is that of each of its images, so phi' of one is phi' of all.
  known = jnp.where(mask, scores, 0.0)
  down = jax.grad(lambda scores: jnp.sum(weights * settings.loss(scores)))(known)
  gradient = jnp.stack([slope.gradient for slope in slopes])
  flat_scores, flat_weights = scores.ravel(), weights.ravel()
  metrics = {"graded/reward": losses.weighted_sum(flat_scores, flat_weights)}
  metrics |= settings.metrics(flat_scores, flat_weights)
  return down[..., None, None, None] * gradient, mask, metrics


# ---------------------------------------------------------------------------- programs


class Learning:
  """An algorithm with its programs.

  Attributes:
    predict: `(state, frozen, path, text, step, key) -> (noisy, graded)`: noisy latents
      `[n, B, H, W, C]`, and R final latents `[B, H, W, C]` that are to be graded.
    update: `(state, frozen, path, noisy, text, step, slopes) -> (state, metrics)`: one step of the
      optimizer, from the R slopes of what was graded; the state is donated.
  """

  def __init__(self, settings: ReFL | DRaFT, learner: Learner):
    self._settings = settings
    self._learner = learner
    policy = settings.policy(learner.policy)
    truncate = settings.truncate

    def predict(state, frozen, path, text, step, key):
      noisy = settings.noisy(policy.process, path.latents, step, key)

      def predicted(trained, base, part):
        return prediction(policy, learner.weights(trained, base), step, *part)

      graded = [path.latents[-1]] if truncate else []
      if len(noisy):
        rows = noisy, _repeated(text, len(noisy))
        graded += list(learner.values(predicted, state, frozen, rows))
      return noisy, tuple(graded)

    def update(state, frozen, path, noisy, text, step, slopes):
      gradient, mask, metrics = downhill(settings, slopes)
      start, following = noisy, ()
      if truncate:
        start = jnp.concatenate([path.latents[step][None], noisy])
        following = tuple(path.latents[step + 1 + i][None] for i in range(truncate - 1))
      is_drawn = jnp.arange(len(start)) < min(truncate, 1)

      def loss(trained, base, part):
        is_drawn, (start, following, text, gradient) = part
        found = final_latents(
          policy, learner.weights(trained, base), step, start, following, is_drawn, text
        )
        return jnp.sum(gradient * found), ()

      rows = start, following, _repeated(text, len(start)), gradient
      rows = (
        jnp.broadcast_to(is_drawn[:, None], start.shape[:2]),
        losses.zero_where_not(mask, rows),
      )
      change, _ = learner.gradient(loss, state, frozen, rows)
      return learner.step(state, change), metrics | {"grad_norm": optax.tree.norm(change)}

    mesh = learner.mesh
    columns, rows = NamedSharding(mesh, sharding.COLUMNS), sharding.batch(mesh)
    self.predict = sharding.jit(predict, out_shardings=(columns, rows))
    self.update = sharding.jit(update, donate_argnums=0)

  def learn(
    self, state: TrainState, frozen: Any, batch: Batch, memory: None
  ) -> tuple[TrainState, Numbers]:
    """One step of the optimizer; see `base.Learning`.

    The numbers raise UserError if nothing has a gradient in the first iteration.
    """
    del memory
    path, text, moment = batch.drawn.collected, batch.drawn.text, batch.moment
    step = np.int32(self._settings.step(len(path.latents) - 1, moment))
    key = jax.random.fold_in(moment.key(), _NOISE_STREAM)
    noisy, graded = self.predict(state, frozen, path, text, step, key)
    slopes = tuple(batch.slope(latents) for latents in graded)
    state, metrics = self.update(state, frozen, path, noisy, text, step, slopes)
    return state, functools.partial(_numbers, metrics, is_first=moment.iteration == 0)

  def calls(self, state: Any, frozen: Any, drawn: Drawn) -> Iterator[Call]:
    """Predictions and update; see `base.Learning`."""
    path, text = drawn.collected, drawn.text
    step = jax.ShapeDtypeStruct((), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    args = (state, frozen, path, text, step, key)
    yield Call(self.predict, args, 1, name="predict", is_update=False)
    noisy, graded = self.predict.eval_shape(*args)
    columns = NamedSharding(self._learner.mesh, sharding.COLUMNS)
    rows = sharding.batch(self._learner.mesh)
    noisy = jax.ShapeDtypeStruct(noisy.shape, noisy.dtype, sharding=columns)
    slopes = tuple(
      Slope(
        jax.ShapeDtypeStruct(x.shape[:1], jnp.float32, sharding=rows),
        jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=rows),
      )
      for x in graded
    )
    yield Call(self.update, (state, frozen, path, noisy, text, step, slopes), 1)


def _numbers(metrics: Mapping[str, jax.Array], *, is_first: bool) -> dict[str, float]:
  found = {name: float(value) for name, value in jax.device_get(metrics).items()}
  if is_first and found["grad_norm"] == 0:
    raise UserError(
      f"the reward has no slope at any image (their mean is {found['graded/reward']:.3g}), so"
      " that nothing is learned: give another reward, or, of refl, a target above it"
    )
  return found


def _repeated(text: Guidance, count: int) -> Guidance:
  """The conditioning of B images for each of `count` versions: `[count, B, ...]`."""
  return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), text)
