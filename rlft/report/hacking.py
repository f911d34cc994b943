"""What the files of a run say of hacked rewards, see `rlft.evaluation.hacking`."""

from collections.abc import Collection, Iterator, Mapping, Sequence
import dataclasses
import os
from typing import Any

from rlft.evaluation import hacking, results
from rlft.evaluation.hacking import Hacking
from rlft.report import metrics
from rlft.rewards import grammar
from rlft.storage import files


@dataclasses.dataclass(frozen=True)
class Call:
  """A task's reward, or a term of its sum, judged.

  Attributes:
    name: of the task, or task/term.
    judge: the name of the oracle.
    found: what is said of the two.
  """

  name: str
  judge: str
  found: Hacking

  @property
  def sentence(self) -> str:
    """For the console."""
    return hacking.sentence(self.name, self.judge, self.found)

  @property
  def plainly(self) -> str:
    """In words alone."""
    return hacking.plainly(self.found)

  @property
  def numbers(self) -> str:
    """In numbers alone."""
    return hacking.numbers(self.judge, self.found)


def of_run(
  workdir: str | os.PathLike[str],
  config: Mapping[str, Any],
  *,
  lower_is_better: Collection[str] = (),
) -> list[Call]:
  """Judges each task that has a judge (`watch=`).

  By held-out evaluations where both the reward and its judge have one on the same prompts, else by
  the training curves.

  Args:
    workdir: the run's directory.
    config: its settings, as in config.json; what is missing there is survived.
    lower_is_better: of the judges those that improve by falling.

  Raises:
    UserError: a damaged file in the run's directory.
  """
  history = results.read_history(workdir)
  rows = files.read_jsonl(files.path_of(workdir) / metrics.METRICS_FILE)
  found = []
  for task in config.get("task", ()):
    if judge := task.get("watch"):
      calls = list(_by_evaluations(task, config.get("eval", ()), history))
      found += calls or _by_curves(task, rows, judge in lower_is_better)
  return found


def _by_evaluations(
  task: Mapping[str, Any], evals: Sequence[Mapping[str, Any]], history: results.History
) -> Iterator[Call]:
  """The calls of a task's terms that are evaluated on prompts on which the judge is, too."""
  terms = [name for _, name in grammar.terms(task["reward"])]
  for term in terms:
    pairs = (
      (one["name"], other["name"])
      for one in evals
      for other in evals
      if grammar.same(one["metric"], term)
      and other["metric"] == task["watch"]
      and one["prompts"] == other["prompts"]
    )
    names = next(pairs, None)
    if names and (called := hacking.of_history(history, *names)):
      yield Call(
        task["name"] if len(terms) == 1 else f"{task['name']}/{term}", task["watch"], called
      )


def _by_curves(
  task: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], lower_is_better: bool
) -> Iterator[Call]:
  keys = dict.fromkeys(key for row in rows for key in row)
  judged = f"watch/{task['name']}/mean"
  for name in metrics.trained_curves(keys):
    if name.partition("/")[0] != task["name"] or judged not in keys:
      continue
    curves = (metrics.curve(rows, key) for key in ("iteration", f"reward/{name}/mean", judged))
    if called := hacking.of_curves(*curves, lower_is_better=lower_is_better):
      yield Call(name, task["watch"], called)
