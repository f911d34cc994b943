"""report.html: what a run changed, on one page that needs no other file and no network.

Made from what is in the run's directory, whatever of it is there yet: `config.json`,
`metrics.jsonl`, `eval_history.jsonl` and `grids/`.
"""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import json
import os
import re
from typing import Any

import numpy as np

from rlft.evaluation import results, statistics, summary
from rlft.report import charts, hacking, metrics, samples
from rlft.report.render import render
from rlft.storage import files

REPORT_FILE = "report.html"
CONFIG_FILE = "config.json"

_RATIO_FLOOR = 1e-9
_TIMES = ("time/sample_s", "time/reward_s", "time/update_s")

# Title, key in metrics.jsonl (a group in it names the curve), how it is drawn.
_PANELS = (
  ("Approximate KL of an iteration's updates", r"approx_kl(?:/(.+))?", {"smooth": True}),
  ("Share of clipped ratios", r"clip_fraction(?:/(.+))?", {"smooth": True}),
  (
    "|ratio − 1| before the first update",
    r"ratio/max_abs_deviation(?:/(.+))?",
    {"log_floor": _RATIO_FLOOR, "peaks": True},
  ),
  ("KL divergence from the base model", r"kl_to_base(?:/(.+))?", {"smooth": True}),
  ("Loss", r"loss/(.+)", {"smooth": True}),
  ("Gradient norm", r"grad(?:ient)?_norm(?:/(.+))?", {"smooth": True}),
  ("Images per second", r"images_per_second", {}),
)

# What is shown of a task; the page survives settings in which a part is missing.
_TASK = dict.fromkeys(("name", "reward", "prompts", "batch_size", "images_per_prompt"), "?")
_TASK |= {"veto": "", "watch": ""}

_BEST = "base at its best guidance"
_VERDICTS = {"better": "▲ better", "worse": "▼ worse", "unclear": "no clear change"}


def write_report(
  workdir: str | os.PathLike[str],
  *,
  command: str | None = None,
  lower_is_better: Collection[str] = (),
) -> files.Path:
  """Writes `report.html`, whole or not at all.

  Args:
    workdir: the run's directory.
    command: the command line that made the run, to be shown.
    lower_is_better: of the tasks' judges those that improve by falling, as `watch=` names them.

  Returns:
    The path of the report.

  Raises:
    UserError: a damaged file in the run's directory, or the report cannot be written.
  """
  workdir = files.path_of(workdir)
  config = _read_config(workdir / CONFIG_FILE)
  rows = [row for row in files.read_jsonl(workdir / metrics.METRICS_FILE) if "iteration" in row]
  history = results.read_history(workdir)
  tasks = [_TASK | task for task in config.get("task", ()) if isinstance(task, dict)]
  best = results.read_base(workdir)
  ends = [summary.when(iteration) for iteration, _ in [*history[:1], *history[1:][-1:]]]
  training, more = _training_charts(rows, tasks, lower_is_better)
  page = render(
    "page.html",
    title=f"rlft: {os.path.basename(os.path.abspath(workdir))}",
    summary=_summary(config, tasks, rows, history),
    base=config.get("pretrained"),
    tasks=tasks,
    command=command,
    calls=hacking.of_run(workdir, {**config, "task": tasks}, lower_is_better=lower_is_better),
    columns=_columns(ends, best),
    evaluations=_evaluations(history, best),
    found=any(not np.isnan(one.found) for _, found in history for one in found.values()),
    level=f"{statistics.LEVEL:.0%}",
    effect=f"{statistics.EFFECT:.0%}",
    held_out=_history_charts(history),
    galleries=samples.galleries(workdir),
    training=training,
    judged=any(key.startswith("watch/") for row in rows for key in row),
    more=more,
    settings={key: json.dumps(value) for key, value in config.items()},
  )
  path = workdir / REPORT_FILE
  files.write_atomic(path, page)
  return path


def _read_config(path: files.Path) -> dict[str, Any]:
  """The run's settings; empty if they are not there or not readable, which the page survives."""
  try:
    config = json.loads(path.read_text())
  except (OSError, ValueError):
    return {}
  return config if isinstance(config, dict) else {}


def _summary(
  config: Mapping[str, Any],
  tasks: Sequence[Mapping[str, Any]],
  rows: Sequence[Mapping[str, Any]],
  history: results.History,
) -> list[str]:
  """How far the run came, and what that took."""
  total, done = config.get("iterations"), len(rows)
  words = [f"{done} of {total} iterations" if total else f"{done} iterations"]
  sizes = [task["batch_size"] for task in tasks]
  if sizes and all(isinstance(size, int) for size in sizes):
    words.append(f"{done * sum(sizes):,} images sampled")
  seconds = sum(row.get(key) or 0 for row in rows for key in _TIMES)
  if seconds:
    words.append(f"{seconds / 60:.1f} minutes of sampling, scoring and updating")
  if history:
    words.append(f"evaluated {len(history)} times" if len(history) > 1 else "evaluated once")
  return words


@dataclasses.dataclass(frozen=True)
class _Cell:
  """A mean or a change, in words; `verdict` of a change."""

  label: str
  mean: str
  interval: str
  verdict: str = ""


@dataclasses.dataclass(frozen=True)
class _Evaluation:
  """A row of the table: an evaluation at the start, at the end, and the change."""

  name: str
  about: str
  counts: str
  trained_on: bool
  kind: str  # of the change, for the style
  cells: tuple[_Cell, ...]


def _columns(ends: Sequence[str], best: Mapping[str, results.BestBase]) -> list[str]:
  """The columns of the table of evaluations, after their names."""
  beaten = [_BEST] if best else []
  if len(ends) < 2:
    return [*ends, *beaten]
  return [ends[0], *beaten, ends[1], "change from the base at its best" if best else "change"]


def _evaluations(
  history: results.History, best: Mapping[str, results.BestBase]
) -> list[_Evaluation]:
  """First against last evaluation, or the base model at its best guidance against the last."""
  if not history:
    return []
  (start, before), (end, after) = history[0], history[-1]
  found = []
  for name, old in before.items():
    direction = "lower" if old.lower_is_better else "higher"
    new = after.get(name) if len(history) > 1 else None
    counts = f"{old.images} images, {old.prompts} prompts"
    unscored = sum(result.unscored for result in (old, new) if result)
    if unscored:
      counts += f", {unscored} unscored"
    if shown := summary.found(old, new or old):
      counts += f", {shown}"
    cells, kind = [_mean(summary.when(start), old)], ""
    beaten = best[name].result if name in best else old
    if best:
      cells.append(_best_cell(best.get(name)))
    if new:
      cells.append(_mean(summary.when(end), new))
      change, interval, relative, verdict = summary.change(beaten, new)
      if change:
        kind = verdict.replace(" ", "-")
        words = ", ".join(word for word in (relative, _VERDICTS.get(verdict, verdict)) if word)
        cells.append(_Cell("change", change, interval, words))
    about = f"{old.metric} · {direction} is better"
    found.append(_Evaluation(name, about, counts, old.trained_on, kind, tuple(cells)))
  return found


def _best_cell(best: results.BestBase | None) -> _Cell:
  if best is None:
    return _Cell(_BEST, "", "")
  return dataclasses.replace(_mean(_BEST, best.result), verdict=f"guidance {best.guidance:g}")


def _mean(label: str, result: results.EvalResult) -> _Cell:
  """The mean of an evaluation with its interval."""
  if np.isnan(result.mean):
    return _Cell(label, "not scored", "")
  low, high = (f"{bound:.{result.digits}f}" for bound in (result.low, result.high))
  interval = "" if np.isnan(result.low) else f"[{low}, {high}]"
  return _Cell(label, f"{result.mean:.{result.digits}f}", interval)


def _history_charts(history: results.History) -> list[str]:
  """Every held-out metric over the iterations, with its interval."""
  if len(history) < 2:
    return []
  figures = []
  for name, last in history[-1][1].items():
    points = [(iteration, found[name]) for iteration, found in history if name in found]
    if all(np.isnan(result.mean) for _, result in points):
      continue
    curve = charts.Series(
      last.metric,
      np.array([iteration for iteration, _ in points]),
      *(np.array([getattr(r, key) for _, r in points]) for key in ("mean", "low", "high")),
    )
    direction = "lower" if last.lower_is_better else "higher"
    figures.append(charts.line_chart(f"{name} (held out, {direction} is better)", [curve]))
  return figures


def _training_charts(
  rows: Sequence[Mapping[str, Any]],
  tasks: Sequence[Mapping[str, Any]],
  lower_is_better: Collection[str],
) -> tuple[list[str], list[str]]:
  """Rewards with their judges and whether training is healthy; then all else, to be folded away."""
  if not rows:
    return [], []
  x = np.array([row["iteration"] for row in rows])
  keys = list(dict.fromkeys(key for row in rows for key in row if key != "iteration"))

  def curve(name: str, key: str) -> charts.Series:
    values = [row.get(key) for row in rows]
    return charts.Series(name, x, np.array([np.nan if v is None else v for v in values], float))

  shown, figures = set(), []
  judges = {task["name"]: task["watch"] for task in tasks}
  for name in metrics.trained_curves(keys):
    key, task = f"reward/{name}/mean", name.partition("/")[0]
    judged = f"watch/{task}/mean"
    shown |= {key, judged}
    if judged not in keys:
      figures.append(charts.line_chart(f"Reward: {name}", [curve("", key)], smooth=True))
      continue
    judge = judges.get(task) or "judge"
    lower = judge in lower_is_better
    direction = "lower is better, drawn upside down" if lower else "higher is better"
    title = f"Reward: {name}, and {judge}, never trained on (right scale, {direction})"
    both = curve("reward", key), curve(judge, judged)
    figures.append(charts.two_scale_chart(title, *both, flip=lower))
  for title, pattern, options in _PANELS:
    matches = [match for key in keys if (match := re.fullmatch(pattern, key))]
    if matches:
      shown.update(match[0] for match in matches)
      total = "all tasks" if len(matches) > 1 else ""
      curves = [
        curve(match[1] if match.re.groups and match[1] else total, match[0]) for match in matches
      ]
      figures.append(charts.line_chart(title, curves, **options))
  times = [key for key in _TIMES if key in keys]
  if times:
    shown.update(times)
    split = [curve(key.removeprefix("time/").removesuffix("_s"), key) for key in times]
    figures.append(charts.stacked_chart("Seconds of an iteration", split))
  return figures, [charts.line_chart(key, [curve("", key)]) for key in keys if key not in shown]
