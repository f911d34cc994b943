"""One page that compares several runs: what each came to, measured, drawn and cost."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
from typing import Any

import numpy as np

from rlft.evaluation import results, summary
from rlft.report import charts, evaluations, metrics, page, samples
from rlft.report.evaluations import Cell
from rlft.report.render import render
from rlft.report.run_files import RunFiles

_ELSEWHERE = {"workdir"}  # settings that say nothing of a difference
# Key in metrics.jsonl, title.
_CURVES = (
  ("clip_fraction", "Share of clipped ratios"),
  ("approx_kl", "How far an iteration's updates move ratios"),
  ("kl_to_base", "KL divergence from the base model"),
  ("grad_norm", "Gradient norm"),
  ("learning_rate", "Learning rate"),
  ("images_per_second", "Images per second"),
)


@dataclasses.dataclass(frozen=True)
class Row:
  """An evaluation in all runs: what it measures, and a cell for each run."""

  name: str
  about: str
  cells: tuple[Cell, ...]


@dataclasses.dataclass(frozen=True)
class Strip:
  """A prompt's pictures: of the base model, and those of each run over its iterations."""

  prompt: str
  first: samples.Picture
  runs: tuple[tuple[samples.Picture, ...], ...]


@dataclasses.dataclass(frozen=True)
class Compared:
  """The strips of one evaluation; `width` and `pixelated` as of `samples.Gallery`."""

  name: str
  strips: tuple[Strip, ...]
  width: int
  pixelated: bool


def page_of(runs: Sequence[RunFiles]) -> str:
  """The page, self-contained as `page.write_report`'s is.

  Args:
    runs: at least two, whose names differ.
  """
  galleries = [samples.galleries(run.workdir, budget=page.PICTURES // len(runs)) for run in runs]
  compared = list(_compared(galleries))
  return render(
    "several.html",
    title=f"rlft: {', '.join(run.name for run in runs)}",
    runs=[{"name": run.name, "verdict": run.verdict, "facts": page.facts(run)} for run in runs],
    names=[run.name for run in runs],
    rows=rows([run.history for run in runs]),
    different=different({run.name: run.config for run in runs}),
    held_out=list(_held_out(runs)),
    rewards=list(_rewards(runs)),
    training=list(_training(runs)),
    compared=compared,
    times=page.times([gallery for found in galleries for gallery in found]),
  )


def rows(histories: Sequence[results.History]) -> list[Row]:
  """A row for each evaluation that any run has, a cell for each run: its end, and its change."""
  last = [history[-1][1] if history else {} for history in histories]
  found = []
  for name in dict.fromkeys(name for one in last for name in one):
    example = next(one[name] for one in last if name in one)
    cells = tuple(_cell(history, name) for history in histories)
    about = f"{example.metric} · {'lower' if example.lower_is_better else 'higher'} is better"
    found.append(Row(name, about, cells))
  return found


def _cell(history: results.History, name: str) -> Cell:
  """The mean at the end of a run, and how it changed since its start."""
  points = [found[name] for _, found in history if name in found]
  if not points:
    return Cell("", "–")
  if len(points) == 1:
    return Cell("", summary.mean(points[0]), "not trained yet")
  change, interval, _, called = summary.change(points[0], points[-1])
  said = [f"{change} {interval} since the start", summary.found(points[0], points[-1])]
  return Cell("", summary.mean(points[-1]), "; ".join(filter(None, said)), called)


def different(configs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
  """The settings in which runs differ, and each run's value; '–' where it has none."""
  keys = dict.fromkeys(key for config in configs.values() for key in config)
  found = []
  for key in keys:
    values = [json.dumps(one[key]) if key in one else "–" for one in configs.values()]
    if key not in _ELSEWHERE and len(set(values)) > 1:
      found.append((key, values))
  return found


def _held_out(runs: Sequence[RunFiles]) -> Iterator[str]:
  """Every evaluation over the iterations of all runs."""
  names = dict.fromkeys(name for run in runs for _, found in run.history for name in found)
  for name in names:
    measured = [[(at, found[name]) for at, found in run.history if name in found] for run in runs]
    last = next(points[-1][1] for points in measured if points)
    direction = "lower" if last.lower_is_better else "higher"
    curves = [
      evaluations.curve(run.name, points) if points else _nothing(run)
      for run, points in zip(runs, measured, strict=True)
    ]
    yield charts.line_chart(f"{name} (held out, {direction} is better)", curves)


def _rewards(runs: Sequence[RunFiles]) -> Iterator[str]:
  """Rewards and judges by the name of their task."""
  for kind, title in (("reward", "Reward of"), ("watch", "Judge of")):
    names = dict.fromkeys(
      name for run in runs for name in metrics.trained_curves(run.keys, kind=kind)
    )
    for name in names:
      yield from _chart(runs, f"{kind}/{name}/mean", f"{title} {name}")


def _training(runs: Sequence[RunFiles]) -> Iterator[str]:
  for key, title in _CURVES:
    yield from _chart(runs, key, title)


def _chart(runs: Sequence[RunFiles], key: str, title: str) -> Iterator[str]:
  """A metric that any run has."""
  if not any(key in run.keys for run in runs):
    return
  curves = [
    charts.Series(run.name, run.values("iteration"), run.values(key))
    if key in run.keys
    else _nothing(run)
    for run in runs
  ]
  yield charts.line_chart(title, curves, smooth=True)


def _nothing(run: RunFiles) -> charts.Series:
  """A curve without points, so that each run has its own colour in every chart."""
  return charts.Series(run.name, np.zeros(1), np.full(1, np.nan))


def _compared(galleries: Sequence[Sequence[samples.Gallery]]) -> Iterator[Compared]:
  """Pictures of the prompts that all runs have."""
  by_name = [{gallery.name: gallery for gallery in found} for found in galleries]
  for name, first in by_name[0].items():
    if not all(name in found for found in by_name):
      continue
    pictures = [dict(found[name].rows) for found in by_name]
    strips = tuple(
      Strip(prompt, row[0], tuple(found[prompt] for found in pictures))
      for prompt, row in first.rows
      if all(prompt in found for found in pictures)
    )
    if strips:
      yield Compared(name, strips, first.width, first.pixelated)
