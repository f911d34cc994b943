"""Compiles a training's programs ahead of time: do they fit, and what do they cost?

Nothing runs, so neither weights nor an accelerator are needed. Results are kept for each program
under a hash of what is compiled and for what, so that a command that was stopped, or is given
again, compiles only what is new.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path
import re
import sys
import threading
import time
from typing import Any

import jax
import tqdm

from rlft.config import stored
from rlft.config.fields import option, suggestion
from rlft.config.settings import Config
from rlft.models import dispatch
from rlft.performance.compile import hlo, targets
from rlft.performance.compile.abstract_run import AbstractRun, Call, device_bytes, open_model
from rlft.performance.compile.chips import GIB
from rlft.performance.compile.table import Result, Row, fits, table
from rlft.performance.compile.targets import Target
from rlft.run import checks
from rlft.storage import files
from rlft.types import UserError

CACHE = os.path.join("~", ".cache", "rlft", "compile")
_OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class CompileConfig:
  """What to compile for; the training itself is a `Config`."""

  target: str = option(
    "devices: cpu:N, a TPU slice (v5e:8x8, v6e:8x16, v5p:4x4x8 ...) or GPUs (a100:8, h100:8,"
    " h200:16 ...)",
    "cpu:1",
  )
  architecture: str = option(
    "sd1.5, sd2-base, sd2.1 or sdxl-base, instead of --pretrained: needs no weights", ""
  )
  programs: str = option(
    "only these programs, separated by commas: encode, sample, update, pretrain, average; with refl"
    " and draft also decode, pull (the decoder's gradient) and predict; if empty, all",
    "",
  )
  json: str = option("JSON file for the results", "", path=True)
  cache_dir: str = option(
    "directory in which programs compiled for --target and their results are kept; if empty, none",
    CACHE,
  )
  warm: bool = option(
    "instead, compile for the devices of this machine into the --compilation_cache, where a run"
    " with the same flags finds the programs",
    False,
  )


def compile_run(config: Config, settings: CompileConfig) -> None:
  """Compiles every program of an iteration and prints a table.

  Raises:
    UserError: a mistake in the settings, or programs that do not fit (after the table).
  """
  config = checks.with_rank(config)
  check(config, settings.architecture)
  target = targets.open_target(settings.target, config.devices.fsdp)
  checks.validate_devices(config, device_count=target.mesh.size, process_count=1)
  run = AbstractRun.of(config, target.mesh, open_model(config, settings.architecture))
  with dispatch.for_platform(target.platform):
    calls = _selected(run.calls(), settings.programs)
  resident, rows = run.resident(), []
  with (
    compilation_cache(settings.cache_dir) as cache,
    _progress(len(calls), target.name) as progress,
  ):
    for call in calls:
      with progress(call.name):
        result = compile_program(call, target, cache)
      rows.append(Row(call, result, max(0, resident - result.arguments)))
  print(table(run, target, settings.architecture or config.pretrained, rows))
  if settings.json:
    _write_json(Path(settings.json), config, settings, rows)
  for row in rows:
    if not fits(row, target):
      raise UserError(
        f"{row.call.name} does not fit {target.name}: it needs {row.needed / GIB:.1f} of"
        f" {target.memory / GIB:.1f} GiB on a device; lower --microbatch or --decode_chunk, or"
        " raise --fsdp"
      )


def check(config: Config, architecture: str) -> None:
  """Checks that there is one model and a task, and the settings by themselves.

  Raises:
    UserError: there is not, or a value out of range, or a contradiction.
  """
  if bool(architecture) == bool(config.pretrained):
    raise UserError(
      "which model? give either --pretrained or --architecture, e.g. --architecture=sd2-base"
    )
  if not config.task:
    raise UserError("--task is missing: give at least one, e.g. --task=emoji-skintone")
  checks.validate_settings(config)


def _selected(calls: Sequence[Call], names: str) -> list[Call]:
  known = [call.name for call in calls]
  wanted = [name.strip() for name in names.split(",")] if names else known
  for name in wanted:
    if name not in known:
      raise UserError(f"--programs={name}: this run has none; {suggestion(name, known)}")
  return [call for call in calls if call.name in wanted]


# ---------------------------------------------------------------------------- compiling


def compile_program(
  call: Call, target: Target, cache: Path | None = None, *, only_kept: bool = False
) -> Result:
  """Compiles a program for the target, unless its result is in the cache.

  Args:
    call: the program with its arguments.
    target: that the arguments are laid out on; where it has no compiler, the result is estimated.
    cache: a directory; None keeps nothing.
    only_kept: estimates what is not in the cache, and compiles nothing.
  """
  with dispatch.for_platform(target.platform):
    traced = call.program.trace(*call.args)
  if not target.compiles:
    return _estimated(call, traced)
  lowered = traced.lower(lowering_platforms=(target.platform,))
  text = "\n".join((lowered.as_text(), target.name, jax.__version__, targets.compiler(target)))
  kept = cache and cache / "results" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
  if kept and kept.exists():
    found = json.loads(kept.read_text())
    found["collectives"] = {kind: tuple(value) for kind, value in found["collectives"].items()}
    return Result(**found)
  if only_kept:
    return _estimated(call, traced)
  start = time.perf_counter()
  flops = hlo.flops(traced.jaxpr)
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    used = _OUT_OF_MEMORY.search(str(error))
    if not used:
      raise
    peak = int(float(used[1]) * _UNITS[used[2]])
    result = Result(peak=peak, fits=False, flops=flops, seconds=time.perf_counter() - start)
  else:
    memory = compiled.memory_analysis()
    result = Result(
      arguments=memory.argument_size_in_bytes,
      temporary=memory.temp_size_in_bytes,
      peak=hlo.peak_bytes(memory),
      flops=flops,
      xla_flops=(compiled.cost_analysis() or {}).get("flops", 0.0),
      collectives=hlo.total(hlo.collectives(compiled.as_text())),
      seconds=time.perf_counter() - start,
    )
  if kept:
    files.write_atomic(kept, json.dumps(dataclasses.asdict(result)))
  return result


def _estimated(call: Call, traced: Any) -> Result:
  """What is known of a program that is not compiled: its work, and that its arguments are there."""
  placed = [one for one in jax.tree.leaves(call.args) if getattr(one, "sharding", None)]
  arguments = device_bytes(placed)
  return Result(arguments=arguments, peak=arguments, flops=hlo.flops(traced.jaxpr), estimated=True)


@contextlib.contextmanager
def compilation_cache(name: str) -> Iterator[Path | None]:
  """A directory for results, and for XLA's own cache of compiled programs; '' gives None.

  Raises:
    UserError: the directory cannot be made.
  """
  if not name:
    yield None
    return
  directory = Path(os.path.expanduser(name))
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"--cache_dir={name} cannot be made ({error.strerror}): give another one, or ''"
    ) from error
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", str(directory / "xla"))
  try:
    yield directory
  finally:
    jax.config.update("jax_compilation_cache_dir", before)


@contextlib.contextmanager
def _progress(
  count: int, target: str
) -> Iterator[Callable[[str], contextlib.AbstractContextManager[None]]]:
  """A bar whose clock goes on while XLA compiles; away from a terminal, a line for each program."""
  with tqdm.tqdm(total=count, unit="program", disable=not sys.stderr.isatty()) as bar:

    @contextlib.contextmanager
    def progress(name: str) -> Iterator[None]:
      bar.set_description(f"compiling {name} for {target}")
      stopped, start = threading.Event(), time.perf_counter()

      def tick() -> None:
        while not stopped.wait(1.0):
          bar.refresh()

      clock = threading.Thread(target=tick, daemon=True)
      clock.start()
      try:
        yield
      finally:
        stopped.set()
        clock.join()
      bar.update()
      if bar.disable:
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)

    yield progress


def _write_json(path: Path, config: Config, settings: CompileConfig, rows: Sequence[Row]) -> None:
  found = {
    "target": settings.target,
    "architecture": settings.architecture,
    "config": stored.to_dict(config),
    "programs": [
      {"name": row.call.name, "calls": row.call.times, "images": row.call.images}
      | dataclasses.asdict(row.result)
      | {"elsewhere": row.elsewhere, "needed": row.needed, "expected": row.call.theory}
      for row in rows
    ],
  }
  files.write_atomic(path, json.dumps(found, indent=2) + "\n")
