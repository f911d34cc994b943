"""The tables as Markdown and CSV, with the paper's figures and orderings beside ours."""

from collections.abc import Mapping, Sequence
import dataclasses
import math

import numpy as np

from rlft.evaluation import convergence, orderings, protocol, seeds, statistics, summary
from rlft.evaluation.orderings import OTHER, SAME, UNDECIDED, Order
from rlft.evaluation.seeds import Estimate
from rlft.evaluation.tables import Table
from rlft.performance.reproduce import paper
from rlft.performance.reproduce.findings import Findings, Trained
from rlft.performance.reproduce.paper import BASE, Column, PaperTable, Row
from rlft.performance.reproduce.scale import evaluation

_DIGITS = 3  # as the paper has
_MARKS = {"better": " ▲", "worse": " ▼", "no effect": " =", "unclear": " ?"}
_LEGEND = (
  f"After a mean stands half the width of its {statistics.LEVEL:.0%} interval over seeds and"
  " prompts; ▲ better than the base at its best guidance for that column, ▼ worse, = no effect,"
  " ? unclear; in parentheses the paper's figure, of its own measure."
)
_ONE_SEED = " One training seed: intervals say nothing of other seeds."


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of the results.

  Attributes:
    name: of its files.
    text: Markdown.
    files: contents by name: figures, and the numbers behind the text.
  """

  name: str
  text: str
  files: Mapping[str, str | bytes]


@dataclasses.dataclass(frozen=True)
class _Measured:
  """A column, measured: scores `[S, P]` by row, where there are any."""

  column: Column
  title: str
  scores: Mapping[str, np.ndarray]
  lower_is_better: bool

  def gain(self, row: str) -> Estimate:
    """Over the base, prompt by prompt; of raters' votes, over one half."""
    return seeds.estimate(self.scores[row], self.scores[BASE])

  def verdict(self, row: str) -> str:
    """What the gain is called; '' of the base."""
    if row == BASE:
      return ""
    return protocol.verdict(self.gain(row), lower_is_better=self.lower_is_better)


def section(table: PaperTable, findings: Findings) -> Section:
  """A table of measures."""
  rows = findings.rows(table)
  columns = [_measured(column, rows, findings) for column in table.columns]
  orders = {column.title: _orders(column) for column in columns}
  found = [order for group in orders.values() for order in group]
  parts = [f"## {table.name}: {table.title}", _table(columns, rows, findings)]
  parts.append(_legend(rows, findings))
  tasks = dict.fromkeys(task for row in rows.values() for task in row.tasks)
  parts += [note for task in tasks if (note := findings.scale.tasks[task].note)]
  if table is paper.T5:
    parts.append(_shares(columns))
  parts += [_ordering_text(found), _ordering_table(orders, rows).markdown()]
  guards = [_measured(column, rows, findings) for column in table.guards]
  if guards:
    parts += ["What must not be lost beside these gains:", _table(guards, rows, findings)]
  return Section(
    table.name,
    "\n\n".join(parts) + "\n",
    {
      f"{table.name}.csv": _numbers(table, rows, [*columns, *guards], findings).csv(),
      f"{table.name}-orderings.csv": _ordering_numbers(orders).csv(),
    },
  )


def _table(columns: Sequence[_Measured], rows: Mapping[str, Row], findings: Findings) -> str:
  lines = [
    (row.title, _seeds(row, findings), *(_cell(column, name) for column in columns))
    for name, row in rows.items()
    if row.method or any(name in column.scores for column in columns)
  ]
  return Table(("", "seeds", *(column.title for column in columns)), lines).markdown()


def _measured(column: Column, rows: Mapping[str, Row], findings: Findings) -> _Measured:
  scores = {name: findings.scores(column, row) for name, row in rows.items()}
  lower = findings.lower_is_better(column)
  title = f"{column.title}{', lower is better' if lower else ''}"
  return _Measured(column, title, {k: v for k, v in scores.items() if v is not None}, lower)


def _seeds(row: Row, findings: Findings) -> str:
  return str(len(findings.of(row))) if row.method else ""


def _cell(measured: _Measured, row: str) -> str:
  if row not in measured.scores:
    return "not run"
  text = summary.mean(seeds.estimate(measured.scores[row]), _DIGITS)
  text += _MARKS.get(measured.verdict(row), "")
  value = measured.column.values.get(row)
  return text if value is None else f"{text} ({value:.{_DIGITS}f})"


def _legend(rows: Mapping[str, Row], findings: Findings) -> str:
  alone = any(len(findings.of(row)) == 1 for row in rows.values() if row.method)
  return _LEGEND + (_ONE_SEED if alone else "")


def _numbers(
  table: PaperTable, rows: Mapping[str, Row], columns: Sequence[_Measured], findings: Findings
) -> Table:
  """A line for each cell."""
  header = ("table", "row", "column", "measure", "base_guidance", "seeds", "prompts", "mean")
  header += ("low", "high", "gain", "gain_low", "gain_high", "verdict", "paper")
  lines = []
  for name, row in rows.items():
    for one in columns:
      if name not in one.scores:
        continue
      mean = seeds.estimate(one.scores[name])
      count, prompts = one.scores[name].shape
      measure = f"raters by {one.column.measure}" if one.column.rated else one.column.measure
      lines.append(
        (
          *(table.name, row.title, one.column.title, measure),
          f"{findings.guidance(one.column):g}",
          *(str(count if row.method else 0), str(prompts)),
          *_plain(mean),
          *(_plain(one.gain(name)) if name != BASE else [""] * 3),
          one.verdict(name),
          str(one.column.values.get(name, "")),
        )
      )
  return Table(header, lines)


def _plain(estimate: Estimate) -> list[str]:
  """Mean, low, high for a CSV; NaN is empty."""
  values = (estimate.mean, estimate.low, estimate.high)
  return ["" if math.isnan(value) else f"{value:.6g}" for value in values]


# ---------------------------------------------------------------------------- orderings


def _orders(measured: _Measured) -> list[Order]:
  """All pairs of rows that the paper orders in a column."""
  column, lower = measured.column, measured.lower_is_better
  pairs = [*orderings.of_values(column.values, lower_is_better=lower), *column.above]
  return orderings.check(pairs, measured.scores, lower_is_better=lower)


def _ordering_text(orders: Sequence[Order]) -> str:
  if not orders:
    return "The paper has no figures for this table."
  counts = {kind: sum(o.verdict == kind for o in orders) for kind in (SAME, OTHER, UNDECIDED)}
  counted = ", ".join(f"{count} {kind}" for kind, count in counts.items())
  return f"Of {len(orders)} pairs that the paper orders: {counted}."


def _ordering_table(orders: Mapping[str, Sequence[Order]], rows: Mapping[str, Row]) -> Table:
  def said(group: Sequence[Order], verdict: str) -> str:
    pairs = (order for order in group if order.verdict == verdict)
    return ", ".join(f"{rows[o.better].title} > {rows[o.worse].title}" for o in pairs)

  header = ("the paper's order (> is better)", SAME, OTHER, UNDECIDED)
  lines = [
    (title, *(said(group, verdict) for verdict in (SAME, OTHER, UNDECIDED)))
    for title, group in orders.items()
    if group
  ]
  return Table(header, lines)


def _ordering_numbers(orders: Mapping[str, Sequence[Order]]) -> Table:
  header = ("column", "better_in_paper", "worse_in_paper", "difference", "low", "high", "verdict")
  lines = [
    (title, order.better, order.worse, *_plain(order.difference), order.verdict)
    for title, group in orders.items()
    for order in group
  ]
  return Table(header, lines)


def _shares(columns: Sequence[_Measured]) -> str:
  """How much of each specialist's gain joint training keeps."""
  lines = []
  for one in columns:
    specialist = paper.SPECIALISTS[one.column.measure]
    if not {specialist, "joint"} <= one.scores.keys():
      continue
    alone, joint = one.gain(specialist), one.gain("joint")
    if one.verdict(specialist) != "better":
      lines.append(f"- {one.column.title}: the specialist itself has no certain gain")
      continue
    said = f"- {one.column.title}: joint training keeps {joint.mean / alone.mean:.0%} of the gain"
    if values := one.column.values:
      kept = (values["joint"] - values[BASE]) / (values[specialist] - values[BASE])
      said += f" (the paper: {kept:.0%})"
    lines.append(said)
  return "\n".join(lines)


# ---------------------------------------------------------------------------- convergence


def convergence_section(table: PaperTable, findings: Findings) -> Section:
  """T2: when the reward that is trained on had nearly all of its own final gain, and RL's."""
  rows = findings.rows(table)
  name = evaluation(table.on[0], "trained")
  ours = {run.config.seed: run for run in findings.of(rows[paper.METHOD])}
  lines, numbers, seconds = [], [], {}
  for key, row in rows.items():
    runs = findings.of(row)
    own = [_took(run, convergence.converged(run.history, name)) for run in runs]
    level = [_took(run, _as_good_as(run, ours.get(run.config.seed), name)) for run in runs]
    for run, *found in zip(runs, own, level, strict=True):
      took = [value for one in found for value in one or (None,) * 3]
      values = ("" if value is None else f"{value:g}" for value in took)
      numbers.append((row.title, str(run.config.seed), *values))
    if runs and all(own):
      seconds[key] = np.array([took[2] for took in own])[:, None]
    cells = [cell for took in (own, level) for cell in _summary(took)]
    any_reward = "yes" if row.method in paper.ANY_REWARD else "no" if key in table.rows else ""
    hours = f"{paper.HOURS[key]:g}" if key in paper.HOURS else "diverged" if key == "raft" else ""
    lines.append((row.title, *cells, any_reward, hours))
  header = ("", "seeds that converged", "images", "minutes")
  header += ("seeds as good as RL's end", "images to there", "minutes to there")
  header += ("any reward", "the paper's hours")
  orders = orderings.check(
    orderings.of_values(paper.HOURS, lower_is_better=True), seconds, lower_is_better=True
  )
  parts = [
    f"## {table.name}: {table.title}",
    Table(header, lines).markdown(),
    f"A run has converged at its first evaluation with {convergence.SHARE:.0%} of its own final"
    " gain in the reward that it is trained on, on development prompts. One that ends no better"
    " than it began has not; nor has one that is still rising, better at its end than at"
    f" the last evaluation in its first {1 - convergence.STILL:.0%}. It is as good as RL's end"
    " where its curve, on straight lines between evaluations, first has the mean with which RL"
    " ends, with the same training seed. Images are those drawn for training; minutes are"
    " iterations times the median of one, so without compilation: they compare methods if nothing"
    " else ran on the machine. Means over the seeds that got there, and in brackets the least"
    " and the most.",
    _ordering_text(orders),
    _ordering_table({"hours": orders}, rows).markdown(),
  ]
  header = ("method", "seed", "iterations", "images", "seconds")
  header += tuple(f"{what} to RL's end" for what in ("iterations", "images", "seconds"))
  content = {
    f"{table.name}.csv": Table(header, numbers).csv(),
    f"{table.name}-orderings.csv": _ordering_numbers({"hours": orders}).csv(),
  }
  return Section(table.name, "\n\n".join(parts) + "\n", content)


def _as_good_as(run: Trained, other: Trained | None, name: str) -> float | None:
  """Iterations until an evaluation of a run is as good as another's last; None if it never is."""
  ends = [found[name] for _, found in other.history if name in found] if other else []
  if not ends:
    return None
  return run.reaches(name, ends[-1].mean, lower_is_better=ends[-1].lower_is_better)


def _took(run: Trained, iterations: float | None) -> tuple[float, float, float] | None:
  """Iterations, images and seconds; None if it never got there."""
  if iterations is None:
    return None
  return iterations, iterations * run.images, run.seconds(iterations)


def _summary(runs: Sequence[tuple[float, float, float] | None]) -> tuple[str, str, str]:
  """How many runs got there, and after how many images and minutes."""
  there = [took for took in runs if took]
  return (
    f"{len(there)} of {len(runs)}" if runs else "not run",
    _spread([images for _, images, _ in there], ",.0f"),
    _spread([seconds / 60 for _, _, seconds in there], ".1f"),
  )


def _spread(values: Sequence[float], spec: str) -> str:
  if not values:
    return ""
  mean = f"{np.mean(values):{spec}}"
  return mean if len(values) == 1 else f"{mean} [{min(values):{spec}}, {max(values):{spec}}]"
