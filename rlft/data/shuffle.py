"""Which entries of a list an iteration sees, as a pure function of (seed, stream, iteration).

There is no iterator whose state would have to be saved, and the number of devices and processes
plays no part.
"""

import numpy as np

# The permutation last used of each stream, with (seed, epoch, size): of millions of prompts, one is
# too slow to make in every iteration.
_last: dict[int, tuple[tuple[int, int, int], np.ndarray]] = {}


def batch_indices(seed: int, stream: int, iteration: int, *, count: int, size: int) -> np.ndarray:
  """Which entries of a list an iteration sees: a shuffled pass through it, epoch by epoch.

  Entry number `iteration * count + i` of an endless sequence of permutations, so nothing repeats
  before everything was seen, and the last entries of an epoch share a batch with the first of the
  next.

  Args:
    seed: of the run, >= 0.
    stream: gives each list its own order; a task's place in the configuration.
    iteration: from 0.
    count: entries per iteration.
    size: length of the list, >= 1.

  Returns:
    `[count]` int64, each in [0, size).
  """
  if size < 1:
    raise ValueError(f"expected a list of at least one entry, got size={size}")
  positions = np.arange(iteration * count, (iteration + 1) * count, dtype=np.int64)
  epochs, offsets = np.divmod(positions, size)
  indices = np.empty(count, np.int64)
  for epoch in np.unique(epochs).tolist():
    chosen = epochs == epoch
    if _last.get(stream, (None,))[0] != (seed, epoch, size):
      _last[stream] = (seed, epoch, size), _permutation(seed, stream, epoch, size)
    indices[chosen] = _last[stream][1][offsets[chosen]]
  return indices


def subset(seed: int, stream: int, iteration: int, *, count: int, size: int) -> np.ndarray:
  """`[count]` different int64 in [0, size), drawn afresh in every iteration."""
  return _permutation(seed, stream, iteration, size)[:count]


def _permutation(seed: int, stream: int, epoch: int, size: int) -> np.ndarray:
  # The raw bits of a numpy bit generator are the same in every version, which numpy does not
  # promise of Generator.permutation: a resumed run must not depend on it.
  bits = np.random.Philox(np.random.SeedSequence([seed, stream, epoch])).random_raw(size)
  return np.argsort(bits, kind="stable")
