"""Credit within a set: the set's score to all its images, or what the set would lose without each.

python experiments/credit_assignment.py

Trains the skin-tone task of experiments/emoji_skintone.flags with both credits and several seeds,
one run after another, and measures held-out parity on the way. Runs of the same seed draw the same
prompts with the same noise, and so the same images until the first update. Interrupted, the same
command goes on where it stopped.

Result, in runs/credit_assignment: a table of all measurements (credit_assignment.csv), the number
of images that each credit needed to reach a parity (credit_assignment.json, and printed), and a
picture of the curves (credit_assignment.html). Duration: 36 minutes on 2 busy cores. What was found
is in experiments/README.md.
"""

from collections.abc import Mapping, Sequence
import csv
import io
import json
import pathlib
import subprocess
import sys

from absl import flags
import numpy as np

from rlft.config import flags as cli
from rlft.config import tasks
from rlft.config.settings import TaskConfig
from rlft.evaluation import convergence, results
from rlft.report import charts
from rlft.rewards import sets
from rlft.storage import files
from rlft.types import UserError

_ROOT = pathlib.Path(__file__).parents[1]
_NAME = "credit_assignment"
# Images without a skin tone have no credit by leave-one-out; the runs of both must not end at them.
_MAX_NAN_SHARE = 0.5

_WORKDIR = flags.DEFINE_string("workdir", f"runs/{_NAME}", "directory of all runs")
_FLAGFILE = flags.DEFINE_string(
  "base", str(_ROOT / "experiments" / "emoji_skintone.flags"), "flagfile with a task on sets"
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "runs with each credit", lower_bound=1)
_ITERATIONS = flags.DEFINE_integer("iterations", 24, "of each run", lower_bound=1)
_EVAL_EVERY = flags.DEFINE_integer("eval_every", 4, "iterations between evaluations", lower_bound=1)
_EVAL_IMAGES = flags.DEFINE_integer("eval_images", 256, "images of an evaluation", lower_bound=2)
_TARGETS = flags.DEFINE_list(
  "targets", ["0.55", "0.5", "0.45", "0.4"], "values of held-out parity, of which less is better"
)

# [(iterations done, result of the evaluation)] of each run, by credit and seed.
Runs = Mapping[tuple[str, int], Sequence[tuple[int, results.EvalResult]]]


def main() -> None:
  workdir = pathlib.Path(_WORKDIR.value)
  base = pathlib.Path(_FLAGFILE.value).read_text().splitlines()
  try:
    targets = sorted(map(float, _TARGETS.value), reverse=True)
  except ValueError:
    raise UserError(f"--targets={','.join(_TARGETS.value)}: give numbers, e.g. 0.5,0.4") from None
  runs = {}
  todo = [(credit, seed) for seed in range(_SEEDS.value) for credit in sets.CREDITS]
  for number, (credit, seed) in enumerate(todo, 1):
    folder = workdir / f"{credit}-{seed}"
    print(f"run {number} of {len(todo)}: credit={credit}, seed={seed} ({folder})", flush=True)
    lines, task, name = run_flags(
      base,
      credit,
      folder,
      seed=seed,
      iterations=_ITERATIONS.value,
      eval_every=_EVAL_EVERY.value,
      eval_images=_EVAL_IMAGES.value,
      max_nan_share=_MAX_NAN_SHARE,
    )
    if not (history := results.read_history(folder)) or history[-1][0] < _ITERATIONS.value:
      folder.mkdir(parents=True, exist_ok=True)
      (folder / "run.flags").write_text("\n".join(lines) + "\n")
      command = [sys.executable, _ROOT / "launch" / "train.py", f"--flagfile={folder}/run.flags"]
      if status := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"the run in {folder} ended with status {status}: see above, then go on")
      history = results.read_history(folder)
      if not history or history[-1][0] < _ITERATIONS.value:
        raise UserError(f"the run in {folder} was stopped: the same command goes on from there")
    runs[credit, seed] = [(iteration, found[name]) for iteration, found in history]
  write(workdir, runs, targets, batch_size=task.batch_size)


def run_flags(
  base: Sequence[str], credit: str, workdir: pathlib.Path, *, eval_images: int, **settings: float
) -> tuple[list[str], TaskConfig, str]:
  """The flags of one run: those of a flagfile with another credit.

  Args:
    base: lines of a flagfile with one task.
    credit: one of `rlft.rewards.sets.CREDITS`.
    workdir: of the run.
    eval_images: of the evaluation by the preset's judge of parity.
    **settings: other flags.

  Returns:
    The lines, the task, and the name of the evaluation.
  """
  found = [line.partition("=")[2] for line in base if line.startswith("--task=")]
  if len(found) != 1:
    raise UserError(f"the flagfile has {len(found)} tasks: give one with one task")
  (task,) = tasks.parse_task(found[0])
  reward = f"{task.reward}{'&' if '?' in task.reward else '?'}credit={credit}"
  (judge,) = (entry for entry in tasks.EVAL_PRESETS["emoji"] if entry.name == "parity")
  ours = {
    "task": f"{found[0]},reward={reward}",
    "workdir": workdir,
    "eval": f"name={judge.name},prompts={judge.prompts},metric={judge.metric},images={eval_images},"
    f"images_per_prompt={judge.images_per_prompt}",
    **settings,
  }
  kept = [line for line in base if line.startswith("--") and line[2:].partition("=")[0] not in ours]
  return [*kept, *(f"--{key}={value}" for key, value in ours.items())], task, judge.name


def write(workdir: pathlib.Path, runs: Runs, targets: Sequence[float], *, batch_size: int) -> None:
  """Writes the measurements, the summary and the picture, and prints the summary.

  Args:
    workdir: where to.
    runs: all with evaluations at the same iterations.
    targets: values of parity; the lowest that each credit's mean curve reached is added.
    batch_size: images of an iteration.
  """
  rows = io.StringIO()
  writer = csv.writer(rows, lineterminator="\n")
  writer.writerow(["credit", "seed", "iteration", "images", "parity", "low", "high", "unscored"])
  for (credit, seed), history in runs.items():
    for iteration, r in history:
      numbers = (f"{value:.5f}" for value in (r.mean, r.low, r.high))
      writer.writerow([credit, seed, iteration, iteration * batch_size, *numbers, r.unscored])
  files.write_atomic(workdir / f"{_NAME}.csv", rows.getvalue())

  images = np.array([iteration for iteration, _ in next(iter(runs.values()))]) * batch_size
  curves = {
    credit: np.array([[r.mean for _, r in h] for (c, _), h in runs.items() if c == credit])
    for credit in sets.CREDITS
  }
  means = {credit: curve.mean(axis=0) for credit, curve in curves.items()}
  common = max(float(mean.min()) for mean in means.values())
  summary = {"seeds": len(curves[sets.CREDITS[0]]), "batch_size": batch_size, "credits": {}}
  lines = [["credit", "parity", "images (mean curve)", "of each seed"]]
  for credit, curve in curves.items():
    reached = []
    for target in [*targets, common]:
      mean, *each = (
        convergence.first_at(images, one, target, lower_is_better=True)
        for one in (means[credit], *curve)
      )
      reached.append({"parity": target, "images": mean, "each": each})
      words = ["-" if n is None else f"{n:,.0f}" for n in (mean, *each)]
      lines.append([credit, f"{target:.3f}", words[0], "  ".join(words[1:])])
    summary["credits"][credit] = {
      "last_parity": curve[:, -1].tolist(),
      "last_parity_mean": float(curve[:, -1].mean()),
      "reached": reached,
    }
  files.write_atomic(workdir / f"{_NAME}.json", json.dumps(summary, indent=2) + "\n")

  series = [
    charts.Series(credit, images, means[credit], curve.min(axis=0), curve.max(axis=0))
    for credit, curve in curves.items()
  ]
  title = f"Held-out parity (lower is better) over images, mean and range of {len(curve)} seeds"
  table = "\n".join("  ".join(cell.ljust(20) for cell in line).rstrip() for line in lines)
  page = _PAGE.format(chart=charts.line_chart(title, series), table=table)
  files.write_atomic(workdir / f"{_NAME}.html", page)
  print(f"images until held-out parity is reached:\n{table}\nwritten to {workdir}/{_NAME}.*")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Credit within a set</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 720px; margin: 0 auto; padding: 12px; }}
figure {{ margin: 0; }} svg text {{ font-size: 11px; fill: #555; }} svg .g {{ stroke: #e4e4e4; }}
.legend span {{ margin-right: 12px; }}
.legend i {{ display: inline-block; width: 10px; height: 10px; margin-right: 4px; }}
</style></head><body>{chart}<p>Images until held-out parity is reached:</p><pre>{table}</pre></body>
</html>
"""

if __name__ == "__main__":
  cli.main(main)
