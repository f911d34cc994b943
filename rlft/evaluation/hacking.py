"""Whether a reward is hacked: what is trained on rises while the oracle that judges it falls.

The end of a run is compared with every earlier measurement, since hacking often sets in after an
honest gain. A run is called hacked if, since one of them, the trained score has risen and the
oracle has become worse, each by more than its interval. The intervals share their 5 % among all
that is compared: who looks at more measurements must not find hacking by chance more often.
"""

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np
import scipy

from rlft.evaluation import results, statistics
from rlft.evaluation.results import Difference

_BLOCKS = 5  # at most, into which the curves of a run are cut
_SHORTEST = 5  # iterations of a block


@dataclasses.dataclass(frozen=True)
class Hacking:
  """What is said of a reward and its oracle.

  Attributes:
    hacked: the trained score rose and the oracle became worse.
    since, until: the iterations that are compared: those between which the oracle fell most if the
      run is hacked, else the first and the last.
    trained, oracle: the changes between them.
  """

  hacked: bool
  since: int
  until: int
  trained: Difference
  oracle: Difference


def of_history(history: results.History, trained: str, oracle: str) -> Hacking | None:
  """Judges a run by held-out evaluations, each on the same prompts and seeds all along.

  Args:
    history: as `results.read_history` returns it.
    trained: name of the evaluation of the reward that is trained on.
    oracle: name of that of its judge.

  Returns:
    None if the two were not measured at least twice.
  """
  points = [(i, found) for i, found in history if trained in found and oracle in found]
  if len(points) < 2:
    return None
  last = points[-1][1]

  def change(place: int, name: str, level: float) -> Difference:
    return results.paired_difference(points[place][1][name], last[name], level=level)

  return _judge(
    [iteration for iteration, _ in points],
    lambda place, level: (change(place, trained, level), change(place, oracle, level)),
  )


def of_curves(
  iterations: np.ndarray, trained: np.ndarray, oracle: np.ndarray, *, lower_is_better: bool = False
) -> Hacking | None:
  """Judges a run by its training curves, whose iterations have prompts and noise of their own.

  The curves are cut into blocks, whose means are compared by Welch's t-interval.

  Args:
    iterations: `[N]`.
    trained: `[N]`, means of the reward; NaN where it could not score.
    oracle: `[N]`, means of its judge on the same images.
    lower_is_better: direction of the judge.

  Returns:
    None if the curves are too short for two blocks.
  """
  whole = np.isfinite(trained) & np.isfinite(oracle)
  count = min(int(whole.sum()) // _SHORTEST, _BLOCKS)
  if count < 2:
    return None
  x, up, judge = (np.array_split(curve[whole], count) for curve in (iterations, trained, oracle))

  def changes(place: int, level: float) -> tuple[Difference, Difference]:
    return (
      _difference(up[place], up[-1], level),
      _difference(judge[place], judge[-1], level, lower_is_better=lower_is_better),
    )

  ends = [int(block[0]) for block in x[:-1]] + [int(x[-1][-1])]
  return _judge(ends, changes)


def change_of_curve(values: np.ndarray) -> Difference | None:
  """How a training curve changed from its first block to its last; see `of_curves`.

  Args:
    values: `[N]`, more is better; NaN is left out.

  Returns:
    None if the curve is too short for two blocks.
  """
  values = values[np.isfinite(values)]
  count = min(len(values) // _SHORTEST, _BLOCKS)
  if count < 2:
    return None
  blocks = np.array_split(values, count)
  return _difference(blocks[0], blocks[-1], statistics.LEVEL)


def _judge(
  iterations: Sequence[int], changes: Callable[[int, float], tuple[Difference, Difference]]
) -> Hacking:
  """Compares the last measurement with all others.

  Args:
    iterations: of the measurements.
    changes: `(place, level) -> changes of the trained score and of the oracle` up to the last.
  """
  level = 1 - (1 - statistics.LEVEL) / (len(iterations) - 1)
  found = [(place, *changes(place, level)) for place in range(len(iterations) - 1)]
  hacked = [one for one in found if (one[1].verdict, one[2].verdict) == ("better", "worse")]
  place, trained, oracle = max(hacked, key=lambda one: abs(one[2].mean), default=found[0])
  return Hacking(bool(hacked), iterations[place], iterations[-1], trained, oracle)


def _difference(
  before: np.ndarray, after: np.ndarray, level: float, *, lower_is_better: bool = False
) -> Difference:
  """The change between two samples that are independent of each other."""
  change = float(after.mean() - before.mean())
  low = high = change
  if before.std() or after.std():
    test = scipy.stats.ttest_ind(after, before, equal_var=False)
    low, high = map(float, test.confidence_interval(level))
  size = abs(float(before.mean()))
  # Of means of many images: whatever is certain counts.
  verdict = statistics.verdict(
    change, low, high, least=np.finfo(np.float32).tiny, lower_is_better=lower_is_better
  )
  return Difference(change, low, high, change / size if size else float("nan"), verdict)


def plainly(found: Hacking) -> str:
  """What a task's reward and its judge did, in words alone."""
  if found.hacked:
    return "the reward rose and its judge became worse: it is being exploited"
  if found.trained.verdict != "better":
    return "the reward was not seen to rise, so that there is nothing to exploit yet"
  if found.oracle.verdict == "better":
    return "the reward and its judge rose together"
  return "the reward rose and its judge did not follow: look at the pictures"


def sentence(name: str, judge: str, found: Hacking) -> str:
  """What is said of a task, for the console.

  Args:
    name: of the task.
    judge: the oracle's name.
    found: the judgement.
  """
  verdict = "reward hacked" if found.hacked else "not seen to be hacked"
  return f"{name}: {verdict}: {numbers(judge, found)}"


def numbers(judge: str, found: Hacking) -> str:
  """How a task's reward and its judge changed; arguments as of `sentence`."""

  def said(change: Difference) -> str:
    digits = f"+.{statistics.digits(abs(change.mean))}f"
    return f"{change.mean:{digits}} [{change.low:{digits}}, {change.high:{digits}}]"

  return (
    f"from iteration {found.since} to {found.until} the reward changed by"
    f" {said(found.trained)} ({found.trained.verdict}), {judge}, which judges it, by"
    f" {said(found.oracle)} ({found.oracle.verdict})"
  )
