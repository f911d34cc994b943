"""How fast things run here, beside what one would use instead: the suites of contests by name.

Whatever is measured is a suite of contests between sides; `run` times one, prints its table and can
write it as JSON.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import json
import os

import tqdm

from rlft.config.fields import suggestion
from rlft.parallel import cpu
from rlft.performance.benchmark import policy, reward
from rlft.performance.benchmark.contest import (
  BenchmarkConfig,
  Result,
  Suite,
  cores,
  device,
  hold,
  table,
)
from rlft.storage import files
from rlft.types import UserError

DTYPES = ("float32", "bfloat16")

_BUSY = 0.25  # programs that wait for each core before the first call, above which it is said

SUITES: dict[str, Callable[[], Suite]] = {
  "rewards": reward.suite,
  **{what: functools.partial(policy.suite, what) for what in ("sampling", "update", "iteration")},
}


def run(config: BenchmarkConfig) -> list[Result]:
  """Measures, prints the table and writes the JSON file.

  Raises:
    UserError: an unknown thing to measure, a setting that does not fit it, or a file that cannot be
      written.
  """
  if config.what not in SUITES:
    raise UserError(f"--what={config.what} is not known: {suggestion(config.what, SUITES)}")
  if config.dtype not in DTYPES:
    raise UserError(f"--dtype={config.dtype} is not known: {suggestion(config.dtype, DTYPES)}")
  suite = SUITES[config.what]()
  names = _chosen(suite.flag, getattr(config, suite.flag), suite.names)
  sides = _chosen("sides", config.sides, suite.sides)
  # What XLA reserves in advance on a GPU, PyTorch would not have.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  if suite.cpu_devices:
    cpu.split_host(config.cpu_devices or suite.cpu_devices)
  load, results = _load(), []
  with tqdm.tqdm(total=len(sides) * (config.repeats + 1) * len(names), unit="call") as bar:
    for name in names:
      bar.set_description(name)
      with suite.contest(name, config) as contest:
        makers = {side: contest.sides[side] for side in sides}
        contest = dataclasses.replace(contest, sides=makers)
        dtype = config.dtype
        results.append(hold(contest, dtype=dtype, repeats=config.repeats, tick=bar.update))
  print(_heading(config, results, load))
  print(table(results, suite.unit))
  if config.json:
    rows = [dataclasses.asdict(result) for result in results]
    content = {"config": dataclasses.asdict(config), "device": device() + load, "results": rows}
    files.write_atomic(files.local_path(config.json), json.dumps(content, indent=2) + "\n")
  return results


def _chosen(flag: str, value: str, known: Sequence[str]) -> list[str]:
  """The names in a flag's value, in the order of `known`; all if there is none."""
  names = [name.strip() for name in value.split(",") if name.strip()] or list(known)
  for name in names:
    if name not in known:
      raise UserError(f"--{flag}={name} is not known: {suggestion(name, known)}")
  return [name for name in known if name in names]


def _load() -> str:
  """A warning if other programs keep the cores busy: the sides do not suffer alike from them."""
  busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
  return f" under a load of {busy:.1f} by other programs" if busy > _BUSY * cores() else ""


def _heading(config: BenchmarkConfig, results: Sequence[Result], load: str) -> str:
  """What was measured, where and how."""
  line = f"{config.what}: {device()}{load}, median of {config.repeats}"
  if len({result.about for result in results}) == 1:
    return f"{line}, {results[0].about}"
  return "\n".join([line, *(f"{result.name}: {result.about}" for result in results)])
