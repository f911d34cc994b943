"""Calls a host reward on the images of one process: in threads, under a deadline."""

from collections.abc import Callable, Sequence
from concurrent import futures
import itertools
import math
import queue
import threading
import time
from typing import Any

import numpy as np

from rlft.rewards.scoring import errors
from rlft.types import Prompt, Reward

_batch = threading.local()


def batch_times() -> tuple[float, float]:
  """For a host reward that waits for something: what of the time for its batch has passed.

  Returns:
    When the batch's images were there, and by when all its scores must be (`time.monotonic`, in
    seconds). Outside of a call by `HostCaller` now, and infinity.
  """
  return getattr(_batch, "times", (time.monotonic(), math.inf))


class HostCaller:
  """A host reward with its threads."""

  def __init__(self, reward: Reward, *, timeout_s: float, threads: int):
    """Starts `threads` threads; `timeout_s` is in seconds, for each batch."""
    self._reward = reward
    self._timeout_s = timeout_s
    self._threads = threads
    self._fetcher = _Pool(1, f"{reward.name} images")
    self._callers = _Pool(threads, reward.name)

  def close(self) -> None:
    """Ends the threads once they are idle. One that hangs dies with the process."""
    self._fetcher.close()
    self._callers.close()

  def start(self, fetch: Callable[[], np.ndarray], prompts: Sequence[Prompt]) -> futures.Future:
    """Starts to score, and returns at once.

    Args:
      fetch: waits for the images and returns them, `[N, H, W, 3]`, for set rewards
        `[N, G, H, W, 3]`; the reward may write to them. The deadline counts from then on.
      prompts: N prompts.

    Returns:
      What `finish` takes.
    """
    return self._fetcher.submit(self._deal, fetch, prompts)

  def finish(self, started: futures.Future) -> np.ndarray:
    """Waits for float32 scores, one for each image: `[N]`, for set rewards `[N * G]`.

    Raises:
      RewardError: a call failed, or did not end in time.
    """
    parts, deadline = started.result()
    seconds = max(0.0, deadline - time.monotonic())
    done, late = futures.wait(parts, seconds, return_when=futures.FIRST_EXCEPTION)
    for part in late:
      part.cancel()
    for part in parts:
      if part in done and part.exception():
        raise part.exception()
    if late:
      raise errors.RewardError(
        f"reward {self._reward.name!r} scored {len(done)} of the {len(parts)} parts of the batch"
        f" in {self._timeout_s:g} s: see whether what it calls hangs, or raise"
        " --reward_timeout_s or --reward_threads"
      )
    return np.concatenate([part.result() for part in parts])

  def _deal(self, fetch: Callable[[], np.ndarray], prompts: Sequence[Prompt]):
    images = fetch()
    started = time.monotonic()
    deadline = started + self._timeout_s
    # Consecutive parts, as equal as can be. A set is one item, and so never cut.
    cuts = [len(prompts) * i // self._threads for i in range(self._threads + 1)]
    parts = [
      self._callers.submit(self._call, images[a:b], prompts[a:b], (started, deadline))
      for a, b in itertools.pairwise(cuts)
      if a < b
    ]
    return parts, deadline

  def _call(
    self, images: np.ndarray, prompts: Sequence[Prompt], times: tuple[float, float]
  ) -> np.ndarray:
    _batch.times = times
    texts = [prompt.text for prompt in prompts]
    metadata = [dict(prompt.metadata) for prompt in prompts]
    try:
      scores = np.asarray(self._reward.score(images, texts, metadata))
    except BaseException as error:  # Also SystemExit, which would only end this thread.
      raise errors.raised(self._reward, error) from error
    group_size = images.shape[1] if self._reward.is_set else 1
    scores = errors.per_image(self._reward, scores, len(prompts), group_size)
    with np.errstate(over="ignore"):
      return scores.astype(np.float32)


class _Pool:
  """Daemon threads: unlike those of `concurrent.futures`, they never keep the process alive."""

  def __init__(self, threads: int, name: str):
    self._threads = threads
    self._jobs: queue.SimpleQueue = queue.SimpleQueue()
    for i in range(threads):
      threading.Thread(target=self._work, name=f"{name} {i}", daemon=True).start()

  def submit(self, function: Callable, *args: Any) -> futures.Future:
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
