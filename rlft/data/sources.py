"""Prompts that are read when they are asked for, parts and mixtures of them, and their order.

Which prompts an iteration sees is a pure function of (seed, stream, iteration), see `shuffle`:
nothing that reads has a state to save.
"""

from collections.abc import Iterator, Sequence
import functools
import hashlib
import json
from typing import Any, overload

import numpy as np

from rlft.data import shuffle
from rlft.types import Prompt, UserError

_BLOCK = 1024  # prompts that an iteration over all of them reads at once
_SAMPLES = 256  # prompts that stand for all in the digest of a source that has none of its own
_PERIOD = 10_000  # draws after which a mixture's pattern repeats: weights are rounded to 0.01 %
_PART = 2**32  # between the streams of a mixture's parts; those of tasks and pairs are below


class Source(Sequence[Prompt]):
  """N prompts that are not held in memory. Subclasses have `__len__` and `take`.

  Attributes:
    left_out: how many rows without a prompt are not among them.
  """

  left_out: int = 0

  def take(self, rows: Sequence[int]) -> list[Prompt]:
    """The prompts in these places, each in [0, N); one call is faster than one for each."""
    raise NotImplementedError

  def digest(self) -> str:
    """Stands for what is in the source, wherever it lies: of their number and some of them."""
    return _digest(len(self), self.take(spread(len(self), _SAMPLES)))

  @overload
  def __getitem__(self, index: int) -> Prompt: ...
  @overload
  def __getitem__(self, index: slice) -> list[Prompt]: ...
  def __getitem__(self, index):
    places = range(len(self))[index]
    return self.take(list(places)) if isinstance(index, slice) else self.take([places])[0]

  def __iter__(self) -> Iterator[Prompt]:
    for start in range(0, len(self), _BLOCK):
      yield from self[start : start + _BLOCK]


class Part(Source):
  """Some of the prompts of a source."""

  def __init__(self, whole: Sequence[Prompt], rows: range | np.ndarray):
    """Takes the places of the part in the whole."""
    self._whole, self._rows = whole, rows

  def __len__(self) -> int:
    return len(self._rows)

  def take(self, rows: Sequence[int]) -> list[Prompt]:
    return take(self._whole, [int(self._rows[row]) for row in rows])

  def digest(self) -> str:
    rows = np.asarray(self._rows, np.int64)
    return hashlib.sha256(digest(self._whole).encode() + rows.tobytes()).hexdigest()


class Mixture(Source):
  """Several sources, one after the other, which are drawn from by weight."""

  def __init__(self, parts: Sequence[Sequence[Prompt]], weights: Sequence[float]):
    """Opens a mixture.

    Args:
      parts: the sources.
      weights: their shares of what is drawn, of any sum.

    Raises:
      UserError: a weight is too small beside the others.
    """
    self._parts = parts
    self._starts = np.cumsum([0, *map(len, parts)])
    self._pattern = _pattern(tuple(weights))

  def __len__(self) -> int:
    return int(self._starts[-1])

  def take(self, rows: Sequence[int]) -> list[Prompt]:
    found: dict[int, Prompt] = {}
    owners = np.searchsorted(self._starts, rows, side="right") - 1
    for owner in np.unique(owners).tolist():
      own = [row for row, other in zip(rows, owners, strict=True) if other == owner]
      start = int(self._starts[owner])
      found |= zip(own, take(self._parts[owner], [row - start for row in own]), strict=True)
    return [found[row] for row in rows]

  def digest(self) -> str:
    parts = "".join(map(digest, self._parts)).encode()
    return hashlib.sha256(parts + self._pattern.tobytes()).hexdigest()

  def drawn(self, seed: int, stream: int, iteration: int, *, count: int) -> np.ndarray:
    """Which prompts an iteration sees, `[count]` int64 places; see `drawn`.

    Draw n of the endless sequence comes from part `pattern[n % period]`, and is the next prompt in
    the shuffled passes through that part. So every part has its share of any draws in a row, as
    nearly as whole numbers can, and each of its prompts comes once before one comes again.
    """
    positions = np.arange(iteration * count, (iteration + 1) * count, dtype=np.int64)
    rounds, places = np.divmod(positions, _PERIOD)
    owners = self._pattern[places]
    rows = np.empty(count, np.int64)
    for owner in np.unique(owners).tolist():
      chosen = owners == owner
      before = np.cumsum(self._pattern == owner) - (self._pattern == owner)
      passed = rounds * np.count_nonzero(self._pattern == owner) + before[places]
      rows[chosen] = self._starts[owner] + shuffle.entries(
        seed, stream + (owner + 1) * _PART, passed[chosen], size=len(self._parts[owner])
      )
    return rows


@functools.cache
def _pattern(weights: tuple[float, ...]) -> np.ndarray:
  """From which part each draw of a period comes, spread evenly: `[_PERIOD]` int64."""
  shares = np.asarray(weights, np.float64) / sum(weights)
  counts = np.floor(shares * _PERIOD).astype(np.int64)
  rest = np.argsort(counts - shares * _PERIOD, kind="stable")[: _PERIOD - counts.sum()]
  counts[rest] += 1
  if not counts.all():
    least = weights[int(np.argmin(counts))]
    raise UserError(
      f"the weight {least:g} is less than 1 in {_PERIOD:,} of the weights' sum: give that source"
      " more, or leave it out"
    )
  # A part's draw k of n lies at (k + 1/2) / n of the period.
  owners = np.repeat(np.arange(len(counts)), counts)
  places = np.concatenate([(np.arange(n) + 0.5) / n for n in counts.tolist()])
  return owners[np.argsort(places, kind="stable")]


def spread(size: int, count: int) -> list[int]:
  """At most `count` places of a list of `size`, spread evenly, with the first and the last."""
  return np.unique(np.linspace(0, size - 1, min(count, size)).round().astype(np.int64)).tolist()


def take(prompts: Sequence[Prompt], rows: Sequence[int]) -> list[Prompt]:
  """The prompts in these places of a source or a list."""
  return prompts.take(rows) if isinstance(prompts, Source) else [prompts[row] for row in rows]


def drawn(
  prompts: Sequence[Prompt], seed: int, stream: int, iteration: int, *, count: int
) -> list[Prompt]:
  """The prompts that an iteration sees, the same on every process.

  Args:
    prompts: a source or a list.
    seed: of the run, >= 0.
    stream: a task's place in the configuration.
    iteration: from 0.
    count: prompts per iteration.
  """
  if isinstance(prompts, Mixture):
    rows = prompts.drawn(seed, stream, iteration, count=count)
  else:
    rows = shuffle.batch_indices(seed, stream, iteration, count=count, size=len(prompts))
  return take(prompts, rows.tolist())


def digest(prompts: Sequence[Prompt]) -> str:
  """Stands for the prompts of a source (see `Source.digest`) or, with each of them, of a list."""
  return prompts.digest() if isinstance(prompts, Source) else _digest(len(prompts), prompts)


def _digest(count: int, prompts: Sequence[Prompt]) -> str:
  hashed = hashlib.sha256(str(count).encode())
  for prompt in prompts:
    hashed.update(as_json(prompt))
  return hashed.hexdigest()


def as_json(prompt: Prompt) -> bytes:
  """A prompt as a JSON object on one line; what JSON has no type for becomes text or a list."""
  return json.dumps({**prompt.metadata, "prompt": prompt.text}, default=_plain).encode()


def _plain(value: Any) -> Any:
  for method in ("tolist", "isoformat"):
    if hasattr(value, method):
      return getattr(value, method)()
  return str(value)
