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

import jax
import tqdm

from rlft import checks, communication, files, hlo, targets
from rlft.abstract_run import AbstractRun, Call, device_bytes, open_model
from rlft.config import Config, option, suggestion
from rlft.targets import GIB, Target
from rlft.types import UserError

_CACHE = os.path.join("~", ".cache", "rlft", "compile")
_OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class CompileConfig:
  """What to compile for; the training itself is a `Config`."""

  target: str = option("devices: cpu:N, or a TPU slice: v5e:8x8, v6e:8x16, v5p:4x4x8 ...", "cpu:1")
  architecture: str = option(
    "sd1.5, sd2-base, sd2.1 or sdxl-base, in the place of --pretrained: needs no weights", ""
  )
  programs: str = option(
    "only these, with commas between: sample, update, accumulate, apply, pretrain, average", ""
  )
  json: str = option("file for the results", "")
  cache_dir: str = option("directory for compiled programs and results; '' keeps nothing", _CACHE)


@dataclasses.dataclass(frozen=True)
class Result:
  """What the compiler says of a program; bytes are of one device.

  Attributes:
    arguments, temporary, peak: of memory; `peak` alone where it did not fit.
    fits: whether the compiler could place it in the device's memory.
    flops: of a call on all devices, as written; what is computed twice counts twice.
    xla_flops: of a device, as XLA counts: the body of a loop once.
    collectives: {kind: (count, bytes)}.
    seconds: that the compiler took.
  """

  arguments: int = 0
  temporary: int = 0
  peak: int = 0
  fits: bool = True
  flops: float = 0.0
  xla_flops: float = 0.0
  collectives: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
  seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Row:
  """A program and its result; `elsewhere`: bytes in use on a device that are no arguments of it."""

  call: Call
  result: Result
  elsewhere: int

  @property
  def needed(self) -> int:
    """Bytes of a device in use while the program runs."""
    return self.result.peak + self.elsewhere


def compile_run(config: Config, settings: CompileConfig) -> None:
  """Compiles every program of an iteration and prints a table.

  Raises:
    UserError: a mistake in the settings, or programs that do not fit (after the table).
  """
  _check(config, settings)
  target = targets.open_target(settings.target, config.fsdp)
  checks.validate_devices(config, device_count=target.mesh.size, process_count=1)
  run = AbstractRun.of(config, target.mesh, open_model(config, settings.architecture))
  calls = _selected(run.calls(), settings.programs)
  resident, rows = run.resident(), []
  with (
    compilation_cache(settings.cache_dir) as cache,
    _progress(len(calls), target.name) as progress,
  ):
    for call in calls:
      with progress(call.name):
        result = measure(call, target, cache)
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


def fits(row: Row, target: Target) -> bool:
  """Whether the program, and what is kept beside it, are within the device's memory."""
  return row.result.fits and (target.memory is None or row.needed <= target.memory)


def _check(config: Config, settings: CompileConfig) -> None:
  if bool(settings.architecture) == bool(config.pretrained):
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


def measure(call: Call, target: Target, cache: Path | None = None) -> Result:
  """Compiles a program for the target, unless its result is in the cache.

  Args:
    call: the program with its arguments.
    target: that the arguments are laid out on.
    cache: a directory; None keeps nothing.
  """
  traced = call.program.trace(*call.args)
  lowered = traced.lower(lowering_platforms=(target.platform,))
  text = "\n".join((lowered.as_text(), target.name, jax.__version__, targets.compiler(target)))
  kept = cache and cache / "results" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
  if kept and kept.exists():
    found = json.loads(kept.read_text())
    found["collectives"] = {kind: tuple(value) for kind, value in found["collectives"].items()}
    return Result(**found)
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
    whole = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    whole += memory.output_size_in_bytes - memory.alias_size_in_bytes
    result = Result(
      arguments=memory.argument_size_in_bytes,
      temporary=memory.temp_size_in_bytes,
      peak=memory.peak_memory_in_bytes or whole,
      flops=flops,
      xla_flops=(compiled.cost_analysis() or {}).get("flops", 0.0),
      collectives=hlo.total(hlo.collectives(compiled.as_text())),
      seconds=time.perf_counter() - start,
    )
  if kept:
    files.write_atomic(kept, json.dumps(dataclasses.asdict(result)))
  return result


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


# ---------------------------------------------------------------------------- the table


def table(run: AbstractRun, target: Target, name: str, rows: Sequence[Row]) -> str:
  """What was found, in Markdown."""
  config, mesh = run.config, run.mesh
  trained = jax.tree.leaves(run.state.params)
  parameters = sum(x.size for x in jax.tree.leaves(run.model.params["unet"]))
  count = sum(x.size for x in trained)
  lines = [
    f"{name} on {target.name}: {mesh.size} devices, {mesh.shape['data']} x {mesh.shape['fsdp']}"
    f" (data x fsdp), {_gib(target.memory)} GiB each; {_levers(config, mesh)}.",
    "",
    f"UNet of {parameters / 1e6:,.1f} M parameters, {count / 1e6:,.1f} M trained. On a device, in"
    f" GiB: trained {_gib(device_bytes(run.state.params))}, optimizer"
    f" {_gib(device_bytes(run.state.opt))}, average {_gib(device_bytes(run.state.ema))}, frozen"
    f" {_gib(device_bytes(run.frozen))}.",
    "",
    "| program | calls | images | arguments | activations | kept beside | in use | of the memory"
    " | TFLOP per image | collectives, GiB | compiled in s |",
    "|" + "---|" * 11,
  ]
  for row in rows:
    call, result = row.call, row.result
    share = f"{row.needed / target.memory:.0%}" if target.memory else "-"
    share += "" if fits(row, target) else ", **does not fit**"
    moved = ", ".join(
      f"{times} {kind} {_gib(size)}" for kind, (times, size) in result.collectives.items()
    )
    lines.append(
      f"| {call.name} | {call.times} | {call.images or ''} | {_gib(result.arguments)}"
      f" | {_gib(result.temporary)} | {_gib(row.elsewhere)} | {_gib(row.needed)} | {share}"
      f" | {result.flops / call.images / 1e12 if call.images else 0:.3g} | {moved}"
      f" | {result.seconds:.0f} |"
    )
  total = sum(row.result.flops * row.call.times for row in rows)
  lines += [
    "",
    f"An iteration: {total / 1e12:,.1f} TFLOP, {total / mesh.size / 1e12:,.1f} a device.",
  ]
  for row in rows:
    if row.result.fits:
      lines.append(f"Communication of {row.call.name}: {_verdict(run, row)}.")
  return "\n".join(lines)


def _levers(config: Config, mesh: jax.sharding.Mesh) -> str:
  """The settings on which memory depends."""
  batches = "+".join(str(size // mesh.size) for size in sorted({t.batch_size for t in config.task}))
  parts = [f"{batches} images a device", config.compute_dtype, f"attention {config.attention}"]
  parts += [f"LoRA {config.lora_rank}"] if config.lora_rank else []
  parts += ["remat" if config.remat else "no remat"]
  parts += [
    f"{name} {v}" for name in ("microbatch", "decode_chunk") if (v := getattr(config, name))
  ]
  parts += [
    f"{name} {v}"
    for name in ("param_dtype", "moments_dtype")
    if (v := getattr(config, name)) != "float32"
  ]
  return ", ".join(parts)


def _verdict(run: AbstractRun, row: Row) -> str:
  size = 4 * sum(x.size for x in jax.tree.leaves(run.model.params["unet"]))
  found = communication.surprises(row.result.collectives, row.call.theory, size)
  if found:
    return "NOT as expected: " + "; ".join(found)
  return (
    "as expected ("
    + (", ".join(f"{kind} {_gib(n)} GiB" for kind, n in row.call.theory.items() if n) or "none")
    + ")"
  )


def _gib(size: float | None) -> str:
  return "-" if size is None else f"{size / GIB:.2f}"


def _write_json(path: Path, config: Config, settings: CompileConfig, rows: Sequence[Row]) -> None:
  found = {
    "target": settings.target,
    "architecture": settings.architecture,
    "config": dataclasses.asdict(config),
    "programs": [
      {"name": row.call.name, "calls": row.call.times, "images": row.call.images}
      | dataclasses.asdict(row.result)
      | {"elsewhere": row.elsewhere, "needed": row.needed, "expected": row.call.theory}
      for row in rows
    ],
  }
  files.write_atomic(path, json.dumps(found, indent=2) + "\n")
