"""What the accelerator of this machine does with rlft, in a few minutes, with nothing downloaded.

    python experiments/accelerator.py --budget=450 --output=runs/accelerator.md

Models are of their published sizes with random weights (`--scale=full`, for 80 GB of memory), or
tiny (`--scale=tiny`, which any CPU runs in two minutes: that the script works). Its parts, the most
important first:

    kernels     which attention is chosen, its errors and times beside XLA's
    agreement   ratio 1 in bfloat16, samples beside a CPU's, compilations, the old state given up
    large       SD 2 at 512 x 512, all weights: sampling, update and iteration beside the rate of
                matrix products
    trace       where the time of that goes, and its memory beside the prediction
    diffusers   the same work by diffusers' PyTorch networks, eager and compiled
    levers      the same with other microbatches, and without remat
    wide        SDXL at 1024 x 1024 with LoRA
    rewards     ImageReward's and PickScore's networks
    run         the miniature's default run from its start to its report

Each runs in a process of its own, so that what fails costs only itself, and is ended when its
share of the budget is over; what a part leaves goes to the next. Tiny ones have no shares, and as
nothing is measured there, two run at once. Every figure is written as it is found, a line of JSON
beside `--output`, which is the table at the end. The status is not 0 if a check or a part failed; a
part that was ended has not. `accelerator.md` says what to carry to a machine without network, and
has the results.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import contextlib
import dataclasses
import datetime
from importlib import metadata
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags

from rlft.config import flags as cli
from rlft.config.fields import suggestion
from rlft.performance.accelerator import checks, measuring, speed
from rlft.performance.accelerator.measuring import Found, Say
from rlft.performance.accelerator.scales import SCALES, Scale
from rlft.storage import files
from rlft.types import UserError

_SCALE = flags.DEFINE_enum("scale", "full", [*SCALES], "how large the models are")
_BUDGET = flags.DEFINE_integer("budget", 450, "seconds for all parts", lower_bound=1)
_PARTS = flags.DEFINE_list("parts", [], "only these parts, with commas between")
_OUTPUT = flags.DEFINE_string("output", "runs/accelerator.md", "file for the table")
_PART = flags.DEFINE_string("part", "", "what a process of the script itself runs")

# JAX takes most of a device's memory at once, but not where another library, or the process of a
# run, wants some.
_FRACTION = "XLA_CLIENT_MEM_FRACTION"
# JAX refuses to be given it under its former name, too.
_OURS = {} if "XLA_PYTHON_CLIENT_MEM_FRACTION" in os.environ else {_FRACTION: "0.92"}
_SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
_DEVICE = "device"  # what each part says first
_SAID = 3000  # characters of a failed part's stderr that are passed on
_WHOLE = "the whole part"  # what is said of it last


@dataclasses.dataclass(frozen=True)
class Part:
  """A part, its share of the budget at full scale, and the environment of its process."""

  run: Callable[[Scale, Say], None]
  share: float
  environment: dict[str, str] = dataclasses.field(default_factory=lambda: _OURS)


PARTS = {
  "kernels": Part(checks.kernels, 0.07),
  "agreement": Part(checks.agreement, 0.09),
  "large": Part(speed.large, 0.40),
  "trace": Part(speed.traced, 0.11),
  "diffusers": Part(speed.diffusers, 0.26, _SHARED),
  "levers": Part(speed.levers, 0.025),
  "wide": Part(speed.wide, 0.025),
  "rewards": Part(speed.rewards, 0.01),
  "run": Part(speed.whole_run, 0.01, _SHARED),
}


def main() -> None:
  output = pathlib.Path(_OUTPUT.value)
  lines = output.with_suffix(".jsonl")
  if _PART.value:
    say = Say(_PART.value, lines)
    if _PART.value != "run":  # Its device is for the process that it starts.
      say(_DEVICE, measuring.device())
    PARTS[_PART.value].run(SCALES[_SCALE.value], say)
    return
  chosen = _chosen(_PARTS.value)
  with files.writing(output):
    output.parent.mkdir(parents=True, exist_ok=True)
    lines.write_text("")
  ends = deadlines({name: PARTS[name].share for name in chosen}, _BUDGET.value)
  if _SCALE.value == "tiny":
    ends = dict.fromkeys(chosen, _BUDGET.value)
  # A part has a session of its own: by default SIGTERM would end this process and leave the other.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  start = time.monotonic()
  with tempfile.TemporaryDirectory(prefix="rlft-accelerator-") as scratch:
    _run_all({name: start + ends[name] for name in chosen}, pathlib.Path(scratch), lines)
  seconds = time.monotonic() - start
  found = [Found(**line) for line in files.read_jsonl(lines)]
  found.sort(key=lambda one: chosen.index(one.part))
  written = f"{_heading(found, seconds)}\n\n{table(found)}\n"
  files.write_atomic(output, written)
  print(written)
  if wrong := [f"{one.part}: {one.what}" for one in found if one.ok is False]:
    raise UserError(f"{len(wrong)} of the checks failed ({'; '.join(wrong)}): see {output}")


def _chosen(names: Sequence[str]) -> list[str]:
  for name in names:
    if name not in PARTS:
      raise UserError(f"--parts={name} is not known: {suggestion(name, PARTS)}")
  return [name for name in PARTS if name in (names or PARTS)]


def deadlines(shares: dict[str, float], budget: float) -> dict[str, float]:
  """When each part must have ended, in seconds from the start; the last when the budget has."""
  total, passed, found = sum(shares.values()), 0.0, {}
  for name, share in shares.items():
    passed += share
    found[name] = budget * passed / total
  return found


def _run_all(ends: Mapping[str, float], scratch: pathlib.Path, lines: pathlib.Path) -> None:
  """Runs the parts, each until its time by `time.monotonic`."""
  count = 2 if _SCALE.value == "tiny" else 1
  running: set[subprocess.Popen] = set()

  def run(name: str) -> None:
    _run(name, ends[name], scratch, Say(name, lines), running)

  with futures.ThreadPoolExecutor(count) as threads:
    try:
      list(threads.map(run, ends))
    except BaseException:  # Told to end: the processes would go on.
      threads.shutdown(wait=False, cancel_futures=True)
      for process in running.copy():
        with contextlib.suppress(ProcessLookupError):  # It has just ended.
          os.killpg(process.pid, signal.SIGKILL)
      raise


def _run(
  name: str,
  ends: float,
  scratch: pathlib.Path,
  say: Say,
  running: set[subprocess.Popen],
) -> None:
  """Runs a part in a process of its own, kept in `running`, and ends it when its time is over."""
  seconds = ends - time.monotonic()
  if seconds <= 0:
    say(_WHOLE, "not begun", note=f"no time was left: --parts={name} runs it alone")
    return
  command = [sys.executable, __file__, f"--part={name}", f"--scale={_SCALE.value}"]
  command.append(f"--output={_OUTPUT.value}")
  environment = {  # Parts with the same programs compile them once.
    "JAX_COMPILATION_CACHE_DIR": str(scratch / "programs"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_TRACEBACK_FILTERING": "off",  # Else the last line says only that it is on.
    **PARTS[name].environment,
  }
  if _SCALE.value == "tiny":  # Nothing is measured there: what counts is to compile soon.
    environment |= _SHARED | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    if _version("jaxlib").startswith("0.10."):  # Later ones do not know it.
      environment["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
  with (scratch / name).open("w+") as errors:
    start = time.monotonic()
    process = subprocess.Popen(
      command, env=environment | os.environ, stderr=errors, start_new_session=True
    )
    running.add(process)
    try:
      status: int | None = process.wait(seconds)
    except subprocess.TimeoutExpired:
      status = None
    finally:
      if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
      running.remove(process)
    seconds = time.monotonic() - start
    if status is None:
      say(_WHOLE, "not finished", note=f"ended after {seconds:.0f} s, its part of the budget")
    elif status:
      errors.seek(0)
      said = errors.read().strip()
      print(said[-_SAID:], file=sys.stderr)
      last = said.rpartition("\n")[2]
      say(_WHOLE, note=f"after {seconds:.0f} s: {last[:300]}", ok=False)
    else:
      say(_WHOLE, seconds, "s")


# ---------------------------------------------------------------------------- the table


def _heading(found: Sequence[Found], seconds: float) -> str:
  device = next((str(one.value) for one in found if one.what == _DEVICE), "no device")
  packages = ("jax", "jaxlib", "flax", "torch", "diffusers")
  versions = ", ".join(f"{name} {version}" for name in packages if (version := _version(name)))
  date = datetime.date.today().isoformat()
  return f"{device}, {date}; {versions}. `--scale={_SCALE.value}`, {seconds:.0f} s."


def _version(package: str) -> str:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return ""


def table(found: Sequence[Found]) -> str:
  """What the parts have found, in Markdown."""
  lines = ["| part | what was measured | found | about it |", "|---|---|---|---|"]
  part = ""
  for one in found:
    if one.what != _DEVICE:
      name = "" if one.part == part else one.part
      cells = (name, one.what, _value(one), one.note)
      lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
      part = one.part
  return "\n".join(lines)


def _value(found: Found) -> str:
  value: Any = found.value
  if isinstance(value, float):
    value = f"{value:.0%}" if found.unit == "share" else f"{value:.4g}"
  words = f"{value} {found.unit}" if found.unit not in ("", "share") else str(value)
  wrong = f"**{words}: wrong**" if words else "**failed**"
  return {None: words, True: f"{words}, as it should", False: wrong}[found.ok]


if __name__ == "__main__":
  cli.main(main)
