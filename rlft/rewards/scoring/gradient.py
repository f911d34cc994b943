"""Which rewards have a gradient with respect to the images: what is learnt from alone.

Asked before anything is compiled, and by name: from a reward without one, an algorithm that follows
gradients would learn nothing, and say nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp

from rlft.config.settings import TaskConfig
from rlft.rewards.scoring import scorer, trial
from rlft.rewards.scoring.task import TaskReward
from rlft.types import HostReward, JaxReward, Prompt, UserError


def check_kind(task: TaskConfig, reward: TaskReward, algorithm: str) -> None:
  """Checks that what a task is scored by can have a gradient; computes nothing.

  Args:
    task: its settings.
    reward: what they name.
    algorithm: that needs the gradient, for messages.

  Raises:
    UserError: a sum, a veto, credits within a set, or a reward on the host.
  """
  only = reward.terms[0].reward
  if reward.is_sum:
    _refuse(
      task,
      algorithm,
      "adds up rewards relative to their batch, whose mean has no slope",
      "give one reward, or a task for each",
    )
  if reward.veto:
    what = f"has veto={task.veto}, which only ranks images"
    _refuse(task, algorithm, what, "leave the veto out")
  if not only.is_measure:
    what = "is the credit of images within their set, not a measure of the set"
    _refuse(task, algorithm, what, "use it with credit=set")
  if isinstance(only, HostReward):
    _refuse(task, algorithm, "is computed on the host, out of reach of derivatives", _OTHERWISE)


def check_path(
  task: TaskConfig,
  reward: TaskReward,
  algorithm: str,
  prompts: Sequence[Prompt],
  image_shape: tuple[int, ...],
) -> None:
  """Checks that the score has a derivative with respect to the images, by tracing it.

  Args:
    task, reward, algorithm: as in `check_kind`, which has let the task pass.
    prompts: of the task.
    image_shape: `(H, W, 3)`.

  Raises:
    UserError: it has none: a class that is the most probable one, a threshold, a rounding to 8 bits
      or a callback stands between the images and the score.
  """
  only = reward.terms[0].reward
  if not has_gradient(only, prompts, task.images_per_prompt, image_shape):
    what = "has no gradient: its score changes in steps (a class, a threshold, a rounding)"
    _refuse(task, algorithm, what, _OTHERWISE)


_OTHERWISE = "use another reward, such as image-reward, or --algorithm=policy-gradient"


def _refuse(task: TaskConfig, algorithm: str, what: str, remedy: str) -> None:
  raise UserError(
    f"--task=name={task.name}: reward={task.reward} {what}, and --algorithm={algorithm} follows the"
    f" reward's gradient: {remedy}"
  )


def has_gradient(
  reward: JaxReward, prompts: Sequence[Prompt], images_per_prompt: int, image_shape: tuple[int, ...]
) -> bool:
  """Whether a reward's score has a derivative with respect to the images; nothing is computed.

  Args:
    reward: to be traced.
    prompts: some that it can score.
    images_per_prompt: G.
    image_shape: `(H, W, 3)`.
  """
  group = images_per_prompt if reward.is_set else 1
  images, features = trial.example(reward, prompts, group, image_shape)

  def score(images, params, features):
    return scorer.apply(reward, group, params, images, features).values

  return is_differentiable(score, images, reward.params, features)


def is_differentiable(function: Callable[..., jax.Array], *args: Any) -> bool:
  """Whether an array-valued function has a derivative in its first argument that is not plainly 0.

  JAX follows zeros through a program: comparisons, `argmax`, `round`, integers and `stop_gradient`
  leave nothing to follow. A derivative that happens to be 0 counts as one.

  Args:
    function: to be traced.
    *args: its arguments, or their shapes.
  """
  found = []

  @jax.custom_jvp
  def probe(x):
    return x

  def seen(primals, tangents):
    (tangent,) = tangents
    found.append(not isinstance(tangent, SymbolicZero))
    return primals[0], jnp.zeros_like(primals[0])

  probe.defjvp(seen, symbolic_zeros=True)

  def derivative(first, *others):
    return jax.jvp(lambda x: probe(function(x, *others)), (first,), (first,))

  try:
    jax.eval_shape(derivative, *args)
  except ValueError as error:
    if "JVP" not in str(error):  # What JAX says of callbacks.
      raise
    return False
  return any(found)  # Without a tangent the rule is not even asked.
