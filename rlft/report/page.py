"""report.html: what a run came to, on one page that needs no other file and no network."""

from collections.abc import Collection
import json
import os
import re

import numpy as np

from rlft.evaluation import statistics, summary
from rlft.report import charts, evaluations, metrics, samples
from rlft.report import verdict as verdict_lib
from rlft.report.render import render
from rlft.report.run_files import TIMES, RunFiles, read_run
from rlft.report.usage import Cost
from rlft.storage import files

REPORT_FILE = "report.html"
PICTURES = 8_000_000  # bytes of all pictures together, in base64, so that a page can be mailed

_RATIO_FLOOR = 1e-9

# Title, key in metrics.jsonl (a group in it names the curve), how it is drawn, how it is read.
_PANELS = (
  (
    "How far an iteration's updates move ratios",
    r"approx_kl(?:/(.+))?",
    {"smooth": True},
    "Mean of w - 1 - log w of ratios w: half the mean square of log w. Below 0.005 clip_range² next"
    " to nothing moves; where it jumps, the rate is high.",
  ),
  (
    "Share of clipped ratios",
    r"clip_fraction(?:/(.+))?",
    {"smooth": True},
    "Images that the clipping leaves without a gradient. At 0 nothing moves; above a half most of"
    " the work is thrown away.",
  ),
  (
    "|ratio − 1| before the first update",
    r"ratio/max_abs_deviation(?:/(.+))?",
    {"log_floor": _RATIO_FLOOR, "peaks": True},
    "0 up to rounding, where sampling and training compute the same.",
  ),
  (
    "KL divergence from the base model",
    r"kl_to_base(?:/(.+))?",
    {"smooth": True},
    "How far the run has gone from where it started.",
  ),
  ("Loss", r"loss/(.+)", {"smooth": True}, ""),
  (
    "Gradient norm",
    r"grad(?:ient)?_norm(?:/(.+))?",
    {"smooth": True},
    "Before it is cut to --max_grad_norm.",
  ),
  (
    "Gradient norm of the pretraining step",
    r"pretrain/grad_norm",
    {"smooth": True},
    "Before it is cut to --max_grad_norm.",
  ),
  ("Learning rate", r"learning_rate", {}, ""),
  ("Images per second", r"images_per_second", {}, ""),
)


def write_report(
  workdir: str | os.PathLike[str],
  *,
  command: str | None = None,
  lower_is_better: Collection[str] = (),
) -> files.Path:
  """Writes `report.html`, whole or not at all; arguments as of `run_files.read_run`.

  Returns:
    The path of the report.

  Raises:
    UserError: a damaged file in the run's directory, or the report cannot be written.
  """
  run = read_run(workdir, command=command, lower_is_better=lower_is_better)
  galleries = samples.galleries(workdir, budget=PICTURES)
  rewards, training, more = training_charts(run)
  page = render(
    "page.html",
    title=f"rlft: {run.name}",
    verdict=run.verdict,
    facts=facts(run),
    steps=verdict_lib.next_steps(run.verdict, run.place, run.training),
    columns=evaluations.columns(run.history, run.best),
    evaluations=evaluations.rows(run.history, run.best, run.guards),
    found=any(not np.isnan(one.found) for _, found in run.history for one in found.values()),
    level=f"{statistics.LEVEL:.0%}",
    effect=f"{statistics.EFFECT:.0%}",
    held_out=evaluations.history_charts(run.history, run.best),
    galleries=galleries,
    times=times(galleries),
    rewards=rewards,
    judged=any(key.startswith("watch/") for key in run.keys),
    calls=run.calls,
    training=training,
    more=more,
    made=made(run),
    tasks=run.tasks,
    place=run.place,
    settings={key: json.dumps(value) for key, value in run.config.items()},
  )
  path = files.path_of(workdir) / REPORT_FILE
  files.write_atomic(path, page)
  return path


def times(galleries: Collection[samples.Gallery]) -> list[tuple[int, str]]:
  """The iterations that any gallery has pictures of, and what they are called."""
  found = sorted({iteration for gallery in galleries for iteration in gallery.iterations})
  return [(iteration, summary.when(iteration)) for iteration in found]


def facts(run: RunFiles) -> list[tuple[str, str]]:
  """How far a run came, and what that took: names and values."""
  done, total = run.training.done, run.training.total
  found = [("Iterations", f"{done} of {total}" if total else f"{done}")]
  if run.images is not None:
    found.append(("Images seen", f"{run.images:,}"))
  if run.cost:
    starts = f" in {run.cost.starts} starts" if run.cost.starts > 1 else ""
    found += [
      ("Wall clock", duration(run.cost.seconds) + starts),
      ("Device hours", f"{run.cost.device_hours:.3g}"),
      ("Hardware", "; ".join(run.cost.hardware)),
      ("Peak memory", _memory(run.cost)),
    ]
  elif run.seconds:
    found.append(("Sampling, scoring, updating", duration(run.seconds)))
  return found


def duration(seconds: float) -> str:
  """In seconds, minutes or hours."""
  for unit, size in (("h", 3600), ("min", 60)):
    if seconds >= 2 * size:
      return f"{seconds / size:.1f} {unit}"
  return f"{seconds:.0f} s"


def _memory(cost: Cost) -> str:
  """The most that was in use on a device, if it says so, and on the host."""
  host = f"{cost.peak_host_bytes / 2**30:.1f} GiB on the host"
  if not cost.peak_device_bytes:
    return host
  return f"{cost.peak_device_bytes / 2**30:.1f} GiB a device, {host}"


def made(run: RunFiles) -> list[tuple[str, str]]:
  """From what, by what and where a run was made."""
  found = [("Base model", run.config.get("pretrained") or "?")]
  if algorithm := run.config.get("algorithm"):
    found.append(("Algorithm", algorithm))
  if run.cost:
    found += [
      ("Hardware", "; ".join(run.cost.hardware)),
      ("Versions", ", ".join(f"{name} {version}" for name, version in run.cost.versions.items())),
      ("Commit of rlft", ", ".join(run.cost.commits) or "not known"),
      ("Starts", f"{run.cost.starts}, {duration(run.cost.seconds)} in all"),
    ]
  parts = [(key.removeprefix("time/").removesuffix("_s"), run.values(key)) for key in TIMES]
  spent = [f"{name} {duration(float(np.nansum(values)))}" for name, values in parts]
  return found + ([("Of that, in iterations", ", ".join(spent))] if run.seconds else [])


def training_charts(run: RunFiles) -> tuple[list[str], list[str], list[str]]:
  """Rewards with their judges; whether training is healthy; then all else, to be folded away."""
  if not run.rows:
    return [], [], []
  x = run.values("iteration")
  keys = run.keys

  def curve(name: str, key: str) -> charts.Series:
    return charts.Series(name, x, run.values(key))

  shown, rewards, figures = {"images_seen"}, [], []
  judges = {task["name"]: task["watch"] for task in run.tasks}
  for name in metrics.trained_curves(keys):
    key, task = f"reward/{name}/mean", name.partition("/")[0]
    judged = f"watch/{task}/mean"
    shown |= {key, judged}
    if judged not in keys:
      rewards.append(charts.line_chart(f"Reward: {name}", [curve("", key)], smooth=True))
      continue
    judge = judges.get(task) or "judge"
    lower = judge in run.lower_is_better
    direction = "lower is better, drawn upside down" if lower else "higher is better"
    title = f"Reward: {name}, and {judge}, never trained on (right scale, {direction})"
    both = curve("reward", key), curve(judge, judged)
    rewards.append(charts.two_scale_chart(title, *both, flip=lower))
  for title, pattern, options, hint in _PANELS:
    matches = [match for key in keys if (match := re.fullmatch(pattern, key))]
    if matches:
      shown.update(match[0] for match in matches)
      total = "all tasks" if len(matches) > 1 else ""
      curves = [
        curve(match[1] if match.re.groups and match[1] else total, match[0]) for match in matches
      ]
      figures.append(charts.line_chart(title, curves, hint=hint, **options))
  parts = [key for key in TIMES if key in keys]
  if parts:
    shown.update(parts)
    split = [curve(key.removeprefix("time/").removesuffix("_s"), key) for key in parts]
    figures.append(charts.stacked_chart("Seconds of an iteration", split))
  rest = [charts.line_chart(key, [curve("", key)]) for key in keys if key not in shown]
  return rewards, figures, rest
