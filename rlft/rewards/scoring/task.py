"""Several rewards for one task: a weighted sum, a veto, and a judge that is only watched.

    reward=0.7*NAME + 0.3*NAME    a sum of rewards, each normalised over the batch of the task
    veto=NAME>=NUMBER             images of which this does not hold get less than all others
    watch=NAME                    measured on the same images, never trained on

NAME is any reward with its options (a '+' between spaces within a value is written %2B).
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses

import jax
import jax.numpy as jnp

from rlft.config.settings import TaskConfig
from rlft.parallel import sharding
from rlft.rewards import grammar
from rlft.rewards.scoring import errors, trial
from rlft.rewards.scoring.scorer import Scorer
from rlft.rewards.scoring.statistics import EPSILON, mean_std, normalise
from rlft.types import HostReward, Prompt, Reward, Scores, Slope, UserError


@dataclasses.dataclass(frozen=True)
class Term:
  """A reward in a sum.

  Attributes:
    label: its part of metric names, unlike those of the other terms.
    weight: its factor.
    reward: what it measures.
  """

  label: str
  weight: float
  reward: Reward


@dataclasses.dataclass(frozen=True)
class Veto:
  """A condition on images: that `reward` is at least (or, if not `least`, at most) `bound`."""

  reward: Reward
  bound: float
  least: bool


@dataclasses.dataclass(frozen=True)
class TaskReward:
  """All that the images of a task are scored by.

  Attributes:
    terms: one reward as it is, or a sum.
    is_sum: whether terms are normalised and added up.
    veto: None if there is none.
    watch: the judge; None if there is none.
  """

  terms: Sequence[Term]
  is_sum: bool
  veto: Veto | None = None
  watch: Reward | None = None

  @property
  def used(self) -> list[tuple[str, Reward]]:
    """Every reward in the order in which they are started, with its key in the settings."""
    terms = [("reward", term.reward) for term in self.terms]
    veto = [("veto", self.veto.reward)] if self.veto else []
    return [*terms, *veto, *([("watch", self.watch)] if self.watch else [])]

  @property
  def rewards(self) -> list[Reward]:
    """Every reward, in the order in which they are started."""
    return [reward for _, reward in self.used]

  @property
  def same_in_set(self) -> bool:
    """Whether all images of a set have the same score for certain."""
    trained = [*(term.reward for term in self.terms), *([self.veto.reward] if self.veto else [])]
    return all(reward.is_set and reward.is_measure for reward in trained)


@dataclasses.dataclass(frozen=True)
class Scored:
  """A batch of B images, scored; all arrays are `[B]` float32 and sharded like the batch.

  Attributes:
    scores: what is trained on; NaN where a part of it could not be scored.
    terms: by label; the parts of a sum, empty if there is none.
    veto: of the veto's reward, or None.
    vetoed: 1 where an image was vetoed, else 0; or None.
    watch: of the judge, or None.
  """

  scores: Scores
  terms: dict[str, Scores]
  veto: Scores | None = None
  vetoed: jax.Array | None = None
  watch: Scores | None = None


def task_reward(task: TaskConfig, make: Callable[[str], Reward]) -> TaskReward:
  """Makes the rewards that a task names.

  Args:
    task: its settings.
    make: `rlft.catalog.make_reward`, or what keeps the rewards that it has made.

  Raises:
    UserError: a mistake in the settings, or in what a reward needs.
  """
  parts = []
  for label, weight, name in grammar.labelled(task.reward):
    with errors.located(f"--task=name={task.name}: reward", name):
      reward = make(name)
    if reward.lower_is_better and weight > 0:
      raise UserError(
        f"--task=name={task.name}: reward={task.reward} would make {name} greater, of which less is"
        f" better: give it a weight below 0, e.g. reward=-1*{name}"
      )
    parts.append(Term(label, weight, reward))
  veto = watch = None
  if task.veto:
    name, least, bound = grammar.parse_veto(task.veto)
    reward = _measure("veto", task, name, make)
    if reward.lower_is_better and least:
      raise UserError(
        f"--task=name={task.name}: veto={task.veto} would keep what is worse, as less of {name} is"
        f" better: write {name}<={bound:g}"
      )
    veto = Veto(reward, bound, least)
  if task.watch:
    watch = _measure("watch", task, task.watch, make)
  return TaskReward(parts, grammar.is_combination(task.reward), veto, watch)


def uses(
  task: TaskConfig, reward: TaskReward, prompts: Sequence[Prompt], *, may_lack: float
) -> list[trial.Use]:
  """What a task uses its rewards for, to be tried; a veto and a judge may score few images."""
  return [
    trial.Use(
      f"--task=name={task.name}: {key}",
      one,
      prompts,
      task.images_per_prompt,
      may_lack if key == "reward" else 1.0,
    )
    for key, one in reward.used
  ]


def _measure(key: str, task: TaskConfig, spec: str, make: Callable[[str], Reward]) -> Reward:
  where = f"--task=name={task.name}: {key}={spec}"
  if grammar.is_combination(spec):
    raise UserError(f"{where} is a sum, which measures nothing by itself: give one reward")
  with errors.located(f"--task=name={task.name}: {key}", spec):
    reward = make(spec)
  if not reward.is_measure:
    raise UserError(
      f"{where} is the credit of images within their set, not a measure: use it with credit=set"
    )
  return reward


# ---------------------------------------------------------------------------- scores


def combine(
  scores: Sequence[jax.Array],
  veto: jax.Array | None = None,
  *,
  weights: Sequence[float] | None,
  bound: float = 0.0,
  least: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """The sum of normalised rewards, and the veto.

      sum_k weight_k (r_k - mean(r_k)) / std(r_k),   statistics over the finite r_k of the batch

  so that a weight says how much a reward matters, whatever its scale. What is vetoed gets the least
  of these sums minus their standard deviation (minus 1 if they are all equal): less than every
  other image, and no further away than a bad image, so that it does not swamp the statistics of
  what follows. An image with a NaN in its sum is NaN. One that the veto's reward could not score is
  NaN as well: it is neither rewarded nor punished, and counted as unscored.

  Args:
    scores: K rewards, each `[B]`, the global batch.
    veto: `[B]` scores of the veto's reward, or None.
    weights: K factors; None takes the only reward as it is, without normalising it.
    bound: an image is vetoed if its `veto` is on the wrong side of this.
    least: whether less than `bound` is wrong; else more is.

  Returns:
    `[B]` float32 scores, and `[B]` float32 which is 1 where an image was vetoed.
  """
  if weights is None:
    (total,) = scores
  else:
    normal = [jnp.where(jnp.isfinite(r), normalise(r, clip=jnp.inf), jnp.nan) for r in scores]
    total = sum(weight * r for weight, r in zip(weights, normal, strict=True))
  if veto is None:
    return total, jnp.zeros_like(total)
  # Comparisons with NaN are False.
  vetoed = veto < bound if least else veto > bound
  valid = jnp.isfinite(total)
  _, std = mean_std(total)
  lowest = jnp.where(valid.any(), jnp.min(total, where=valid, initial=jnp.inf), 0.0)
  floor = lowest - jnp.where(std > EPSILON, std, 1.0)
  total = jnp.where(vetoed, floor, jnp.where(jnp.isfinite(veto), total, jnp.nan))
  return total, vetoed.astype(jnp.float32)


class TaskScorer:
  """Applies all rewards of a task to its batches.

  Attributes:
    judge: what is only watched; None if there is none.
  """

  def __init__(
    self, reward: TaskReward, *, batch_sharding: jax.sharding.NamedSharding, **settings: int | float
  ):
    """Places weights and starts threads.

    Args:
      reward: of the task.
      batch_sharding: how B is spread over the mesh.
      **settings: of each `rlft.rewards.scoring.scorer.Scorer`.
    """
    self._reward = reward
    self.judge = reward.watch
    self._scorers = [
      Scorer(one, batch_sharding=batch_sharding, **settings) for one in reward.rewards
    ]
    self._combine = None
    if reward.is_sum or reward.veto:
      veto = reward.veto
      self._combine = sharding.jit(
        lambda scores, vetoing: combine(
          scores,
          vetoing,
          weights=[term.weight for term in reward.terms] if reward.is_sum else None,
          bound=veto.bound if veto else 0.0,
          least=veto.least if veto else True,
        ),
        out_shardings=batch_sharding,
      )

  def close(self) -> None:
    """Ends the threads of host rewards."""
    with contextlib.ExitStack() as stack:
      for scorer in self._scorers:
        stack.callback(scorer.close)

  def score(self, images: jax.Array, prompts: Sequence[Prompt]) -> Scored:
    """Scores a batch; see `Scorer.score`. The host rewards among the task's run together."""
    reward = self._reward
    # JAX rewards first: accelerators compute them beside the host, and on CPUs they have run when
    # host rewards, which may call JAX themselves, begin.
    on_host = [isinstance(one, HostReward) for one in reward.rewards]
    order = sorted(range(len(on_host)), key=on_host.__getitem__)
    finish = {place: self._scorers[place].start(images, prompts) for place in order}
    found = iter([self._finished(place, finish[place]) for place in range(len(on_host))])
    terms = {term.label: next(found) for term in reward.terms}
    veto = next(found) if reward.veto else None
    watch = next(found) if reward.watch else None
    only = Scores(None) if reward.is_sum else next(iter(terms.values()))
    if self._combine is None:
      return Scored(only, {}, watch=watch)
    scores, vetoed = self._combine(
      [term.values for term in terms.values()], veto.values if veto else None
    )
    return Scored(
      dataclasses.replace(only, values=scores),
      terms if reward.is_sum else {},
      veto=veto,
      vetoed=vetoed if reward.veto else None,
      watch=watch,
    )

  def _finished(self, place: int, finish: Callable[[], Scores]) -> Scores:
    """What a reward gives; a mistake in it is said of the key that names it."""
    key, reward = self._reward.used[place]
    with errors.located(key, reward.name):
      return finish()

  def slope(self, images: jax.Array, prompts: Sequence[Prompt]) -> Slope:
    """Scores a batch with the gradient, by a reward that `gradient.check_kind` has let pass."""
    return self._scorers[0].slope(images, prompts)
