"""The figures: curves of training, pictures side by side, trained scores beside their oracles."""

from collections.abc import Mapping, Sequence

import numpy as np

from rlft.evaluation import hacking, results
from rlft.evaluation.results import Difference
from rlft.evaluation.tables import Table
from rlft.inference.protocol import pictures_of
from rlft.performance.reproduce.findings import Findings, Trained
from rlft.performance.reproduce.paper import BASE, Column, Row
from rlft.performance.reproduce.scale import evaluation
from rlft.performance.reproduce.tables import Section
from rlft.report import figures, samples
from rlft.report.charts import Series
from rlft.storage import images as images_lib

_HEIGHT = 96  # pixels of a picture, at most; smaller ones are enlarged, pixels becoming squares


def curves_section(tasks: Mapping[str, Sequence[Row]], findings: Findings) -> Section:
  """The trained reward of every method on development prompts, over the images drawn.

  Not that of the images it trains on: those of reward-weighted denoising are the base model's.

  Args:
    tasks: rows by the task that they are trained on.
    findings: all of it.
  """
  panels = []
  for task, rows in tasks.items():
    series = [_curve(row, runs, task) for row in rows if (runs := findings.of(row))]
    if series:
      panels.append((f"trained reward: {task}", series))
  text = (
    "## Curves\n\nThe reward that is trained on, on development prompts, over the images drawn for"
    " training; lines are means over seeds, bands their least and their most.\n"
  )
  if not panels:
    return Section("curves", f"{text}\nNo run is finished.\n", {})
  figure = figures.svg(panels, x_label="images")
  return Section("curves", f"{text}\n![Trained reward](curves.svg)\n", {"curves.svg": figure})


def _curve(row: Row, runs: Sequence[Trained], task: str) -> Series:
  """Mean and range over seeds of the reward at each evaluation."""
  name = evaluation(task, "trained")
  rows = np.array([[found[name].mean for _, found in run.history] for run in runs], float)
  images = np.array([iteration for iteration, _ in runs[0].history]) * runs[0].images
  return Series(row.title, images, rows.mean(0), rows.min(0), rows.max(0))


def hacking_section(task: str, rows: Sequence[Row], findings: Findings) -> Section:
  """Which runs are hacked, and the trained score beside the oracle's while they are trained.

  Args:
    task: that they are trained on.
    rows: methods.
    findings: all of it.
  """
  names = evaluation(task, "trained"), evaluation(task, "oracle")
  lines, panels = [], []
  for row in rows:
    runs = findings.of(row)
    for run in runs:
      if found := hacking.of_history(run.history, *names):
        called = "hacked" if found.hacked else "not seen to be"
        changes = _change(found.trained), _change(found.oracle), _best(run, names[1])
        span = f"{found.since} to {found.until}"
        lines.append((row.title, str(run.config.seed), called, span, *changes))
    if runs:
      panels.append((row.title, [_standardised(runs, name) for name in names]))
  changed = ("trained reward", "oracle", "oracle at its best")
  header = ("", "seed", "called", "iterations", *changed)
  table = Table(header, lines)
  text = (
    "## Hacked rewards\n\nA run is called hacked if its trained score rises while the oracle's"
    " falls, each beyond its interval, from any of its evaluations to the last (development"
    " prompts; level shared among the evaluations). The last column says where a run should have"
    " been stopped: the evaluation at which the oracle was best, and its change since the start."
    f"\n\n{table.markdown()}\n"
  )
  if not panels:
    return Section("hacking", text, {})
  text += (
    "\n![Trained score and oracle](hacking.svg)\n\nChanges since the start, in standard deviations"
    " over prompts of the scores at the start; means over seeds.\n"
  )
  figure = figures.svg(panels, x_label="iterations")
  return Section("hacking", text, {"hacking.csv": table.csv(), "hacking.svg": figure})


def _best(run: Trained, name: str) -> str:
  """When an evaluation was best, and by how much better than at the start."""
  found = [(iteration, each[name]) for iteration, each in run.history if name in each]
  sign = -1 if found[0][1].lower_is_better else 1
  iteration, best = max(found, key=lambda one: sign * one[1].mean)
  return f"{iteration}: {_change(results.paired_difference(found[0][1], best))}"


def _change(change: Difference) -> str:
  return f"{change.mean:+.4f} [{change.low:+.4f}, {change.high:+.4f}] {change.verdict}"


def _standardised(runs: Sequence[Trained], name: str) -> Series:
  """How far a score has come from its start, in units of its spread there; mean over seeds."""
  gains = []
  for run in runs:
    found = [each[name] for _, each in run.history]
    spread = found[0].spread or np.nan
    gains.append([(one.mean - found[0].mean) / spread for one in found])
  iterations = np.array([iteration for iteration, _ in runs[0].history])
  title = "trained reward" if name.endswith("trained") else "oracle"
  return Series(title, iterations, np.mean(gains, axis=0))


def with_pictures(
  section: Section, column: Column, rows: Mapping[str, Row], findings: Findings
) -> Section:
  """A table with pictures below it: the same prompts and noise of every row, of the first seed.

  Args:
    section: the table.
    column: of whose evaluation the pictures are.
    rows: of the table.
    findings: all of it.
  """
  shown = [row for name, row in rows.items() if name == BASE or findings.of(row)]
  sheets = [_sheet(row, column, findings) for row in shown]
  found = [(row, sheet) for row, sheet in zip(shown, sheets, strict=True) if sheet]
  if not found:
    return section
  prompts = found[0][1].prompts
  cells = [sheet.cells[i] for i in range(len(prompts)) for _, sheet in found]
  scale = max(1, _HEIGHT // found[0][1].image_size)
  picture = images_lib.encode_png(images_lib.grid(np.stack(cells), len(found), scale=scale))
  name = f"{section.name}.png"
  text = (
    f"\n![Pictures of {section.name}]({name})\n\nFrom left to right:"
    f" {', '.join(row.title for row, _ in found)}. From top to bottom: {'; '.join(prompts)}. The"
    " same noise in each row; of several training seeds, the first.\n"
  )
  return Section(section.name, section.text + text, {**section.files, name: picture})


def _sheet(row: Row, column: Column, findings: Findings) -> samples.Sheet | None:
  """The pictures kept of a row: of the base model, at its best guidance for the column."""
  workdir = findings.of(row)[0].config.output.workdir if row.method else ""
  folder = pictures_of(findings.measured, workdir, findings.guidance(column))
  kept = samples.read_samples(folder)
  # Evaluations that share their images keep them under the name of one of them.
  target = findings.evals[column.measure]
  for name, entry in findings.evals.items():
    same = ("prompts", "images", "images_per_prompt")
    if name in kept and all(getattr(entry, key) == getattr(target, key) for key in same):
      return kept[name][-1]
  return None
