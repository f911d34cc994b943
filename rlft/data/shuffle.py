"""Which entries of a list an iteration sees, as a pure function of (seed, stream, iteration).

There is no iterator whose state would have to be saved, and the number of devices and processes
plays no part.
"""

import numpy as np

# The permutation last used of each stream, with (seed, epoch, size): of millions of prompts, one is
# too slow to make in every iteration.
_last: dict[int, tuple[tuple[int, int, int], np.ndarray]] = {}
_HELD = 2**25  # the longest list whose permutation is held, in 0.25 GiB
_ROUNDS = 8  # of the cipher in its place


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
  return entries(seed, stream, positions, size=size)


def entries(seed: int, stream: int, positions: np.ndarray, *, size: int) -> np.ndarray:
  """Entries of a list in the endless sequence of its permutations.

  Args:
    seed: as of `batch_indices`.
    stream: as of `batch_indices`.
    positions: `[N]` int64 >= 0, in the sequence.
    size: length of the list, >= 1.

  Returns:
    `[N]` int64, each in [0, size).
  """
  epochs, offsets = np.divmod(positions, size)
  indices = np.empty(len(positions), np.int64)
  for epoch in np.unique(epochs).tolist():
    chosen = epochs == epoch
    if size > _HELD:
      indices[chosen] = _ciphered(seed, stream, epoch, offsets[chosen], size)
      continue
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


def _ciphered(seed: int, stream: int, epoch: int, offsets: np.ndarray, size: int) -> np.ndarray:
  """Entries `offsets` of a permutation of [0, size) that is never made.

  A Feistel network over the next power of four, applied again to what falls outside of the list
  (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
  """
  half = np.uint64(((size - 1).bit_length() + 1) // 2)
  low = np.uint64((1 << int(half)) - 1)
  keys = np.random.Philox(np.random.SeedSequence([seed, stream, epoch])).random_raw(_ROUNDS)
  values = offsets.astype(np.uint64)
  outside = np.ones(len(values), bool)
  while outside.any():
    left, right = values[outside] >> half, values[outside] & low
    for key in keys:
      left, right = right, left ^ (_mixed(right ^ key) & low)
    values[outside] = left << half | right
    outside = values >= size
  return values.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
  """The finaliser of SplitMix64 (Steele et al., 2014): every bit of 64 depends on every one."""
  values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
  values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
  return values ^ values >> np.uint64(31)
