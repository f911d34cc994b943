"""Held-out evaluations as the page shows them: a table, curves, and what the verdict is made of."""

from collections.abc import Collection, Mapping, Sequence
import dataclasses

import numpy as np

from rlft.evaluation import results, summary
from rlft.evaluation.results import BestBase, EvalResult, History
from rlft.report import charts
from rlft.report.verdict import Measure

_BEST = "base at its best guidance"
_VERDICTS = {"better": "▲ better", "worse": "▼ worse", "unclear": "no clear change"}


@dataclasses.dataclass(frozen=True)
class Cell:
  """A mean or a change, in words; `verdict` of a change."""

  label: str
  mean: str
  interval: str = ""
  verdict: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
  """An evaluation at the start, at the end, and the change; `kind` is the change's, for style."""

  name: str
  about: str
  counts: str
  trained_on: bool
  guard: bool
  kind: str
  cells: tuple[Cell, ...]


def columns(history: History, best: Mapping[str, BestBase]) -> list[str]:
  """The columns of the table, after the evaluations' names."""
  ends = [summary.when(iteration) for iteration, _ in [*history[:1], *history[1:][-1:]]]
  beaten = [_BEST] if best else []
  if len(ends) < 2:
    return [*ends, *beaten]
  return [ends[0], *beaten, ends[1], "change from the base at its best" if best else "change"]


def rows(history: History, best: Mapping[str, BestBase], guards: Collection[str] = ()) -> list[Row]:
  """First against last evaluation, or the base model at its best guidance against the last.

  Args:
    history: as `results.read_history` returns it.
    best: as `results.read_base` returns it.
    guards: names of evaluations that are not to become worse.
  """
  if not history:
    return []
  (start, before), (end, after) = history[0], history[-1]
  found = []
  for name, old in before.items():
    new = after.get(name) if len(history) > 1 else None
    cells, kind = [_mean(summary.when(start), old)], ""
    beaten = best[name].result if name in best else old
    if best:
      cells.append(_best_cell(best.get(name)))
    if new:
      cells.append(_mean(summary.when(end), new))
      change, interval, relative, called = summary.change(beaten, new)
      if change:
        kind = called.replace(" ", "-")
        words = ", ".join(word for word in (relative, _VERDICTS.get(called, called)) if word)
        cells.append(Cell("change", change, interval, words))
    about = f"{old.metric} · {_direction(old)} is better"
    counts = _counts(old, new)
    found.append(Row(name, about, counts, old.trained_on, name in guards, kind, tuple(cells)))
  return found


def _counts(old: EvalResult, new: EvalResult | None) -> str:
  """On what an evaluation stands."""
  parts = [f"{old.images} images", f"{old.prompts} prompts"]
  if unscored := sum(result.unscored for result in (old, new) if result):
    parts.append(f"{unscored} unscored")
  if shown := summary.found(old, new or old):
    parts.append(shown)
  return ", ".join(parts)


def _best_cell(best: BestBase | None) -> Cell:
  if best is None:
    return Cell(_BEST, "")
  return dataclasses.replace(_mean(_BEST, best.result), verdict=f"guidance {best.guidance:g}")


def _mean(label: str, result: EvalResult) -> Cell:
  """The mean of an evaluation with its interval."""
  if np.isnan(result.mean):
    return Cell(label, "not scored")
  low, high = (f"{bound:.{result.digits}f}" for bound in (result.low, result.high))
  interval = "" if np.isnan(result.low) else f"[{low}, {high}]"
  return Cell(label, f"{result.mean:.{result.digits}f}", interval)


def _direction(result: EvalResult) -> str:
  return "lower" if result.lower_is_better else "higher"


def measures(
  history: History, best: Mapping[str, BestBase], guards: Collection[str] = ()
) -> list[Measure]:
  """What the verdict is made of; arguments as of `rows`. Empty before the second evaluation."""
  if len(history) < 2:
    return []
  before, after = history[0][1], history[-1][1]
  found = []
  for name, new in after.items():
    if name not in before:
      continue
    old = best[name].result if name in best else before[name]
    change = results.paired_difference(old, new)
    if np.isnan(change.mean):
      continue
    shares = before[name].found, new.found
    found.append(
      Measure(
        name=name,
        before=_short(old.mean),
        after=_short(new.mean),
        change=change.verdict,
        trained_on=new.trained_on,
        guard=name in guards,
        found=None if np.isnan(shares).any() else shares,
      )
    )
  return found


def _short(mean: float) -> str:
  """Three digits that count, zeros too."""
  return f"{mean:#.3g}".rstrip(".")


def history_charts(history: History, best: Mapping[str, BestBase]) -> list[str]:
  """Every held-out metric over the iterations, with its interval, and the base at its best."""
  if len(history) < 2:
    return []
  figures = []
  for name, last in history[-1][1].items():
    points = [(iteration, found[name]) for iteration, found in history if name in found]
    if all(np.isnan(result.mean) for _, result in points):
      continue
    curves = [curve(last.metric, points)]
    if name in best:
      level = np.full(len(points), best[name].result.mean)
      curves.append(charts.Series(_BEST, curves[0].x, level))
    title = f"{name} (held out, {_direction(last)} is better)"
    figures.append(charts.line_chart(title, curves))
  return figures


def curve(label: str, points: Sequence[tuple[int, EvalResult]]) -> charts.Series:
  """An evaluation over the iterations, with its interval."""
  return charts.Series(
    label,
    np.array([iteration for iteration, _ in points]),
    *(np.array([getattr(r, key) for _, r in points]) for key in ("mean", "low", "high")),
  )
