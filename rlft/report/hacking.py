"""What the files of a run say of hacked rewards, see `rlft.evaluation.hacking`."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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


def to_fall(tasks: Iterable[Mapping[str, Any]]) -> set[str]:
  """Names of the curves of terms that tasks make less (`-1*NAME`): 'task/label'.

  Args:
    tasks: as in config.json.
  """
  return {
    f"{task['name']}/{label}"
    for task in tasks
    for label, weight, _ in grammar.labelled(task["reward"])
    if weight < 0
  }


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
      found += calls or _by_curves(task, rows, judge in lower_is_better, to_fall([task]))
  return found


def _by_evaluations(
  task: Mapping[str, Any], evals: Sequence[Mapping[str, Any]], history: results.History
) -> Iterator[Call]:
  """The calls of a task's terms that are evaluated on prompts on which the judge is, too."""
  terms = grammar.terms(task["reward"])
  for weight, term in terms:
    pairs = (
      (one["name"], other["name"])
      for one in evals
      for other in evals
      if grammar.same(one["metric"], term)
      and other["metric"] == task["watch"]
      and one["prompts"] == other["prompts"]
    )
    names = next(pairs, None)
    if names and (called := hacking.of_history(_wanted(history, names[0], weight), *names)):
      yield Call(
        task["name"] if len(terms) == 1 else f"{task['name']}/{term}", task["watch"], called
      )


def _wanted(history: results.History, name: str, weight: float) -> results.History:
  """Evaluations in which the direction of a term is the one in which its weight pushes it."""
  return [
    (iteration, {**found, name: dataclasses.replace(found[name], lower_is_better=weight < 0)})
    for iteration, found in history
    if name in found
  ]


def _by_curves(
  task: Mapping[str, Any],
  rows: Sequence[Mapping[str, Any]],
  lower_is_better: bool,
  falling: Collection[str],
) -> Iterator[Call]:
  keys = dict.fromkeys(key for row in rows for key in row)
  judged = f"watch/{task['name']}/mean"
  for name in metrics.trained_curves(keys):
    if name.partition("/")[0] != task["name"] or judged not in keys:
      continue
    x, trained, oracle = (
      metrics.curve(rows, key) for key in ("iteration", f"reward/{name}/mean", judged)
    )
    trained = -trained if name in falling else trained
    if called := hacking.of_curves(x, trained, oracle, lower_is_better=lower_is_better):
      yield Call(name, task["watch"], called)
