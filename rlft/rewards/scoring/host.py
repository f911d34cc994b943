"""Applies a host reward to the images of one process: in threads, under a deadline."""

from collections.abc import Callable, Sequence
from concurrent import futures
import itertools
import math
import queue
import threading
import time
from typing import Any

import jax
import numpy as np

from rlft.parallel import processes
from rlft.parallel import sharding as sharding_lib
from rlft.rewards.scoring import errors
from rlft.rewards.scoring.errors import RewardError
from rlft.types import HostReward, Prompt, Scores, UserError

# A batch in the threads: its parts, and by when they must be done (`time.monotonic`).
Started = tuple[list[futures.Future], float]

_batch = threading.local()


def batch_times() -> tuple[float, float]:
  """For a host reward that waits for something: what of the time for its batch has passed.

  Returns:
    When the batch's images were there, and by when all its scores must be (`time.monotonic`, in
    seconds). Outside of a call by `HostCaller` now, and infinity.
  """
  return getattr(_batch, "times", (time.monotonic(), math.inf))


class HostScorer:
  """Applies a host reward to those rows of a sharded batch that this process holds."""

  def __init__(
    self,
    reward: HostReward,
    batch_size: int,
    group: int,
    batch_sharding: jax.sharding.NamedSharding,
    timeout_s: float,
    threads: int,
  ):
    """Starts the threads; see `rlft.rewards.scoring.scorer.Scorer`, of which this is a part.

    Raises:
      UserError: a set would be spread over two processes.
    """
    self._batch_size = batch_size
    self._group = group
    self._sharding = batch_sharding
    self._rows = _rows_of_process(reward, batch_size, group, batch_sharding)
    self._caller = HostCaller(reward, timeout_s=timeout_s, threads=threads)

  def free(self) -> None:
    """Does nothing: nothing is on the devices."""

  def close(self) -> None:
    """Ends the threads once they are idle."""
    self._caller.close()

  def start(self, images: jax.Array, prompts: Sequence[Prompt]) -> Callable[[], Scores]:
    """Starts to score a batch as soon as its images are there; see `Scorer.start`."""
    own = np.concatenate([np.asarray(shard) for shard in _local_shards(images)])
    if self._caller.reward.is_set:
      own = own.reshape(-1, self._group, *own.shape[1:])
    started = self._caller.start(own, [prompts[row] for row in self._rows[:: self._group]])
    return lambda: self._finish(started)

  def _finish(self, started: Started) -> Scores:
    with processes.together(RewardError):
      found = self._caller.finish(started)
    return jax.tree.map(self._spread, found)

  def _spread(self, own: np.ndarray) -> jax.Array:
    """The whole batch's `[B]`, of which this process knows its own rows."""
    scores = np.full(self._batch_size, np.nan, np.float32)
    scores[self._rows] = own
    scores[~np.isfinite(scores)] = np.nan
    return sharding_lib.put(scores, self._sharding)


def _rows_of_process(
  reward: HostReward, batch_size: int, group: int, sharding: jax.sharding.NamedSharding
) -> np.ndarray:
  """Rows of the global batch that this process scores, ascending, in whole sets."""
  held = np.zeros((jax.process_count(), batch_size), bool)
  for device, (rows,) in sharding.devices_indices_map((batch_size,)).items():
    held[device.process_index, rows] = True
  # Every process looks at all of them: either all stop here, or none does.
  sets = held.reshape(len(held), -1, group)
  if (sets.any(axis=2) != sets.all(axis=2)).any():
    raise UserError(
      f"reward {reward.name!r} scores sets of {group} images, but a set in the batch of"
      f" {batch_size} would be spread over two processes: make the batch size a multiple of"
      f" {group * len(sharding.device_set)} (images per prompt x devices)"
    )
  return np.flatnonzero(held[jax.process_index()])


def _local_shards(x: jax.Array) -> list[jax.Array]:
  """This process's rows of `x`, without replicas, in the order of the rows; copies started."""
  shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
  for shard in shards.values():
    shard.copy_to_host_async()
  return [shards[start] for start in sorted(shards)]


class HostCaller:
  """A host reward with its threads.

  Attributes:
    reward: the reward.
  """

  def __init__(self, reward: HostReward, *, timeout_s: float, threads: int):
    """Starts `threads` threads; `timeout_s` is in seconds, for each batch."""
    self.reward = reward
    self._timeout_s = timeout_s
    self._threads = threads
    self._pool = _Pool(threads, reward.name)

  def close(self) -> None:
    """Ends the threads once they are idle. One that hangs dies with the process."""
    self._pool.close()

  def start(self, images: np.ndarray, prompts: Sequence[Prompt]) -> Started:
    """Starts to score; the deadline counts from now on.

    Args:
      images: `[N, H, W, 3]`, for set rewards `[N, G, H, W, 3]`; the reward may write to them.
      prompts: N prompts.

    Returns:
      What `finish` takes.
    """
    started = time.monotonic()
    deadline = started + self._timeout_s
    # Consecutive parts, as equal as can be. A set is one item, and so never cut.
    cuts = [len(prompts) * i // self._threads for i in range(self._threads + 1)]
    parts = [
      self._pool.add(self._call, images[a:b], prompts[a:b], (started, deadline))
      for a, b in itertools.pairwise(cuts)
      if a < b
    ]
    return parts, deadline

  def finish(self, started: Started) -> Scores:
    """Waits for float32 scores, one for each image: `[N]`, for set rewards `[N * G]`.

    Raises:
      RewardError: a call failed, or did not end in time.
    """
    parts, deadline = started
    seconds = max(0.0, deadline - time.monotonic())
    done, late = futures.wait(parts, seconds, return_when=futures.FIRST_EXCEPTION)
    for part in late:
      part.cancel()
    for part in parts:
      if part in done and part.exception():
        raise part.exception()
    if late:
      raise RewardError(
        f"reward {self.reward.name!r} scored {len(done)} of the {len(parts)} parts of the batch"
        f" in {self._timeout_s:g} s: see whether what it calls hangs, or raise"
        " --reward_timeout_s or --reward_threads"
      )
    found = [part.result() for part in parts]
    # A part may know less than another of what the scores are about.
    known = [k for k in vars(found[0]) if all(vars(one)[k] is not None for one in found)]
    return Scores(**{k: np.concatenate([vars(one)[k] for one in found]) for k in known})

  def _call(
    self, images: np.ndarray, prompts: Sequence[Prompt], times: tuple[float, float]
  ) -> Scores:
    _batch.times = times
    texts = [prompt.text for prompt in prompts]
    metadata = [dict(prompt.metadata) for prompt in prompts]
    try:
      returned = self.reward.score(images, texts, metadata)
      if isinstance(returned, Scores):
        parts = vars(returned).items()
        returned = Scores(**{key: x if x is None else as_numpy(x) for key, x in parts})
      else:
        returned = as_numpy(returned)
    except BaseException as error:  # Also SystemExit, which would only end this thread.
      raise errors.raised(self.reward, error) from error
    group = images.shape[1] if self.reward.is_set else 1
    scores = errors.scores_of_images(self.reward, returned, len(prompts), group)
    with np.errstate(over="ignore"):
      return jax.tree.map(lambda x: x.astype(np.float32), scores)


def as_numpy(scores: Any) -> np.ndarray:
  """What a user returned, as numpy; also PyTorch's, on any device, with gradients, in bfloat16."""
  if isinstance(scores, list | tuple):
    scores = [as_numpy(x) for x in scores]
  elif hasattr(scores, "detach"):
    scores = scores.detach().cpu()
    try:
      return scores.numpy()
    except TypeError:  # A type that numpy lacks.
      return scores.float().numpy()
  return np.asarray(scores)


class _Pool:
  """Daemon threads: unlike those of `concurrent.futures`, they never keep the process alive."""

  def __init__(self, threads: int, name: str):
    self._threads = threads
    self._jobs: queue.SimpleQueue = queue.SimpleQueue()
    for i in range(threads):
      threading.Thread(target=self._work, name=f"{name} {i}", daemon=True).start()

  def add(self, function: Callable, *args: Any) -> futures.Future:
    """Calls `function(*args)` in a thread that is idle, or is next."""
    future: futures.Future = futures.Future()
    self._jobs.put((future, function, args))
    return future

  def close(self) -> None:
    for _ in range(self._threads):
      self._jobs.put(None)

  def _work(self) -> None:
    while (job := self._jobs.get()) is not None:
      future, function, args = job
      if future.set_running_or_notify_cancel():
        try:
          future.set_result(function(*args))
        except BaseException as error:
          future.set_exception(error)
      del job, future, args  # Or this batch's images would stay until the next batch.
