"""A trace of the profiler as a table: which kinds of kernels take the time of a call."""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import math
import pathlib
import re
import tempfile
import time
from typing import Any

import jax

# By the names of kernels and of XLA's fusions, the first that is found. A convolution's name has
# the layouts that it reads, too.
_KINDS = (
  ("attention", r"fmha|flash|sdpa|splash|attention"),
  ("communication", r"nccl|all-reduce|all-gather|reduce-scatter|all-to-all"),
  ("copies and layouts", r"tonhwc|tonchw|transpose|memcpy|memset|copy|concatenate|pad_"),
  ("convolutions", r"conv(?!ert)|fprop|dgrad|wgrad|cudnn"),
  ("matrix products", r"gemm|nvjet|cutlass|cublas|matmul|^dot|_dot"),
  ("reductions: norms, softmax", r"reduc|norm|softmax"),
  ("elementwise", r"fusion|loop_|wrapped|elementwise|select|convert|broadcast|add|multiply"),
)
_REST = "others"
_LARGEST = 2  # kernels that are named


@dataclasses.dataclass(frozen=True)
class Event:
  """A kernel's run: its name, and its start and duration in nanoseconds."""

  name: str
  start: float
  duration: float


@dataclasses.dataclass(frozen=True)
class Trace:
  """The kernels that ran in a call, and the seconds that it took."""

  events: Sequence[Event]
  seconds: float


@dataclasses.dataclass(frozen=True)
class Kind:
  """Kernels of a kind: their share of all kernels' time, and which take most of it."""

  name: str
  share: float
  note: str


def record(call: Callable[[], Any]) -> tuple[Any, Trace]:
  """The result of a call, and the kernels that it runs on the first device."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=options):
      start = time.perf_counter()
      result = jax.block_until_ready(call())
      seconds = time.perf_counter() - start
    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    return result, Trace(_events(jax.profiler.ProfileData.from_file(str(path))), seconds)


def _events(data: Any) -> list[Event]:
  """Kernels of GPU streams, operations of a TPU, or of CPUs in XLA's threads."""
  planes = {plane.name: plane for plane in data.planes}
  devices = sorted(name for name in planes if re.match(r"/device:(GPU|TPU):\d+$", name))
  lines = planes[devices[0] if devices else "/host:CPU"].lines
  # A GPU may have both: then the second says again what ran on the streams.
  wanted = (r"^Stream", r"^XLA Ops$") if devices else (r"XLA",)
  chosen = ([line for line in lines if re.search(one, line.name)] for one in wanted)
  return [
    Event(event.name, event.start_ns, event.duration_ns)
    for line in next(filter(None, chosen), [])
    for event in line.events
    # Loops, and on CPUs some more, hold others; or say where one ends.
    if not re.search(r"^%?while" if devices else r"^while|::|^end: ", event.name)
  ]


def by_kind(events: Iterable[Event]) -> list[Kind]:
  """The kinds of kernels, that with the longest time first."""
  times: dict[str, dict[str, float]] = {}
  for event in events:
    kernels = times.setdefault(kind_of(event.name), {})
    kernels[event.name] = kernels.get(event.name, 0.0) + event.duration
  total = sum(sum(kernels.values()) for kernels in times.values()) or 1.0
  kinds = []
  for name, kernels in times.items():
    most = sorted(kernels.items(), key=lambda item: -item[1])[:_LARGEST]
    note = ", ".join(f"{kernel[:60]} {time / total:.0%}" for kernel, time in most)
    kinds.append(Kind(name, sum(kernels.values()) / total, note))
  return sorted(kinds, key=lambda kind: -kind.share)


def kind_of(kernel: str) -> str:
  """The kind of a kernel, by its name."""
  name = kernel.lower()
  return next((kind for kind, pattern in _KINDS if re.search(pattern, name)), _REST)


def busy(trace: Trace) -> float:
  """The share of a call's time in which at least one kernel runs."""
  total, end = 0.0, -math.inf
  for event in sorted(trace.events, key=lambda event: event.start):
    total += max(0.0, event.start + event.duration - max(end, event.start))
    end = max(end, event.start + event.duration)
  return total / (1e9 * trace.seconds)
