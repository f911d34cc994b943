"""Scores batches of images that are sharded over a mesh.

A JAX reward is one jitted program. A host reward runs between two jitted programs, never inside
one (a callback inside gathers all images on one device, and cannot fail cleanly): each process
scores the rows that its own devices hold.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlft.parallel import processes
from rlft.parallel import sharding as sharding_lib
from rlft.rewards.scoring import errors, host
from rlft.rewards.scoring.errors import RewardError
from rlft.types import JaxReward, Prompt, Reward, Scores, Slope, UserError


class Scorer:
  """Applies one reward to batches of one size."""

  def __init__(
    self,
    reward: Reward,
    *,
    batch_size: int,
    images_per_prompt: int,
    batch_sharding: jax.sharding.NamedSharding,
    timeout_s: float,
    threads: int,
  ):
    """Places the reward's weights on the mesh, or starts its threads.

    Args:
      reward: what to apply.
      batch_size: B, images in the global batch.
      images_per_prompt: G; the images of a prompt are consecutive rows of the batch.
      batch_sharding: how B is spread over the mesh.
      timeout_s: seconds in which a host reward must have scored a batch, from the moment at which
        the images have reached the host.
      threads: how many calls of a host reward run at once on each process, where it does not say.

    Raises:
      UserError: the batch cannot be cut into whole sets, where the reward needs that.
    """
    self._batch_size = batch_size
    self._group = images_per_prompt if reward.is_set else 1
    if batch_size % self._group:
      raise UserError(
        f"reward {reward.name!r} scores sets of {self._group} images, but the batch has"
        f" {batch_size}: make the batch size a multiple of the images per prompt"
      )
    self._scorer: _JaxScorer | host.HostScorer
    if isinstance(reward, JaxReward):
      self._scorer = _JaxScorer(reward, batch_size, self._group, batch_sharding)
    else:
      self._scorer = host.HostScorer(
        reward, batch_size, self._group, batch_sharding, timeout_s, reward.threads or threads
      )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def free(self) -> None:
    """Takes a JAX reward's weights from the devices until the next batch."""
    self._scorer.free()

  def close(self) -> None:
    """Ends the threads of a host reward once they are idle."""
    self._scorer.close()

  def score(self, images: jax.Array, prompts: Sequence[Prompt]) -> Scores:
    """Scores a batch.

    Args:
      images: `[B, H, W, 3]` float32 in [0, 1], sharded by `batch_sharding`.
      prompts: of the B images of the *global* batch, the same on every process.

    Returns:
      `[B]` float32 arrays, sharded like the batch. Each image of a set has the score of the set, or
      its own credit where the reward gives that; what could not be scored (NaN or infinite) is NaN.

    Raises:
      RewardError: on every process, if the reward failed on one.
    """
    return self.start(images, prompts)()

  def start(self, images: jax.Array, prompts: Sequence[Prompt]) -> Callable[[], Scores]:
    """Starts to score a batch; host rewards that were started together run together.

    Returns:
      A function that waits for what `score` returns: call it once, in the same order on every
      process.
    """
    self._check(images, prompts)
    return self._scorer.start(images, prompts)

  def slope(self, images: jax.Array, prompts: Sequence[Prompt]) -> Slope:
    """Scores a batch by a JAX reward, with the gradient with respect to the images.

    Args:
      images, prompts: as in `score`.

    Returns:
      Arrays that are sharded like the batch; see `slope` below.

    Raises:
      RewardError: the reward failed.
    """
    self._check(images, prompts)
    return self._scorer.slope(images, prompts)

  def _check(self, images: jax.Array, prompts: Sequence[Prompt]) -> None:
    """Raises ValueError if that is no batch, or one whose sets are mixed."""
    if not len(images) == len(prompts) == self._batch_size:
      raise ValueError(
        f"{len(images)} images and {len(prompts)} prompts for a batch of {self._batch_size}"
      )
    first = prompts[:: self._group]  # One prompt for each score.
    if any(prompt.text != first[i // self._group].text for i, prompt in enumerate(prompts)):
      raise ValueError(f"the {self._group} images of a set must have the same prompt")


class _JaxScorer:
  """Applies a JAX reward; each of its two programs is compiled once."""

  def __init__(
    self, reward: JaxReward, batch_size: int, group: int, batch_sharding: jax.sharding.NamedSharding
  ):
    self._reward = reward
    self._sharding = batch_sharding
    self._params = self._placed_params()
    self._apply = sharding_lib.jit(
      lambda params, images, features: apply(reward, group, params, images, features),
      out_shardings=batch_sharding,
    )
    self._slope = sharding_lib.jit(
      lambda params, images, features: slope(reward, group, params, images, features),
      out_shardings=batch_sharding,
    )

  def free(self) -> None:
    self._params = None

  def close(self) -> None:
    pass

  def start(self, images: jax.Array, prompts: Sequence[Prompt]) -> Callable[[], Scores]:
    scores = self._apply(*self._arguments(images, prompts))
    return lambda: scores

  def slope(self, images: jax.Array, prompts: Sequence[Prompt]) -> Slope:
    return self._slope(*self._arguments(images, prompts))

  def _arguments(self, images: jax.Array, prompts: Sequence[Prompt]) -> tuple[Any, jax.Array, Any]:
    if self._params is None:
      self._params = self._placed_params()
    with processes.together(RewardError):
      features = prepared(self._reward, prompts)
    features = sharding_lib.put(features, self._sharding)
    return self._params, images, features

  def _placed_params(self) -> Any:
    return sharding_lib.put(self._reward.params, sharding_lib.replicated(self._sharding.mesh))


def prepared(reward: JaxReward, prompts: Sequence[Prompt]) -> Any:
  """What a JAX reward's `prepare` says about B prompts: a tree of `[B, ...]`, or None.

  Raises:
    RewardError: it cannot use these prompts, or returns something else.
  """
  if reward.prepare is None:
    return None
  texts = [prompt.text for prompt in prompts]
  try:
    features = reward.prepare(texts, [dict(prompt.metadata) for prompt in prompts])
  except Exception as error:
    raise errors.raised(reward, error) from error
  for feature in jax.tree.leaves(features):
    if np.shape(feature)[:1] != (len(prompts),):
      raise RewardError(
        f"reward {reward.name!r}: prepare returned an array of shape {list(np.shape(feature))} for"
        f" {len(prompts)} prompts: make its first dimension {len(prompts)}"
      )
  return features


def apply(reward: JaxReward, group: int, params: Any, images: jax.Array, features: Any) -> Scores:
  """Scores B images; pure.

  Args:
    reward: what to apply.
    group: G of a reward on sets, else 1.
    params: of the reward.
    images: `[B, H, W, 3]`.
    features: from `prepared`.

  Returns:
    `[B]` float32 arrays; what is not finite is NaN.

  Raises:
    RewardError: the reward cannot be traced, or returns something else than scores.
  """
  num_scores = len(images) // group
  if reward.is_set:
    # No sharding of P is asked for: it need not be a multiple of the number of devices.
    images, features = jax.tree.map(
      lambda x: x.reshape(num_scores, group, *x.shape[1:]), (images, features)
    )
  try:
    returned = reward.score(params, images, features)
  except Exception as error:
    raise errors.raised(reward, error) from error
  scores = errors.scores_of_images(reward, returned, num_scores, group)
  scores = jax.tree.map(lambda x: x.astype(jnp.float32), scores)
  return jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, jnp.nan), scores)


def slope(reward: JaxReward, group: int, params: Any, images: jax.Array, features: Any) -> Slope:
  """Scores B images, with the gradient of the sum of the scores; pure, arguments as of `apply`.

  With it the gradient of any sum of functions of each score is known: a score depends on its own
  image alone, or on the images of its set, which all have that score.
  """

  def total(images):
    scores = apply(reward, group, params, images, features).values
    return jnp.sum(jnp.where(jnp.isfinite(scores), scores, 0.0)), scores

  gradient, scores = jax.grad(total, has_aux=True)(images)
  # What made a score NaN may have made its gradient NaN: 0 times infinity.
  known = jnp.isfinite(scores)[:, None, None, None]
  return Slope(scores, jnp.where(known, gradient, 0.0))
