"""What evaluations found, in words and numbers for people."""

from collections.abc import Mapping

import numpy as np

from rlft.evaluation import results, statistics
from rlft.evaluation.results import BestBase, EvalResult
from rlft.evaluation.seeds import Estimate


def mean(result: EvalResult | Estimate, digits: int | None = None) -> str:
  """The mean and half the width of its interval; if `digits` is None, with those that it says."""
  if np.isnan(result.mean):
    return "not scored"
  digits = result.digits if digits is None else digits
  text = f"{result.mean:.{digits}f}"
  half = (result.high - result.low) / 2
  return text if np.isnan(half) else f"{text} ±{half:.{digits}f}"


def table(
  before: Mapping[str, EvalResult],
  after: Mapping[str, EvalResult] | None = None,
  best: Mapping[str, BestBase] | None = None,
) -> str:
  """A text table for the terminal; with `after`, also the differences and their intervals.

  After a mean stands half the width of its interval. Where the base model was also measured at its
  best guidance, it stands beside the rest, and the difference is the one to that.

  Args:
    before: results by name.
    after: results of the fine-tuned model; a name that is missing is left blank.
    best: the base model at its best guidance, by name.
  """
  best = best or {}
  header = ["evaluation", "metric", "better", "mean" if after is None else "before"]
  if after is not None:
    header += ["base at its best"] * bool(best) + ["after", "change"]
    header += [f"{statistics.LEVEL:.0%} interval", "relative", ""]
  rows = [[*header, "images"]]
  for name, old in before.items():
    row = [name, old.metric, "lower" if old.lower_is_better else "higher", mean(old)]
    last = old
    if after is not None and best:
      row.append(_best(best[name]) if name in best else "")
    if after is not None and name in after:
      last = after[name]
      row += [mean(last), *change(best[name].result if name in best else old, last)]
    row += [""] * (len(header) - len(row))
    counts = [f"{last.prompts} prompts", found(old, last)]
    counts += [f"{last.unscored} unscored"] if last.unscored else []
    rows.append([*row, f"{last.images} ({', '.join(filter(None, counts))})"])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    # Numbers to the right, words to the left.
    cells = [
      cell.rjust(width) if 3 <= column < len(header) - (after is not None) else cell.ljust(width)
      for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)


def _best(base: BestBase) -> str:
  return f"{mean(base.result)}, guidance {base.guidance:g}"


def change(before: EvalResult, after: EvalResult) -> tuple[str, str, str, str]:
  """The change, its interval, its share of the mean before, and its verdict; '' for NaN."""
  difference = results.paired_difference(before, after)
  digits = f"+.{before.digits}f"
  return (
    "" if np.isnan(difference.mean) else f"{difference.mean:{digits}}",
    "" if np.isnan(difference.low) else f"[{difference.low:{digits}}, {difference.high:{digits}}]",
    "" if np.isnan(difference.relative) else f"{difference.relative:+.1%}",
    difference.verdict,
  )


def found(before: EvalResult, after: EvalResult) -> str:
  """The share of images that show what is measured; '' where that is not known."""
  if np.isnan(after.found):
    return ""
  text = f"found in {after.found:.1%}"
  known = before is not after and not np.isnan(before.found)
  return f"{text}, before in {before.found:.1%}" if known else text


def when(iteration: int) -> str:
  """What an evaluation after so many iterations is called."""
  if not iteration:
    return "at the start"
  return f"after {iteration} iteration{'s' if iteration > 1 else ''}"


def lines(history: results.History) -> list[str]:
  """The last evaluations, a line for each: the mean, and how it changed since the first.

  Args:
    history: as `results.read_history` returns it.
  """
  if not history:
    return []
  (_, start), (iteration, last) = history[0], history[-1]
  width = max(map(len, last))
  texts = []
  for name, result in last.items():
    parts = [mean(result)]
    if 0 < result.unscored < len(result.scores):
      parts.append(f"{result.unscored} of {len(result.scores)} not scored")
    if result.spread == 0 and len(result.scores) > 1:
      parts.append("the same score for all")
    if len(history) > 1 and name in start:
      size, interval, _, called = change(start[name], result)
      if size:
        parts.append(f"{size} {interval} since the start: {called}")
    if shown := found(start.get(name, result), result):
      parts.append(shown)
    texts.append(f"{when(iteration)}: {name:{width}}  {', '.join(parts)}")
  return texts
