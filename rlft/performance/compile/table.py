"""What ahead-of-time compilation found: the memory and the work of each program, as a table."""

from collections.abc import Sequence
import dataclasses

import jax

from rlft.config import fields
from rlft.config.settings import Config
from rlft.performance.compile import communication
from rlft.performance.compile.abstract_run import AbstractRun, Call, device_bytes
from rlft.performance.compile.chips import GIB
from rlft.performance.compile.targets import Target

ESTIMATED = (
  "Estimated, not compiled: memory is that of arguments, without activations and gathered"
  " parameters. Compilers need none of their devices: pip install 'rlft[aot]' for TPUs,"
  " 'rlft[aot-cuda]' for GPUs."
)


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
    estimated: it was not compiled: memory is that of the arguments alone.
  """

  arguments: int = 0
  temporary: int = 0
  peak: int = 0
  fits: bool = True
  flops: float = 0.0
  xla_flops: float = 0.0
  collectives: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
  seconds: float = 0.0
  estimated: bool = False


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


def fits(row: Row, target: Target) -> bool:
  """Whether the program, and what is kept beside it, are within the device's memory."""
  return row.result.fits and (target.memory is None or row.needed <= target.memory)


def table(run: AbstractRun, target: Target, name: str, rows: Sequence[Row]) -> str:
  """What was found, in Markdown.

  `temporary` has activations, gathered parameters and gradients; `kept beside` is what a device
  keeps of the state while a program runs that does not take it. FLOPs count what remat does twice.
  """
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
    "| program | calls | images | arguments | temporary | kept beside | in use | of the memory"
    " | TFLOP per image | collectives, GiB | compiled in s |",
    "|" + "---|" * 11,
  ]
  for row in rows:
    call, result = row.call, row.result
    share = f"{row.needed / target.memory:.0%}" if target.memory else "-"
    share = f"at least {share}" if result.estimated else share
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
  if any(row.result.estimated for row in rows):
    lines.append(ESTIMATED)
  for row in rows:
    if row.result.fits and not row.result.estimated:
      lines.append(f"Communication of {row.call.name}: {_verdict(run, row)}.")
  return "\n".join(lines)


def _levers(config: Config, mesh: jax.sharding.Mesh) -> str:
  """The settings on which memory depends."""
  batches = "+".join(str(size // mesh.size) for size in sorted({t.batch_size for t in config.task}))
  parts = [
    f"{batches} images a device",
    config.devices.compute_dtype,
    f"attention {config.devices.attention}",
  ]
  parts += [f"LoRA {config.policy.lora_rank}"] if config.policy.lora_rank else []
  parts += ["remat" if config.devices.remat else "no remat"]
  settings = fields.flat(config)
  for name in ("microbatch", "decode_chunk", "param_dtype", "moments_dtype"):
    if settings[name] not in (0, "float32"):
      parts.append(f"{name} {settings[name]}")
  return ", ".join(parts)


def _verdict(run: AbstractRun, row: Row) -> str:
  size = 4 * sum(x.size for x in jax.tree.leaves(run.model.params["unet"]))
  found = communication.surprises(row.result.collectives, row.call.theory, size, row.call.sparable)
  if found:
    return "NOT as expected: " + "; ".join(found)
  return (
    "as expected ("
    + (", ".join(f"{kind} {_gib(n)} GiB" for kind, n in row.call.theory.items() if n) or "none")
    + ")"
  )


def _gib(size: float | None) -> str:
  return "-" if size is None else f"{size / GIB:.2f}"
