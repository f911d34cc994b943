"""Contests between sides that do the same work: what they are, timing them in turns, the table.

`suites` has the contests that there are.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import gc
import os
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from rlft.config.fields import option
from rlft.parallel import sharding

OURS = "rlft"

_PEAK = "matrix product"
_PEAK_REPEATS = 8  # products in a call
_PEAK_SIZES = {"cpu": 1024}  # rows of a square matrix that take a few milliseconds
_PEAK_SIZE = 8192  # on anything else


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  """What `launch/benchmark.py` takes; each field is a flag of the same name."""

  what: str = option("what to measure: rewards, sampling, update or iteration", "rewards")
  port: str = option("--what=rewards: which ones, separated by commas; if empty, all", "")
  size: str = option(
    "sampling, update and iteration: sizes of the model, separated by commas: miniature, small,"
    " medium, sd1.5, sd2-base, sdxl-base",
    "small",
  )
  sides: str = option("which implementations, separated by commas; if empty, all", "")
  batch_size: int = option("images in a call; 0: the default of the size", 0, least=0)
  image_size: int = option(
    "height and width of the images that rewards are given, in pixels", 512, least=8
  )
  sampling_steps: int = option("DDIM steps; 0: the default of the size", 0, least=0, most=1000)
  guidance_scale: float = option(
    "scale of classifier-free guidance, 1 is no guidance; 0: the default of the size", 0.0, least=0
  )
  train_timesteps: int = option(
    "timesteps that an iteration trains on; 0: the default of the size", 0, least=0
  )
  dtype: str = option("type that the networks compute in: float32 or bfloat16", "float32")
  cpu_devices: int = option(
    "on CPUs: devices into which rlft's sampling and training split the machine; 0: what is fastest"
    " at the size",
    0,
    least=0,
  )
  settings: str = option(
    "more settings of launch/train.py for rlft's side, e.g. microbatch=16,remat=true", ""
  )
  trl_python: str = option(
    "--what=iteration: the Python of the environment that experiments/trl_venv.sh makes, for TRL",
    "",
  )
  repeats: int = option("timed calls of each side; the table shows their median", 5, least=1)
  json: str = option("file for the table and all times", "")


class Unavailable(Exception):
  """A side cannot run here; the message says why in a few words."""


@dataclasses.dataclass(frozen=True)
class Side:
  """One implementation, ready to run.

  Attributes:
    run: does the work of one call and returns when it is done.
    compile_s: seconds that it took to compile before the first call.
    close: frees what it holds.
  """

  run: Callable[[], Any]
  compile_s: float = 0.0
  close: Callable[[], None] = lambda: None


@dataclasses.dataclass(frozen=True)
class Contest:
  """Implementations of the same thing.

  Attributes:
    name: in the table.
    about: the work of a call in words.
    count: images (or other units of the suite) of one call.
    parameters: weights of the network.
    side_bytes: memory that a side takes.
    sides: make the sides, by their names; one may raise `Unavailable`.
    flops: multiplications and additions of one call, as the network defines them; 0: not counted.
  """

  name: str
  about: str
  count: int
  parameters: int
  side_bytes: int
  sides: Mapping[str, Callable[[], Side]]
  flops: float = 0.0


@dataclasses.dataclass(frozen=True)
class Suite:
  """What `--what` names.

  Attributes:
    flag: that names its contests.
    names: of the contests, in the order of the table.
    sides: in the order of the table.
    unit: what is counted.
    contest: makes the contest of a name; nothing large is made before its sides are.
    cpu_devices: most devices that a contest splits a CPU into, unless `--cpu_devices` says so; 0:
      it has no such contest.
  """

  flag: str
  names: Sequence[str]
  sides: Sequence[str]
  unit: str
  contest: Callable[[str, BenchmarkConfig], contextlib.AbstractContextManager[Contest]]
  cpu_devices: int = 0


@dataclasses.dataclass(frozen=True)
class Timing:
  """How long one side took.

  Attributes:
    seconds: of each timed call; empty if it did not run.
    compile_s: seconds before it ran at its speed: to compile, and what the first call took longer.
    note: why it did not run.
  """

  seconds: tuple[float, ...] = ()
  compile_s: float = 0.0
  note: str = ""

  @property
  def median(self) -> float:
    """Seconds of a call."""
    return statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True)
class Result:
  """What came of a contest.

  Attributes:
    name, about, count, parameters, flops: as in `Contest`.
    sides: timings by name.
    peak: FLOP/s of large matrix products of the same type between the calls; 0: not measured.
    note: on how it was measured.
  """

  name: str
  about: str
  count: int
  parameters: int
  sides: Mapping[str, Timing]
  flops: float = 0.0
  peak: float = 0.0
  note: str = ""


def hold(contest: Contest, *, dtype: str, repeats: int, tick: Callable[[], Any]) -> Result:
  """Times the sides of a contest, in turns if memory allows: other load then hits all alike.

  Args:
    contest: what to time.
    dtype: of the matrix products that its FLOP/s are compared with.
    repeats: timed calls of each side, after one that is not.
    tick: called after each call of a side, or for each that it did not make.
  """
  note, groups = "", [list(contest.sides)]
  if contest.side_bytes * len(contest.sides) > _memory():
    note, groups = "one after the other, to save memory", [[name] for name in contest.sides]
  timings: dict[str, Timing] = {}
  peaks: list[float] = []
  for group in groups:
    with contextlib.ExitStack() as stack:
      sides = {}
      for name in group:
        try:
          sides[name] = contest.sides[name]()
          stack.callback(sides[name].close)
        except Unavailable as error:
          timings[name] = Timing(note=str(error))
          tick(repeats + 1)
      if contest.flops:
        sides[_PEAK], peak_flops = _matrix_product(dtype)
      found = _time(sides, repeats, tick)
      if contest.flops:
        peaks += [peak_flops / seconds for seconds in found.pop(_PEAK).seconds]
      timings |= found
      del sides  # A network goes before the next one is made.
    jax.clear_caches()
    gc.collect()
  return Result(
    name=contest.name,
    about=contest.about,
    count=contest.count,
    parameters=contest.parameters,
    sides={name: timings[name] for name in contest.sides},
    flops=contest.flops,
    peak=statistics.median(peaks) if peaks else 0.0,
    note=note,
  )


def _time(sides: Mapping[str, Side], repeats: int, tick: Callable[[int], Any]) -> dict[str, Timing]:
  """Times `repeats` calls of each side, in turns, after one to warm up."""
  seconds: dict[str, list[float]] = {name: [] for name in sides}
  for _ in range(repeats + 1):
    for name, side in sides.items():
      seconds[name].append(seconds_of(side.run))
      if name != _PEAK:
        tick(1)
  timings = {}
  for name, (first, *others) in seconds.items():
    longer = max(0.0, first - statistics.median(others))
    timings[name] = Timing(tuple(others), sides[name].compile_s + longer)
  return timings


def seconds_of(call: Callable[[], Any]) -> float:
  """Seconds that a call takes."""
  start = time.perf_counter()
  call()
  return time.perf_counter() - start


def _matrix_product(dtype: str) -> tuple[Side, float]:
  """Large products on all devices at once, and their FLOPs."""
  size = _PEAK_SIZES.get(jax.default_backend(), _PEAK_SIZE)
  mesh = sharding.make_mesh()
  rows = sharding.put(jnp.ones((mesh.size * size, size), dtype), sharding.batch(mesh))
  square = sharding.put(jnp.full((size, size), 1 / size, dtype), sharding.replicated(mesh))

  @jax.jit
  def products(rows, square):
    for _ in range(_PEAK_REPEATS):
      rows = rows @ square
    return rows

  flops = 2.0 * _PEAK_REPEATS * rows.size * size
  return Side(lambda: jax.block_until_ready(products(rows, square))), flops


def _memory() -> float:
  """Bytes that are free on the device, or on this machine; infinite where that cannot be known."""
  if statistics_of := jax.devices()[0].memory_stats():
    return statistics_of["bytes_limit"] - statistics_of["bytes_in_use"]
  try:
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
  except OSError:
    return float("inf")
  found = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}
  return 1024 * float(found["MemAvailable"][0]) if "MemAvailable" in found else float("inf")


def cores() -> int:
  """CPU cores that this process may use: what XLA uses, and PyTorch is told to."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device() -> str:
  """What the measurements were made on, e.g. 'cpu (8 cores)'."""
  found = jax.devices()[0]
  return f"cpu ({cores()} cores)" if found.platform == "cpu" else found.device_kind


def table(results: Sequence[Result], unit: str) -> str:
  """The results in columns for people to read, a line for each side."""
  rows = [("", "parameters", "side", f"{unit}/s", "rlft is", "GFLOP/s", "of peak", "compile", "")]
  for result in results:
    ours = result.sides.get(OURS, Timing())
    about = (result.name, f"{result.parameters / 1e6:.4g} M")
    for name, timing in result.sides.items():
      if timing.seconds:
        faster = f"{timing.median / ours.median:.2f} x" if ours.seconds else "-"
        rate = result.flops / timing.median
        work = (f"{rate / 1e9:.4g}", f"{rate / result.peak:.0%}") if result.peak else ("-", "-")
        speed = (f"{result.count / timing.median:.3g}", faster, *work, f"{timing.compile_s:.1f} s")
      else:
        speed = ("-",) * 5
      rows.append((*about, name, *speed, timing.note or result.note))
      about = ("", "")
    if result.peak:
      rows.append(("", "", _PEAK, "-", "-", f"{result.peak / 1e9:.4g}", "100%", "-", ""))
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = []
  for name, size, side, *numbers, note in rows:
    cells = [number.rjust(width) for number, width in zip(numbers, widths[3:-1], strict=True)]
    about = (name.ljust(widths[0]), size.rjust(widths[1]), side.ljust(widths[2]))
    lines.append("  ".join([*about, *cells, note]).rstrip())
  return "\n".join(lines)
