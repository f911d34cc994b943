"""report.html: what a run changed, on one page that needs no other file and no network.

Made from what is in the run's directory, whatever of it is there yet: `config.json`,
`metrics.jsonl`, `eval_history.jsonl` and `grids/`.
"""

from collections.abc import Mapping, Sequence
import html
import json
import os
import pathlib
import re
from typing import Any

import numpy as np

from rlft.evaluation import evaluate, results
from rlft.report import charts, metrics, samples
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
  ("Pretraining loss", r"loss/pretrain", {"smooth": True}),
  ("Gradient norm", r"grad(?:ient)?_norm(?:/(.+))?", {"smooth": True}),
  ("Images per second", r"images_per_second", {}),
)
_HACKING = (
  "<p><small>Where a reward rises and its judge, which measures the same images, does not, the"
  " reward is being exploited.</small></p>"
)


def write_report(workdir: str | os.PathLike[str], *, command: str | None = None) -> pathlib.Path:
  """Writes `report.html`, whole or not at all.

  Args:
    workdir: the run's directory.
    command: the command line that made the run, to be shown.

  Returns:
    The path of the report.

  Raises:
    UserError: a damaged file in the run's directory, or the report cannot be written.
  """
  workdir = pathlib.Path(workdir)
  config = _read_config(workdir / CONFIG_FILE)
  rows = [row for row in files.read_jsonl(workdir / metrics.METRICS_FILE) if "iteration" in row]
  history = results.read_history(workdir)
  title = f"rlft: {workdir.resolve().name}"
  body = [
    f"<h1>{html.escape(title)}</h1>",
    _summary(config, rows, history),
    f"<pre>{html.escape(command)}</pre>" if command else "",
    "<h2>Before and after, on held-out prompts</h2>",
    _results_table(history),
    _history_charts(history),
    "<h2>Samples of the same prompts and seeds</h2>",
    samples.to_html(workdir),
    "<h2>Training</h2>",
    *_training_charts(rows, _tasks(config)),
    _settings(config),
  ]
  path = workdir / REPORT_FILE
  files.write_atomic(path, _PAGE.format(title=html.escape(title), body="\n".join(body)))
  return path


def _read_config(path: pathlib.Path) -> dict[str, Any]:
  """The run's settings; empty if they are not there or not readable, which the page survives."""
  try:
    config = json.loads(path.read_text())
  except (OSError, ValueError):
    return {}
  return config if isinstance(config, dict) else {}


def _summary(
  config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], history: results.History
) -> str:
  """What was run, and how far it came."""
  total, done = config.get("iterations"), len(rows)
  words = [f"{done} of {total} iterations" if total else f"{done} iterations"]
  tasks = _tasks(config)
  if tasks:
    words.append(f"{done * sum(task.get('batch_size', 0) for task in tasks):,} images sampled")
  seconds = sum(row.get(key) or 0 for row in rows for key in _TIMES)
  if seconds:
    words.append(f"{seconds / 60:.1f} minutes of sampling, scoring and updating")
  if history:
    words.append(f"evaluated {len(history)} times" if len(history) > 1 else "evaluated once")
  lines = [f"<p><b>{', '.join(words)}.</b>"]
  if config.get("pretrained"):
    lines.append(f" Base model: {html.escape(str(config['pretrained']))}.")
  lines.append("</p>")
  if tasks:
    entries = "".join(
      f"<li><b>{_cell(task, 'name')}</b>: reward {_cell(task, 'reward')},"
      + "".join(f" {key} {_cell(task, key)}," for key in ("veto", "watch") if task.get(key))
      + f" prompts"
      f" {_cell(task, 'prompts')}, {_cell(task, 'batch_size')} images an iteration,"
      f" {_cell(task, 'images_per_prompt')} for each prompt</li>"
      for task in tasks
    )
    lines.append(f"<p>Trained on:</p><ul>{entries}</ul>")
  return "".join(lines)


def _tasks(config: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The run's tasks, as far as they are readable."""
  return [task for task in config.get("task", ()) if isinstance(task, dict)]


def _cell(entry: Mapping[str, Any], key: str) -> str:
  return html.escape(str(entry.get(key, "?")))


def _results_table(history: results.History) -> str:
  """First against last evaluation."""
  if not history:
    return "<p>No evaluation has finished yet.</p>"
  (start, before), (end, after) = history[0], history[-1]
  if len(history) == 1:
    after = {}
  head = f"<tr><th>evaluation<th>iteration {start}"
  head += f"<th>iteration {end}<th>change</tr>" if after else "</tr>"
  rows = []
  for name, old in before.items():
    direction = "lower" if old.lower_is_better else "higher"
    new = after.get(name)
    counts = f"{old.images} images, {old.prompts} prompts"
    unscored = sum(result.unscored for result in (old, new) if result)
    if unscored:
      counts += f", {unscored} unscored"
    badge = " · <em>trained on</em>" if old.trained_on else ""
    cells = [
      f"<b>{html.escape(name)}</b><small>{html.escape(old.metric)} · {direction} is better{badge}"
      f"<br>{counts}</small>",
      _interval(old),
    ]
    kind = ""
    if new:
      change = results.paired_difference(old, new)
      kind = change.verdict
      relative = "" if np.isnan(change.relative) else f"{change.relative:+.1%}, "
      mark = {"better": "▲ better", "worse": "▼ worse", "unclear": "no clear change"}.get(
        kind, kind
      )
      cells += [_interval(new), f"{_interval(change, '+')}<b>{relative}{mark}</b>"]
    rows.append(
      f'<tr class="{kind.replace(" ", "-")}">' + "".join(f"<td>{cell}" for cell in cells) + "</tr>"
    )
  return (
    f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'
    f"<p><small>Same prompts and same noise at each evaluation. In brackets: {results.LEVEL:.0%}"
    " bootstrap intervals; that of a change is of the pairwise differences, and the change is"
    " called better or worse only if it excludes 0 and the change is at least"
    f" {results.EFFECT:.0%} of the standard deviation of the scores before. A metric that was"
    " <em>trained on</em> may rise because the reward is exploited: trust it only if the others"
    " agree.</small></p>"
  )


def _interval(value: results.EvalResult | results.Difference, sign: str = "") -> str:
  low, high = (format(bound, f"{sign}.4f") for bound in (value.low, value.high))
  return f"{format(value.mean, f'{sign}.4f')}<small>[{low}, {high}]</small>"


def _history_charts(history: results.History) -> str:
  """Every held-out metric over the iterations, with its interval."""
  if len(history) < 2:
    return ""
  figures = []
  for name, last in history[-1][1].items():
    points = [(iteration, found[name]) for iteration, found in history if name in found]
    curve = charts.Series(
      last.metric,
      np.array([iteration for iteration, _ in points]),
      *(np.array([getattr(r, key) for _, r in points]) for key in ("mean", "low", "high")),
    )
    direction = "lower" if last.lower_is_better else "higher"
    figures.append(charts.line_chart(f"{name} (held out, {direction} is better)", [curve]))
  return _figures(figures)


def _training_charts(
  rows: Sequence[Mapping[str, Any]], tasks: Sequence[Mapping[str, Any]]
) -> list[str]:
  """Rewards with their judges, then whether training is healthy, then all else, folded away."""
  if not rows:
    return ["<p>No iteration has finished yet.</p>"]
  x = np.array([row["iteration"] for row in rows])
  keys = list(dict.fromkeys(key for row in rows for key in row if key != "iteration"))

  def curve(name: str, key: str) -> charts.Series:
    values = [row.get(key) for row in rows]
    return charts.Series(name, x, np.array([np.nan if v is None else v for v in values], float))

  shown, figures = set(), []
  judges = {task.get("name"): str(task.get("watch") or "judge") for task in tasks}
  for name in metrics.trained_curves(keys):
    key, task = f"reward/{name}/mean", name.partition("/")[0]
    judged = f"watch/{task}/mean"
    shown |= {key, judged}
    if judged not in keys:
      figures.append(charts.line_chart(f"Reward: {name}", [curve("", key)], smooth=True))
      continue
    judge = judges.get(task, "judge")
    lower = judge in evaluate.LOWER_IS_BETTER
    direction = "lower is better, drawn upside down" if lower else "higher is better"
    title = f"Reward: {name}, and {judge}, never trained on (right scale, {direction})"
    both = curve("reward", key), curve(judge, judged)
    figures.append(charts.two_scale_chart(title, *both, flip=lower))
  for title, pattern, options in _PANELS:
    matches = [match for key in keys if (match := re.fullmatch(pattern, key))]
    if matches:
      shown.update(match[0] for match in matches)
      curves = [
        curve(match[1] if match.re.groups and match[1] else "", match[0]) for match in matches
      ]
      figures.append(charts.line_chart(title, curves, **options))
  times = [key for key in _TIMES if key in keys]
  if times:
    shown.update(times)
    split = [curve(key.removeprefix("time/").removesuffix("_s"), key) for key in times]
    figures.append(charts.stacked_chart("Seconds of an iteration", split))
  parts = [_figures(figures)]
  if any(key.startswith("watch/") for key in keys):
    parts.insert(0, _HACKING)
  rest = [charts.line_chart(key, [curve("", key)]) for key in keys if key not in shown]
  if rest:
    parts.append(f"<details><summary>{len(rest)} more curves</summary>{_figures(rest)}</details>")
  return parts


def _figures(figures: Sequence[str]) -> str:
  return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _settings(config: Mapping[str, Any]) -> str:
  """All settings, folded away."""
  if not config:
    return ""
  rows = "".join(
    f"<tr><td>{html.escape(str(key))}<td>{html.escape(json.dumps(value))}</tr>"
    for key, value in config.items()
  )
  return (
    f"<h2>Settings</h2><details><summary>All {len(config)} settings</summary>"
    f'<div class="scroll"><table>{rows}</table></div></details>'
  )


# The policy in the head makes browsers refuse whatever is not in the file itself.
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff;
 max-width: 1080px; margin: 0 auto; padding: 12px; }}
h1 {{ font-size: 24px; }} h2 {{ font-size: 19px; margin-top: 32px; }} h3 {{ font-size: 16px; }}
small {{ color: #555; display: block; font-size: 12px; line-height: 1.35; }}
p small {{ font-size: 13px; }}
pre {{ background: #f4f4f4; padding: 8px; white-space: pre-wrap; overflow-wrap: anywhere; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ border-bottom: 1px solid #ddd; padding: 5px 10px; text-align: left;
 vertical-align: top; }}
th {{ font-weight: 600; font-size: 13px; }}
tr.better td:nth-child(n+4) {{ background: #e2f3e6; }}
tr.worse td:nth-child(n+4) {{ background: #fbe4e0; }}
tr.unclear td:nth-child(n+4), tr.no-effect td:nth-child(n+4) {{ background: #f2f2f2; }}
td em {{ color: #8a4b00; font-style: normal; font-weight: 600; }}
td b {{ font-size: 13px; }}
.grid td {{ border: 0; padding: 2px 4px 8px; }} .grid img {{ display: block; }}
.grid th {{ border: 0; padding: 2px 4px; font-weight: 400; }}
.grid tr th:first-child {{ width: 110px; min-width: 90px; }}
.charts {{ display: grid; gap: 16px; margin: 12px 0;
 grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); }}
figure {{ margin: 0; }} figcaption {{ font-weight: 600; font-size: 14px; }}
svg {{ width: 100%; height: auto; display: block; }}
svg text {{ font-size: 11px; fill: #555; }} svg .g {{ stroke: #e4e4e4; }}
.legend {{ font-size: 12px; color: #444; }} .legend span {{ margin-right: 12px; }}
.legend i {{ display: inline-block; width: 10px; height: 10px; margin-right: 4px; }}
summary {{ cursor: pointer; }}
@media (max-width: 600px) {{ th, td {{ padding: 4px 5px; }} }}
</style></head><body>
{body}
</body></html>
"""
