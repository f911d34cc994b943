"""Whether two processes make the run that one makes.

    python experiments/processes.py --output=experiments/processes.md

Trains the tests' tiny model for three iterations on four tasks at once, whose rewards are a JAX
function, a host function, a model on a server of this machine, and a function of sets of images; a
full network and a LoRA, with whole and with sharded parameters; each by one process with four CPU
devices and by two with two each. Ends with status 1 if a number differs by more than float32 sums
in another order do. What comes of two processes of which one is disturbed is among the faults of
experiments/faults.py.

Needs the extra `test`. Takes about four minutes of a core.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import pathlib
import sys
import tempfile
from typing import Any

import jax
import numpy as np

_ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(_ROOT / "tests"))

import forked_cases  # noqa: E402
import train_cases as cases  # noqa: E402

VARIANTS: Mapping[str, Mapping[str, int]] = {
  "full": {},
  "full, --fsdp=4": {"fsdp": 4},
  "full, --fsdp=2": {"fsdp": 2},
  "LoRA": {"lora_rank": 4},
  "LoRA, --fsdp=4": {"lora_rank": 4, "fsdp": 4},
}
TASKS = ("jax", "host", "remote", "set")
DEVICES = 4
CLOSE = 1e-5  # parameters: float32 sums in another order, through a few updates
REWARDS_CLOSE = 1e-4  # a standard deviation is small beside the rewards that it is of


@contextlib.contextmanager
def served(nursery: forked_cases.Nursery, folder: pathlib.Path) -> Iterator[str]:
  """The address of a reward server that runs in the block."""
  port = forked_cases.free_port()
  command = [_ROOT / "experiments" / "rewards" / "remote_server.py", f"--port={port}"]
  server = nursery.start([*command, f"--model={folder}/rewards.py:green"], folder / "served")
  try:
    yield f"http://127.0.0.1:{port}/v2/models/green?retries=20"
  finally:
    server.kill()


def run(
  nursery: forked_cases.Nursery,
  folder: pathlib.Path,
  address: str,
  processes: int,
  settings: Mapping[str, int],
) -> pathlib.Path:
  """The workdir of a run on all devices."""
  name = "_".join(f"{key}_{value}" for key, value in settings.items())
  workdir = folder / f"run_{processes}_{name}"
  tasks = (
    cases.task(folder, "jax", "jax:red"),
    cases.task(folder, "host", "host:green"),
    dataclasses.replace(cases.task(folder, "remote"), reward=address),
    cases.task(folder, "set", "host:spread", images_per_prompt=2),
  )
  config = cases.config(
    folder, workdir, task=tasks, iterations=3, max_nan_share=1.0, checkpoint_every=3, **settings
  )
  command = [_ROOT / "launch" / "train.py", *cases.flags(config)]
  command.append(f"--cpu_devices={DEVICES // processes}")
  started = nursery.start_run(command, folder / "said", processes)
  if any([process.wait(1800) for process in started]):
    raise SystemExit("".join(process.errors() for process in started))
  return workdir


def relative(found: Any, expected: Any) -> float:
  """The largest difference, relative to the largest number that is expected."""
  found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
  largest = np.max(np.abs(expected), initial=0)
  return float(np.max(np.abs(found - expected), initial=0) / max(largest, 1e-12))


def compared(one: pathlib.Path, other: pathlib.Path) -> list[float]:
  """The largest difference of each task's reward statistics, and of the trained parameters."""
  rewards = [
    max(
      relative(b[f"reward/{task}/{what}"], a[f"reward/{task}/{what}"])
      for a, b in zip(cases.metrics(one), cases.metrics(other), strict=True)
      for what in ("mean", "std", "min", "max")
    )
    for task in TASKS
  ]
  leaves = (jax.tree.leaves(cases.final_state(workdir)["params"]) for workdir in (one, other))
  return [*rewards, max(relative(b, a) for a, b in zip(*leaves, strict=True))]


def page(rows: Mapping[str, Sequence[float]]) -> str:
  """The table, in Markdown."""
  lines = [
    "# Two processes beside one",
    "",
    "    python experiments/processes.py --output=experiments/processes.md",
    "",
    "Three iterations of the tests' tiny model on four tasks at once; two processes with two CPU",
    "devices each beside one with four. The largest difference, relative to the largest number: of",
    "each reward's mean, standard deviation, least and greatest, over all iterations, and of the",
    "trained parameters at the end, each array by itself.",
    "",
    "| | JAX reward | host function | remote | on sets | parameters |",
    "|---|---|---|---|---|---|",
  ]
  lines += [f"| {name} | {' | '.join(f'{x:.0e}' for x in row)} |" for name, row in rows.items()]
  return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--output", type=pathlib.Path, help="Markdown file for the table")
  options = parser.parse_args(arguments)
  rows = {}
  with tempfile.TemporaryDirectory(prefix="rlft-") as made:
    folder = cases.make_folder(pathlib.Path(made) / "tiny")
    nursery = forked_cases.Nursery(cases.environment_of_runs(folder / "cache"))
    with served(nursery, folder) as address:
      for name, settings in VARIANTS.items():
        one, two = (run(nursery, folder, address, n, settings) for n in (1, 2))
        rows[name] = compared(one, two)
        print(f"{name}: {' '.join(f'{x:.1e}' for x in rows[name])}", flush=True)
    nursery.close()
  if options.output:
    options.output.write_text(page(rows))
  sys.exit(any(max(rewards) > REWARDS_CLOSE or own > CLOSE for *rewards, own in rows.values()))


if __name__ == "__main__":
  main()
