"""Times, rates and memory on the devices that are here, and the lines that say them."""

from collections.abc import Callable
import dataclasses
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

_PRODUCTS = 8  # in a call
_ENOUGH = 10.0  # seconds of calls


@dataclasses.dataclass(frozen=True)
class Found:
  """One figure, or one check.

  Attributes:
    part: of the script, that found it.
    what: in words.
    value: a number or a word.
    unit: of a number.
    note: what else there is to say.
    ok: of a check, whether it holds; None of a figure.
  """

  part: str
  what: str
  value: float | str = ""
  unit: str = ""
  note: str = ""
  ok: bool | None = None


@dataclasses.dataclass(frozen=True)
class Say:
  """Appends what a part finds to a file at once, as a line of JSON, and prints it."""

  part: str
  path: pathlib.Path

  def __call__(self, what: str, value: float | str = "", unit: str = "", **more: Any) -> None:
    """Takes the fields of a `Found`."""
    found = Found(self.part, what, value, unit, **more)
    line = json.dumps(dataclasses.asdict(found))
    with self.path.open("a") as file:
      file.write(line + "\n")
    print(line, flush=True)


def matrix_rate(size: int, dtype: Any = jnp.bfloat16) -> float:
  """FLOP/s of products of random square matrices of `size` rows on one device: its best of 5."""
  left, right = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
  right /= size**0.5  # The products keep their size.

  @jax.jit
  def products(left, right):
    for _ in range(_PRODUCTS):
      left = left @ right
    return left

  seconds = times(lambda: products(left, right), 5)
  return 2.0 * _PRODUCTS * size**3 / min(seconds)


def times(call: Callable[[], Any], repeats: int, *, is_warm: bool = False) -> list[float]:
  """Seconds of each of some calls; fewer of such as take long.

  Args:
    call: what to time.
    repeats: at most so many are timed.
    is_warm: whether it was called before; else it is, and that call is not timed.
  """
  if not is_warm:
    jax.block_until_ready(call())
  found: list[float] = []
  while not found or (len(found) < repeats and sum(found) < _ENOUGH):
    start = time.perf_counter()
    jax.block_until_ready(call())
    found.append(time.perf_counter() - start)
  return found


def median(call: Callable[[], Any], repeats: int, *, is_warm: bool = False) -> float:
  """The median of `times`."""
  return statistics.median(times(call, repeats, is_warm=is_warm))


def peak_bytes() -> int | None:
  """The most bytes that were ever in use on the first device; None where that is not counted."""
  found = jax.devices()[0].memory_stats() or {}
  return found.get("peak_bytes_in_use")


def device() -> str:
  """The first device's kind, with its memory where that is known."""
  first = jax.devices()[0]
  limit = (first.memory_stats() or {}).get("bytes_limit")
  return first.device_kind + (f", {limit / 2**30:.0f} GiB for JAX" if limit else "")
