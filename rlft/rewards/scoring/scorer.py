"""Scores batches of images that are sharded over a mesh.

A JAX reward is one jitted program. A host reward runs between two jitted programs, never inside
one (a callback inside gathers all images on one device, and cannot fail cleanly): each process
scores the rows that its own devices hold.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlft.parallel import processes
from rlft.parallel import sharding as sharding_lib
from rlft.rewards.scoring import errors, host
from rlft.rewards.scoring.errors import RewardError
from rlft.types import Prompt, Reward, UserError


@dataclasses.dataclass(frozen=True)
class Pending:
  """Scores on their way.

  Attributes:
    result: call it once, in the same order on every process. Waits for the scores and returns them,
      `[B]` float32 sharded like the batch, or raises `RewardError` on every process.
  """

  result: Callable[[], jax.Array]


class Scorer:
  """Applies one reward to batches of one size.

  Attributes:
    reward: the reward.
    traces: how often the JAX reward was compiled (once in the life of the scorer).
  """

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
    self.reward = reward
    self.traces = 0
    self._batch_size = batch_size
    self._group = images_per_prompt if reward.is_set else 1
    self._sharding = batch_sharding
    if batch_size % self._group:
      raise UserError(
        f"reward {reward.name!r} scores sets of {self._group} images, but the batch has"
        f" {batch_size}: make the batch size a multiple of the images per prompt"
      )
    if reward.kind == "jax":
      self._params = self._placed_params()
      self._apply = sharding_lib.jit(self._trace, out_shardings=batch_sharding)
    else:
      self._rows = self._rows_of_process()
      self._caller = host.HostCaller(reward, timeout_s=timeout_s, threads=reward.threads or threads)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def free(self) -> None:
    """Takes a JAX reward's weights from the devices until the next batch."""
    self._params = None

  def close(self) -> None:
    """Ends the threads of a host reward once they are idle."""
    if self.reward.kind == "host":
      self._caller.close()

  def submit(self, images: jax.Array, prompts: Sequence[Prompt]) -> Pending:
    """Starts to score a batch and returns at once, also while the images are being computed.

    On CPUs a JAX reward has scored the batch when this returns (`sharding.jit`).

    Args:
      images: `[B, H, W, 3]` float32 in [0, 1], sharded by `batch_sharding`. They must not be
        donated before the result has been taken.
      prompts: of the B images of the *global* batch, the same on every process.

    Returns:
      The pending `[B]` scores. Each image of a set has the score of the set, or its own credit
      where the reward gives that; what could not be scored (NaN or infinite) is NaN.

    Raises:
      RewardError: a JAX reward cannot be traced, or cannot use these prompts.
    """
    if not len(images) == len(prompts) == self._batch_size:
      raise ValueError(
        f"{len(images)} images and {len(prompts)} prompts for a batch of {self._batch_size}"
      )
    first = prompts[:: self._group]  # One prompt for each score.
    if any(prompt.text != first[i // self._group].text for i, prompt in enumerate(prompts)):
      raise ValueError(f"the {self._group} images of a set must have the same prompt")
    if self.reward.kind == "jax":
      if self._params is None:
        self._params = self._placed_params()
      scores = self._apply(self._params, images, self._features(prompts))
      return Pending(lambda: scores)
    shards = _local_shards(images)
    own = self._rows[:: self._group] // self._group
    started = self._caller.start(lambda: self._fetch(shards), [first[i] for i in own])
    return Pending(lambda: self._finish(started))

  # JAX rewards.

  def _placed_params(self) -> Any:
    replicated = sharding_lib.replicated(self._sharding.mesh)
    return jax.tree.map(lambda x: _place(x, replicated), self.reward.params)

  def _features(self, prompts: Sequence[Prompt]) -> Any:
    """What `prepare` says about the prompts: a tree of `[B, ...]`, sharded like the batch."""
    if self.reward.prepare is None:
      return None
    texts = [prompt.text for prompt in prompts]
    try:
      features = self.reward.prepare(texts, [dict(prompt.metadata) for prompt in prompts])
    except Exception as error:
      raise errors.raised(self.reward, error) from error
    for feature in jax.tree.leaves(features):
      if np.shape(feature)[:1] != (len(prompts),):
        raise RewardError(
          f"reward {self.reward.name!r}: prepare returned an array of shape"
          f" {list(np.shape(feature))} for {len(prompts)} prompts: make its first dimension"
          f" {len(prompts)}"
        )
    return jax.tree.map(lambda x: _place(x, self._sharding), features)

  def _trace(self, params: Any, images: jax.Array, features: Any) -> jax.Array:
    self.traces += 1
    num_scores = self._batch_size // self._group
    if self.reward.is_set:
      # No sharding of P is asked for: it need not be a multiple of the number of devices.
      images, features = jax.tree.map(
        lambda x: x.reshape(num_scores, self._group, *x.shape[1:]), (images, features)
      )
    try:
      scores = self.reward.score(params, images, features)
    except Exception as error:
      raise errors.raised(self.reward, error) from error
    scores = errors.per_image(self.reward, scores, num_scores, self._group).astype(jnp.float32)
    return jnp.where(jnp.isfinite(scores), scores, jnp.nan)

  # Host rewards.

  def _rows_of_process(self) -> np.ndarray:
    """Rows of the global batch that this process scores, ascending, in whole sets."""
    held = np.zeros((jax.process_count(), self._batch_size), bool)
    for device, (rows,) in self._sharding.devices_indices_map((self._batch_size,)).items():
      held[device.process_index, rows] = True
    # Every process looks at all of them: either all stop here, or none does.
    sets = held.reshape(len(held), -1, self._group)
    if (sets.any(axis=2) != sets.all(axis=2)).any():
      shards = len(self._sharding.device_set)
      raise UserError(
        f"reward {self.reward.name!r} scores sets of {self._group} images, but a set in the batch"
        f" of {self._batch_size} would be spread over two processes: make the batch size a multiple"
        f" of {self._group * shards} (images per prompt x devices)"
      )
    return np.flatnonzero(held[jax.process_index()])

  def _fetch(self, shards: Sequence[jax.Array]) -> np.ndarray:
    images = np.concatenate([np.asarray(shard) for shard in shards])
    return images.reshape(-1, self._group, *images.shape[1:]) if self.reward.is_set else images

  def _finish(self, started: Any) -> jax.Array:
    scores, error = np.full(self._batch_size, np.nan, np.float32), None
    try:
      scores[self._rows] = self._caller.finish(started)
    except RewardError as own:
      error = own
    processes.raise_together(error, RewardError)
    scores[~np.isfinite(scores)] = np.nan
    return _place(scores, self._sharding)


def masked_share(scores: jax.Array) -> jax.Array:
  """Share of the `[B]` scores that are NaN or infinite, and so left out; a scalar in [0, 1]."""
  return jnp.mean(~jnp.isfinite(scores), dtype=jnp.float32)


def _place(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
  # Every process has all of `x`; unlike device_put this compares nothing between processes.
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _local_shards(x: jax.Array) -> list[jax.Array]:
  """This process's rows of `x`, without replicas, in the order of the rows; copies started."""
  shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
  for shard in shards.values():
    shard.copy_to_host_async()
  return [shards[start] for start in sorted(shards)]
