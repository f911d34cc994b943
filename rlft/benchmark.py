"""How fast things run here, beside what one would use instead.

Whatever is measured is a suite of contests; this module times them, prints a table and can write it
as JSON. `SUITES` has the suites by name.
"""

from collections.abc import Callable, Sequence
import dataclasses
import gc
import json
import os
import pathlib
import statistics
import time
from typing import Any

import jax
import tqdm

from rlft import files
from rlft.config import option, suggestion
from rlft.types import UserError

# Both sides are held at once, and take turns, if there is so much memory for each parameter:
# two copies of it in float32, and as much again for what is computed.
_BYTES_PER_PARAMETER = 4 * 4

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  """What `launch/benchmark.py` takes; each field is a flag of the same name."""

  what: str = option("what to measure: rewards", "rewards")
  port: str = option("which of them, with commas between; empty for all", "")
  batch_size: int = option("images in a call", 2, least=1)
  image_size: int = option("height and width of the given images, in pixels", 512, least=8)
  dtype: str = option("type that the networks compute in: float32 or bfloat16", "float32")
  repeats: int = option("timed calls of each side; the table shows their median", 5, least=1)
  torch: bool = option("time PyTorch's implementations, too, where they are installed", True)
  json: str = option("file for the table and all times", "")


@dataclasses.dataclass(frozen=True)
class Side:
  """One implementation, ready to run.

  Attributes:
    run: does the work of one call and returns when it is done.
    compile_s: seconds that it took to compile.
  """

  run: Callable[[], Any]
  compile_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Contest:
  """Two implementations of the same thing.

  Attributes:
    name: in the table.
    images: of one call.
    parameters: weights of the network.
    ours: makes our side.
    theirs: makes the other side, or says in a few words why there is none.
  """

  name: str
  images: int
  parameters: int
  ours: Callable[[], Side]
  theirs: Callable[[], Side] | str


@dataclasses.dataclass(frozen=True)
class Suite:
  """What `--what` names.

  Attributes:
    names: of the contests, in the order of the table.
    contest: makes the contest of a name; nothing large is made before it begins.
  """

  names: Sequence[str]
  contest: Callable[[str, BenchmarkConfig], Contest]


@dataclasses.dataclass(frozen=True)
class Result:
  """What came of a contest.

  Attributes:
    name, images, parameters: as in `Contest`.
    compile_s: seconds that our side took to compile.
    ours_s: seconds of each of our calls.
    theirs_s: seconds of each of their calls; empty if there is no other side.
    note: what a reader should know.
  """

  name: str
  images: int
  parameters: int
  compile_s: float
  ours_s: tuple[float, ...]
  theirs_s: tuple[float, ...] = ()
  note: str = ""

  @property
  def ours(self) -> float:
    """Our images per second, by the median call."""
    return self.images / statistics.median(self.ours_s)

  @property
  def theirs(self) -> float | None:
    """Their images per second."""
    return self.images / statistics.median(self.theirs_s) if self.theirs_s else None


def _rewards() -> Suite:
  from rlft import benchmark_rewards

  return Suite(tuple(benchmark_rewards.PORTS), benchmark_rewards.contest)


SUITES: dict[str, Callable[[], Suite]] = {"rewards": _rewards}


def run(config: BenchmarkConfig) -> list[Result]:
  """Measures, prints the table and writes the JSON file.

  Raises:
    UserError: an unknown thing to measure, or a file that cannot be written.
  """
  if config.what not in SUITES:
    raise UserError(f"--what={config.what} is not known: {suggestion(config.what, SUITES)}")
  if config.dtype not in DTYPES:
    raise UserError(f"--dtype={config.dtype} is not known: {suggestion(config.dtype, DTYPES)}")
  suite = SUITES[config.what]()
  names = [name.strip() for name in config.port.split(",") if name.strip()] or suite.names
  for name in names:
    if name not in suite.names:
      raise UserError(f"--port={name} is not known: {suggestion(name, suite.names)}")
  results = []
  with tqdm.tqdm(total=2 * (config.repeats + 1) * len(names), unit="call") as bar:
    for name in names:
      bar.set_description(name)
      contest = suite.contest(name, config)
      results.append(measure(contest, repeats=config.repeats, tick=bar.update))
      if isinstance(contest.theirs, str):
        bar.update(config.repeats + 1)
  print(_heading(config))
  print(table(results))
  if config.json:
    rows = [dataclasses.asdict(result) for result in results]
    content = {"config": dataclasses.asdict(config), "device": device(), "results": rows}
    files.write_atomic(pathlib.Path(config.json).expanduser(), json.dumps(content, indent=2) + "\n")
  return results


def measure(contest: Contest, *, repeats: int, tick: Callable[[], Any]) -> Result:
  """Times both sides of a contest, in turns if memory allows: other load then hits both alike.

  Args:
    contest: what to time.
    repeats: timed calls of each side, after one that is not.
    tick: called after each call.
  """
  if isinstance(contest.theirs, str):
    note, groups = contest.theirs, [[contest.ours]]
  elif contest.parameters * _BYTES_PER_PARAMETER <= _memory():
    note, groups = "", [[contest.ours, contest.theirs]]
  else:
    note, groups = "one after the other, to save memory", [[contest.ours], [contest.theirs]]
  times: list[tuple[float, ...]] = []
  compile_s = 0.0
  for makers in groups:
    sides = [make() for make in makers]
    if not times:
      compile_s = sides[0].compile_s
    times += _time(sides, repeats, tick)
    del sides  # A network goes before the next one is made.
    jax.clear_caches()
    gc.collect()
  return Result(contest.name, contest.images, contest.parameters, compile_s, *times, note=note)


def _time(sides: Sequence[Side], repeats: int, tick: Callable[[], Any]) -> list[tuple[float, ...]]:
  """Seconds of `repeats` calls of each side, in turns."""
  seconds: list[list[float]] = [[] for _ in sides]
  for i in range(repeats + 1):
    for side, times in zip(sides, seconds, strict=True):
      start = time.perf_counter()
      side.run()
      if i:  # The first call is slower: memory is taken, caches are empty.
        times.append(time.perf_counter() - start)
      tick()
  return [tuple(times) for times in seconds]


def _memory() -> float:
  """Bytes of memory that are free on this machine; infinite where that cannot be known."""
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


def _heading(config: BenchmarkConfig) -> str:
  return (
    f"{config.what}: {device()}, batches of {config.batch_size}, {config.image_size} x"
    f" {config.image_size} pixels, {config.dtype}, random weights, median of {config.repeats}"
  )


def table(results: Sequence[Result]) -> str:
  """Lines with columns for people to read."""
  rows = [("", "parameters", "rlft images/s", "torch images/s", "rlft/torch", "compile", "")]
  for result in results:
    theirs = ("-", "-")
    if result.theirs is not None:
      theirs = (f"{result.theirs:.3g}", f"{result.ours / result.theirs:.2f}")
    size = f"{result.parameters / 1e6:.4g} M"
    rows.append(
      (result.name, size, f"{result.ours:.3g}", *theirs, f"{result.compile_s:.1f} s", result.note)
    )
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = []
  for name, *numbers, note in rows:
    cells = [number.rjust(width) for number, width in zip(numbers, widths[1:-1], strict=True)]
    lines.append("  ".join([name.ljust(widths[0]), *cells, note]).rstrip())
  return "\n".join(lines)
