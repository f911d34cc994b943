"""How a run's time and memory grow, and what more chips would lose.

    python experiments/scaling.py --part=measured --workdir=/tmp/scaling
    python experiments/scaling.py --part=predicted --workdir=/tmp/scaling

`measured`: runs of the tests' tiny model on this machine's CPU, of which one thing grows: images of
an iteration, prompts, tasks, devices, processes. The median time of an iteration, and the most
memory of the (first) process. All that is slow there is rlft itself, as the network is tiny.

`predicted`: Stable Diffusion 2, every weight, and SDXL with LoRA: work of an iteration's programs
by count of their products and of the memory that these read and write, bytes that a device sends by
`rlft.performance.compile.communication`, which compiled programs agree with
(experiments/compile.md), and the time that all of it takes on 8, 128 and 1,024 chips at public
rates. Nothing is compiled, so no accelerator's compiler is needed.

Either writes WORKDIR/PART.json point by point, goes on where it was stopped, and in the end prints
its tables; `measured` draws WORKDIR/scaling.png where matplotlib is installed. Needs the extra
`test`; some ten minutes of a core.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import shutil
import statistics
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(_ROOT / "tests"))

from absl import flags as absl_flags  # noqa: E402
import forked_cases  # noqa: E402
import jax  # noqa: E402
import train_cases as cases  # noqa: E402

from rlft.config import fields, flags  # noqa: E402
from rlft.config.settings import Config  # noqa: E402
from rlft.models import dispatch  # noqa: E402
from rlft.performance.compile import abstract_run, communication, hlo, targets  # noqa: E402
from rlft.performance.compile.chips import CHIPS, GIB, Chip  # noqa: E402
from rlft.storage import files  # noqa: E402

# ---------------------------------------------------------------------------- measured

ITERATIONS = 22  # of which the first two are slower


@dataclasses.dataclass(frozen=True)
class Point:
  """A run: images of an iteration and tasks that share them, prompts, devices and processes."""

  images: int = 32
  tasks: int = 1
  prompts: int = 1000
  devices: int = 1
  processes: int = 1


AXES: Mapping[str, Sequence[Point]] = {
  "images": [Point(images=n) for n in (8, 32, 128)],
  "prompts": [Point(prompts=n) for n in (1000, 1_000_000, 2_000_000)],
  "tasks": [Point(images=64, tasks=n) for n in (1, 2, 8)],
  "devices": [Point(devices=n) for n in (1, 2, 4, 8)],
  "processes": [Point(devices=4, processes=n) for n in (1, 2, 4)],
}


def measure(nursery: forked_cases.Nursery, folder: pathlib.Path, point: Point) -> dict[str, float]:
  """Seconds of an iteration, seconds beside all iterations, and the most bytes of a process."""
  prompts = folder / f"{point.prompts}.txt"
  if not prompts.exists():
    lines = [cases.PROMPTS[i % len(cases.PROMPTS)] for i in range(point.prompts)]
    prompts.write_text("\n".join(lines))
  name = "_".join(str(value) for value in dataclasses.astuple(point))
  task = cases.task(folder, batch_size=point.images // point.tasks, prompts=str(prompts))
  config = cases.config(
    folder,
    folder / name,
    task=tuple(dataclasses.replace(task, name=f"red{i}") for i in range(point.tasks)),
    iterations=ITERATIONS,
    pretrain_weight=0.0,
    report_images=0,
  )
  # The first run compiles what the second finds kept: compilation takes memory, too.
  for workdir in (folder / f"{name}_compiles", folder / name):
    shutil.rmtree(workdir, ignore_errors=True)  # Of a measurement that was stopped.
    config = fields.replace(config, workdir=str(workdir))
    command = [_ROOT / "launch" / "train.py", *cases.flags(config)]
    command.append(f"--cpu_devices={point.devices // point.processes}")
    started = nursery.start_run(command, folder / "said", point.processes)
    if any([process.wait(3600) for process in started]):
      raise SystemExit("".join(process.errors() for process in started))
  times = [line["time/iteration_s"] for line in cases.metrics(workdir)]
  (usage,) = files.read_jsonl(workdir / "usage.jsonl")
  return {
    "iteration_s": statistics.median(times[2:]),
    "rest_s": usage["seconds"] - sum(times),
    "bytes": usage["peak_host_bytes"],
  }


def measured(workdir: pathlib.Path, kept: dict[str, Any]) -> str:
  """Measures what is not in `kept`, and makes the tables."""
  folder = workdir / "tiny"
  if not folder.exists():
    cases.make_folder(folder)
  nursery = forked_cases.Nursery(cases.environment_of_runs(folder / "cache"))
  for axis, points in AXES.items():
    for point in points:
      if (key := repr(point)) not in kept:
        kept[key] = measure(nursery, folder, point)
        files.write_atomic(workdir / "measured.json", json.dumps(kept, indent=2))
        print(f"{axis}: {point}: {kept[key]}", flush=True)
  nursery.close()
  if importlib.util.find_spec("matplotlib"):
    draw(kept, workdir / "scaling.png")
  lines = []
  for axis, points in AXES.items():
    lines += [
      "",
      f"| {axis} | an iteration, ms | beside iterations, s | memory, MiB |",
      "|---|---|---|---|",
    ]
    for point in points:
      found = kept[repr(point)]
      lines.append(
        f"| {getattr(point, axis):,} | {1e3 * found['iteration_s']:.0f} | {found['rest_s']:.1f} |"
        f" {found['bytes'] / 2**20:,.0f} |"
      )
  return "\n".join(lines[1:])


def draw(kept: Mapping[str, Any], path: pathlib.Path) -> None:
  """A picture with a panel for each axis."""
  import matplotlib.pyplot as plt

  ticks = (20, 50, 100, 200, 500)
  figure, panels = plt.subplots(1, len(AXES), figsize=(15, 2.8), sharey=True, layout="constrained")
  for panel, (axis, points) in zip(panels, AXES.items(), strict=True):
    x = [getattr(point, axis) for point in points]
    panel.loglog(x, [1e3 * kept[repr(point)]["iteration_s"] for point in points], "o-")
    panel.set_xticks(x, [f"{value:,}" if value < 1e6 else f"{value // 10**6} M" for value in x])
    panel.set_yticks(ticks, [f"{value}" for value in ticks])
    panel.minorticks_off()
    panel.set(xlabel=axis)
    panel.grid(alpha=0.3)
  panels[0].set_ylabel("an iteration, ms")
  figure.savefig(path, dpi=100)


# ---------------------------------------------------------------------------- predicted

UTILISATION = 0.4  # of the peak: the higher it is, the more communication weighs
CHIP_COUNTS = (8, 128, 1024)
_FSDP = 8  # parameters are spread over this many chips, a machine of GPUs
_LINK_S, _NETWORK_S = 1e-6, 5e-6  # until a message is there
_SUMMED_AT_ONCE = 2**25  # bytes; compiled programs have one all-reduce for each 40 MiB
# A ring along one axis of a 3-D torus has 2 of a chip's 6 links; sums over 'data' have the others.
_RING = 1 / 3
MODELS = {
  "Stable Diffusion 2, every weight": ("sd2_preference", "sd2-base", 16),
  "SDXL, LoRA of rank 32": ("sdxl_lora", "sdxl-base", 8),
}


class _OnChips(abstract_run.AbstractRun):
  """A run on devices of the CPU that stand for accelerators, which send bfloat16 as it is."""

  def _theory(self, gathers: Any, scatters: Any) -> dict[str, int]:
    found = super()._theory(gathers, scatters)
    sizes = (
      x.size * x.dtype.itemsize for x in jax.tree.leaves(gathers) if communication.is_spread(x)
    )
    return found | {"all-gather": sum(sizes)}


def count(flagfile: str, architecture: str, images: int) -> dict[str, Any]:
  """FLOPs, bytes and arrays of an iteration on 8 devices with `images` each.

  Returns:
    `{program: {flops, moved: bytes of memory, both of a device; gathered, scattered, summed: bytes
    of the whole arrays; arrays: how many are sent}}`; `times` calls together.
  """
  values = absl_flags.FlagValues()
  flags.define(Config, flag_values=values)
  flags.parse(["", f"--flagfile={_ROOT}/experiments/{flagfile}.flags"], flag_values=values)
  config = flags.read(Config, flag_values=values)
  tasks = tuple(dataclasses.replace(task, batch_size=_FSDP * images) for task in config.task)
  config = fields.replace(config, task=tasks, pretrain_batch_size=_FSDP * images)
  target = targets.open_target("v6e:2x4", _FSDP)  # Which 8 devices does not matter here.
  run = _OnChips.of(config, target.mesh, abstract_run.open_model(config, architecture))
  trained = len(jax.tree.leaves(run.state.params))
  frozen = len(jax.tree.leaves(run.frozen))
  found = {}
  for call in run.calls():
    with dispatch.for_platform(target.platform):
      jaxpr = call.program.trace(*call.args).jaxpr
    learns = any(call.theory.get(kind) for kind in ("reduce-scatter", "all-reduce"))
    found[call.name] = {
      "flops": call.times * hlo.flops(jaxpr) / _FSDP,
      "moved": call.times * hlo.product_bytes(jaxpr) / _FSDP,
      "gathered": call.times * call.theory.get("all-gather", 0),
      "scattered": call.times * call.theory.get("reduce-scatter", 0),
      "summed": call.times * call.theory.get("all-reduce", 0),
      "arrays": call.times * (trained if learns else frozen),
    }
    print(f"{architecture}, {call.name}: {found[call.name]}", flush=True)
  return found


def seconds(programs: Mapping[str, Any], chip: Chip, chips: int) -> tuple[float, float, float]:
  """(computing, sending, bytes that a device sends), of an iteration.

  Computing takes as long as its products, or as its memory moves what they read and write.
  Rings: of what is gathered or scattered over n devices, a device sends (n - 1) / n; of what is
  summed, twice that. A message for each array goes around 'fsdp'; sums over 'data' go up and down a
  tree.
  """
  data = chips // _FSDP
  computing = sum(
    max(one["flops"] / (chip.flops * UTILISATION), one["moved"] / chip.memory_rate)
    for one in programs.values()
  )
  if chip.network_rate:
    inside, across, latency = chip.link_rate, chip.network_rate, _NETWORK_S
  else:
    inside, across, latency = chip.link_rate * _RING, chip.link_rate * (1 - _RING), _LINK_S
  sending = sent = 0.0
  for one in programs.values():
    ring = (one["gathered"] + one["scattered"] + 2 * one["summed"]) * (_FSDP - 1) / _FSDP
    # The shards of what was scattered, and what is whole, are summed over 'data'.
    summed = one["scattered"] / _FSDP + one["summed"]
    sums = 2 * summed * (data - 1) / data
    sending += ring / inside + sums / across + one["arrays"] * (_FSDP - 1) * _LINK_S
    sending += math.ceil(summed / _SUMMED_AT_ONCE) * 2 * math.log2(data) * latency
    sent += ring + sums
  return computing, sending, sent


def predicted(workdir: pathlib.Path, kept: dict[str, Any]) -> str:
  """Counts what is not in `kept`, and makes the table."""
  for name, settings in MODELS.items():
    if name not in kept:
      kept[name] = count(*settings)
      files.write_atomic(workdir / "predicted.json", json.dumps(kept, indent=2))
  lines = [
    "| model | chips | images | computing, s | a device sends, GiB | sending, s"
    " | lost, if nothing is hidden |",
    "|" + "---|" * 7,
  ]
  for name, (_, _, images) in MODELS.items():
    for kind in ("v5p", "h100"):
      for chips in CHIP_COUNTS:
        computing, sending, sent = seconds(kept[name], CHIPS[kind], chips)
        lines.append(
          f"| {name} | {kind}:{chips} | {images * chips:,} | {computing:.1f} | {sent / GIB:.1f} |"
          f" {sending:.2f} | {sending / (computing + sending):.1%} |"
        )
  return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--part", choices=("measured", "predicted"), required=True)
  parser.add_argument("--workdir", type=pathlib.Path, required=True, help="directory of everything")
  options = parser.parse_args(arguments)
  workdir = options.workdir.absolute()
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / f"{options.part}.json"
  kept = json.loads(path.read_text()) if path.exists() else {}
  print({"measured": measured, "predicted": predicted}[options.part](workdir, kept))


if __name__ == "__main__":
  main()
