"""What a training would be: devices, batches, files, memory, and what it will cost.

Nothing is started and nothing written. Memory is that of compilations which launch/compile.py has
kept for the same settings; a program that was not compiled is estimated.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import os
from pathlib import Path

import jax

from rlft import catalog
from rlft.config.fields import option
from rlft.config.settings import Config
from rlft.models import dispatch
from rlft.parallel.join import ProcessSettings
from rlft.performance.compile import ahead, cost, targets
from rlft.performance.compile.abstract_run import AbstractRun, open_model
from rlft.performance.compile.chips import GIB
from rlft.performance.compile.table import Row, fits
from rlft.performance.compile.targets import Target
from rlft.report.metrics import METRICS_FILE
from rlft.report.page import REPORT_FILE
from rlft.run import checks
from rlft.storage import files, folders
from rlft.types import UserError

_UNITS = (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9))


@dataclasses.dataclass(frozen=True)
class PlanConfig:
  """Whether a run is only described, and for which devices; the run itself is a `Config`."""

  dry_run: bool = option(
    "print what would run, where its files would be, whether it fits and what it would cost; start"
    " and write nothing",
    False,
  )
  target: str = option(
    "with --dry_run: the devices of all processes, as launch/compile.py takes them, e.g. v6e:8x16"
    " or h100:8; if empty, those of this machine",
    "",
  )
  architecture: str = option(
    "with --dry_run: sd1.5, sd2-base, sd2.1 or sdxl-base, instead of --pretrained", ""
  )
  utilisation: float = option(
    "with --dry_run: the share of the chips' peak FLOP/s that the run is assumed to reach; 0.2 was"
    " reached in a replication of Stable Diffusion 2 on 128 A100",
    cost.UTILISATION,
    above=0,
    most=1,
  )
  price_per_chip_hour: float = option(
    "with --dry_run: price of a chip per hour, in any currency; 0: no price is computed",
    0.0,
    least=0,
  )
  cache_dir: str = option("with --dry_run: where launch/compile.py keeps its results", ahead.CACHE)


def check_used(settings: PlanConfig, processes: ProcessSettings | None = None) -> None:
  """Refuses what would be ignored: flags of a dry run without one, and those of processes with one.

  Raises:
    UserError: there is one.
  """
  for field in dataclasses.fields(settings):
    if not settings.dry_run and getattr(settings, field.name) != field.default:
      raise UserError(f"--{field.name} has no effect on a training: give --dry_run too")
  for field in dataclasses.fields(processes) if processes and settings.dry_run else ():
    if getattr(processes, field.name) != field.default:
      raise UserError(
        f"--{field.name} has no effect on --dry_run, which meets no other process: leave it out,"
        " and name the devices of all processes with --target, e.g. h100:16"
      )


def describe(config: Config, settings: PlanConfig) -> str:
  """The plan of a run, as text.

  Raises:
    UserError: a mistake in the settings, devices that the batches cannot be divided among, or a
      model that would have to be copied here first.
  """
  _check_nothing_is_copied(config)
  config = checks.with_rank(config)
  ahead.check(config, settings.architecture)
  if settings.target:
    target = targets.open_target(settings.target, config.devices.fsdp)
  else:
    target = targets.open_here(config.devices)
  checks.validate_devices(config, device_count=target.mesh.size, process_count=target.processes)
  run = AbstractRun.of(config, target.mesh, open_model(config, settings.architecture))
  resident, rows = run.resident(), []
  cache = Path(os.path.expanduser(settings.cache_dir)) if settings.cache_dir else None
  with dispatch.for_platform(target.platform):
    calls = run.calls()
  for call in calls:
    result = ahead.compile_program(call, target, cache, only_kept=True)
    rows.append(Row(call, result, max(0, resident - result.arguments)))
  done = _done(config.output.workdir)
  lines = ["Nothing is started, and nothing is written.", ""]
  facts = list(_facts(run, target, settings, done))
  width = max(len(name) for name, _ in facts)
  lines += [f"{name:<{width}}  {text}" for name, text in facts]
  lines += ["", *_programs(rows, target), ""]
  lines += _costs(cost.remaining_work(config, rows, done or 0), target, settings)
  return "\n".join(lines)


def _check_nothing_is_copied(config: Config) -> None:
  for name, path, instead in (
    ("pretrained", config.pretrained, "--architecture, e.g. --architecture=sd2-base"),
    ("init_lora", config.policy.init_lora, "--lora_rank"),
  ):
    if "://" in path:
      raise UserError(
        f"--{name}={path} would be copied to this machine, and --dry_run writes nothing: give"
        f" --{name}= and in its place {instead}"
      )


# ---------------------------------------------------------------------------- the parts


def _facts(
  run: AbstractRun, target: Target, settings: PlanConfig, done: int | None
) -> Iterator[tuple[str, str]]:
  """(what, which) of a run, in the order in which one asks."""
  config, mesh, output = run.config, run.mesh, run.config.output
  trained = sum(leaf.size for leaf in jax.tree.leaves(run.state.params))
  what = f"LoRA of rank {config.policy.lora_rank}" if config.policy.lora_rank else "every weight"
  yield (
    "model",
    f"{settings.architecture or config.pretrained}, {what} of its UNet: {trained / 1e6:,.1f} M"
    " parameters are trained",
  )
  yield (
    "devices",
    f"{target.name}: {mesh.size} devices as {mesh.shape['data']} x {mesh.shape['fsdp']} (data x"
    f" fsdp), {target.processes} {_plural('process', target.processes)}",
  )
  if chip := target.chip:
    yield (
      "",
      f"{target.chips} {_plural('chip', target.chips)} of {chip.flops / 1e12:,.0f} TFLOP/s in"
      f" bfloat16, {chip.memory_rate / 1e12:.2f} TB/s of memory, {chip.link_rate / 1e9:,.0f} GB/s"
      " to each other"
      + (f", {chip.network_rate / 1e9:,.0f} to other machines" if chip.network_rate else ""),
    )
  for task in config.task:
    yield (
      f"task {task.name}",
      f"{task.batch_size} images an iteration, {task.batch_size // mesh.size} a device, of"
      f" {task.batch_size // task.images_per_prompt} prompts ({task.prompts})",
    )
  if config.pretraining.pretrain_weight:
    size = config.pretraining.pretrain_batch_size
    yield (
      "pretraining",
      f"{size} images an iteration, {size // mesh.size} a device"
      f" ({config.pretraining.pretrain_data})",
    )
  yield "iterations", f"{config.iterations:,}"
  every = config.evaluation.eval_every
  if config.eval:
    middle = f", every {every} iterations" if every else ""
    images = sum(cost.drawn_by_evaluation(config.eval))
    yield "evaluation", f"before{middle} and after, {images} images each time"
  if not output.workdir:
    yield "workdir", "none: give --workdir"
  else:
    start = f"goes on from iteration {done}" if done else "starts afresh"
    start = "cannot be read from here, a new one is assumed" if done is None else start
    yield "workdir", f"{output.workdir}: {start}"
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.state))
  often = f"every {output.checkpoint_every} iterations" if output.checkpoint_every else "at the end"
  yield (
    "checkpoints",
    f"in its checkpoints/, {often}, {size / GIB:.2f} GiB each; the newest {output.keep_checkpoints}"
    " stay",
  )
  board = "tensorboard" in output.tracker.split("+") and not files.is_bucket(output.workdir)
  also = " and tensorboard/" if board else ""
  yield "logs", f"in its {METRICS_FILE}{also}; in the end its {REPORT_FILE}"
  yield from (("missing", message) for message in _missing(config, target))


def _missing(config: Config, target: Target) -> Iterator[str]:
  """One line for each thing that the run would stop at, or lose, as far as it shows from here.

  What is in a bucket is not looked for: that would copy it.
  """
  looked_for = [(catalog.check_prompts, entry.prompts) for entry in (*config.task, *config.eval)]
  if config.pretraining.pretrain_weight:
    looked_for.append((catalog.check_pairs, config.pretraining.pretrain_data))
  for check, name in dict.fromkeys(looked_for):
    try:
      if "://" not in name:
        check(name)
    except UserError as error:
      yield str(error)
  workdir = config.output.workdir
  if workdir and target.processes > 1 and not files.is_bucket(workdir):
    yield (
      f"--workdir={workdir} has to be a disk that all {target.processes} processes see: mount one,"
      " or give gs://BUCKET/..."
    )


def _programs(rows: Sequence[Row], target: Target) -> Iterator[str]:
  """The table of an iteration's programs."""
  yield "| program | calls an iteration | work | GiB of a device in use |"
  yield "|" + "---|" * 4
  for row in rows:
    memory = f"{row.needed / GIB:.2f}"
    memory = f"at least {memory}, estimated" if row.result.estimated else memory
    if target.memory:
      memory += f", of {target.memory / GIB:.2f}"
    memory += "" if fits(row, target) else ": **does not fit**"
    work = _flop(row.result.flops * row.call.times)
    yield f"| {row.call.name} | {row.call.times} | {work} | {memory} |"
  if any(row.result.estimated for row in rows):
    yield (
      "Estimated are the arguments alone, without activations. What a program takes is known when"
      f" it was compiled: launch/compile.py --target={target.name} with the same flags."
    )


def _costs(work: cost.Work, target: Target, settings: PlanConfig) -> Iterator[str]:
  """The table of what the run costs, and what is assumed."""
  chip, price = target.chip, settings.price_per_chip_hour
  yield "| from here to the end | work | share |" + (
    " chip hours | time |" + (" price |" if price else "") if chip else ""
  )
  yield "|" + "---|" * (3 + (2 + bool(price) if chip else 0))
  for name, flops in (
    ("sampling", work.sampling),
    ("updates", work.updates),
    ("evaluation", work.evaluation),
    ("all", work.total),
  ):
    line = f"| {name} | {_flop(flops)} | {flops / (work.total or 1):.0%} |"
    if chip:
      hours = cost.chip_hours(flops, chip, settings.utilisation)
      line += f" {hours:,.1f} | {_time(hours / target.chips)} |"
      line += f" {hours * price:,.2f} |" if price else ""
    yield line
  if chip:
    yield (
      f"At {settings.utilisation:.0%} of the chips' peak (--utilisation). Rewards, reading images,"
      " compiling and saving come on top."
    )
  else:
    yield f"Hours are not known, as {target.name} has no known peak: give --target=h100:8, say."


def _done(workdir: str) -> int | None:
  """Iterations that a run in this directory has behind it; None where it cannot be read."""
  if not workdir:
    return 0
  try:
    with files.reading(workdir):
      step = folders.newest(files.path_of(workdir) / "checkpoints")
  except UserError:
    return None
  return 0 if step is None else folders.iteration_of(step)


def _flop(count: float) -> str:
  """Operations with a unit that leaves few digits."""
  unit, size = next(((u, s) for u, s in _UNITS if count >= s), _UNITS[-1])
  return f"{count / size:,.1f} {unit}FLOP"


def _time(hours: float) -> str:
  return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def _plural(noun: str, count: int) -> str:
  return noun if count == 1 else f"{noun}es" if noun.endswith("s") else f"{noun}s"
