"""What the files of a run say, read once: for the page of a run, of several, and a model card.

Whatever of a run's directory is there yet: `config.json`, `metrics.jsonl`, `eval_history.jsonl`,
`eval_base.json` and `usage.jsonl`; older runs have less of it.
"""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import functools
import json
import os
from typing import Any

import numpy as np

from rlft.evaluation import hacking as hacking_lib
from rlft.evaluation import results
from rlft.evaluation.results import BestBase, History
from rlft.report import evaluations, hacking, metrics, usage
from rlft.report import verdict as verdict_lib
from rlft.report.hacking import Call
from rlft.report.usage import Cost
from rlft.report.verdict import Measure, Place, Training, Verdict
from rlft.storage import files

CONFIG_FILE = "config.json"
TIMES = ("time/sample_s", "time/reward_s", "time/update_s")  # of an iteration

_LAST = 5  # the last fifth of a run says how it goes

# What is shown of a task; settings in which a part is missing are survived.
_TASK = dict.fromkeys(("name", "reward", "prompts", "batch_size", "images_per_prompt"), "?")
_TASK |= {"veto": "", "watch": ""}


@dataclasses.dataclass(frozen=True)
class RunFiles:
  """A run's directory.

  Attributes:
    workdir: the directory.
    config: its settings; empty if they cannot be read.
    tasks: of the settings, each with all keys that are shown.
    rows: of metrics.jsonl.
    history, best: evaluations, see `rlft.evaluation.results`.
    cost: None where older runs do not say it.
    calls: what is said of rewards and their judges.
    lower_is_better: of the judges those that improve by falling.
    command: that made the run; '' where that is not known.
  """

  workdir: str
  config: Mapping[str, Any]
  tasks: Sequence[Mapping[str, Any]]
  rows: Sequence[Mapping[str, Any]]
  history: History
  best: Mapping[str, BestBase]
  cost: Cost | None
  calls: Sequence[Call]
  lower_is_better: Collection[str]
  command: str

  @property
  def name(self) -> str:
    """The last part of its path."""
    return os.path.basename(os.path.abspath(self.workdir))

  @property
  def images(self) -> int | None:
    """Images that were drawn for training; None where that is not known."""
    sizes = [task["batch_size"] for task in self.tasks]
    known = sizes and all(isinstance(size, int) for size in sizes)
    return len(self.rows) * sum(sizes) if known else None

  @property
  def seconds(self) -> float:
    """Time of sampling, scoring and updating; without compilation, evaluations, lost iterations."""
    return sum(row.get(key) or 0 for row in self.rows for key in TIMES)

  @property
  def guards(self) -> set[str]:
    """Names of the evaluations that are not to become worse."""
    return {one.get("name") for one in _entries(self.config, "eval") if one.get("guard")}

  @functools.cached_property
  def keys(self) -> list[str]:
    """Names of the metrics, in the order in which they came."""
    return list(dict.fromkeys(key for row in self.rows for key in row if key != "iteration"))

  def values(self, key: str) -> np.ndarray:
    """A metric at each iteration, `[N]`; NaN where it is missing."""
    return metrics.curve(self.rows, key)

  @functools.cached_property
  def measures(self) -> list[Measure]:
    """Evaluations at their start and now."""
    return evaluations.measures(self.history, self.best, self.guards)

  @functools.cached_property
  def training(self) -> Training:
    """How training went."""
    total, clip_range = self.config.get("iterations"), self.config.get("clip_range")
    falling = hacking.to_fall(self.tasks)
    curves = {
      name: hacking_lib.change_of_curve(
        self.values(f"reward/{name}/mean") * (-1 if name in falling else 1)
      )
      for name in metrics.trained_curves(self.keys)
    }
    constant = [key for key in self.keys if key.startswith("reward/") and key.endswith("/constant")]
    return Training(
      done=len(self.rows),
      total=total if isinstance(total, int) else 0,
      rewards={name: change.verdict for name, change in curves.items() if change},
      clip_fraction=self._lately("clip_fraction"),
      approx_kl=self._lately("approx_kl"),
      constant=float(np.mean([self._lately(key) for key in constant])) if constant else np.nan,
      clip_range=clip_range if isinstance(clip_range, float) else np.nan,
    )

  def _lately(self, key: str) -> float:
    """The mean of a metric over the last fifth of the iterations; NaN where there is none."""
    values = self.values(key)[-max(len(self.rows) // _LAST, 1) :]
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")

  @functools.cached_property
  def verdict(self) -> Verdict:
    """What the run comes to."""
    return verdict_lib.verdict(self.measures, self.calls, self.training)

  @property
  def place(self) -> Place:
    """Where it is, for commands."""
    prompts = [one.get("prompts") for one in (*_entries(self.config, "eval"), *self.tasks)]
    keys = "learning_rate", "pretrain_weight", "max_grad_norm"
    rate, weight, bound = (self.config.get(key) for key in keys)
    return Place(
      workdir=self.workdir,
      base=self.config.get("pretrained") or "",
      command=self.command,
      learning_rate=rate if isinstance(rate, float) else 0.0,
      prompts=next((one for one in prompts if one and one != "?"), ""),
      pretrain_weight=weight if isinstance(weight, float) else 0.0,
      pretrain_bounded=bool(bound) and self._lately("pretrain/grad_norm") > bound,
    )


def read_run(
  workdir: str | os.PathLike[str],
  *,
  command: str | None = None,
  lower_is_better: Collection[str] = (),
) -> RunFiles:
  """Reads a run's directory.

  Args:
    workdir: the run's directory.
    command: the command line that made the run; what the directory says of it, if None.
    lower_is_better: judges that improve by falling, as `watch=` names them; those that are
      evaluated, too, need not be among them.

  Raises:
    UserError: a damaged file.
  """
  path = files.path_of(workdir)
  config = _read_config(path / CONFIG_FILE)
  tasks = [_TASK | task for task in _entries(config, "task")]
  history = results.read_history(path)
  cost = usage.read_cost(path)
  lower = {*lower_is_better, *_lower(config, history)}
  return RunFiles(
    workdir=os.fspath(workdir),
    config=config,
    tasks=tasks,
    rows=[row for row in files.read_jsonl(path / metrics.METRICS_FILE) if "iteration" in row],
    history=history,
    best=results.read_base(path),
    cost=cost,
    calls=hacking.of_run(path, {**config, "task": tasks}, lower_is_better=lower),
    lower_is_better=lower,
    command=command or (cost.command if cost else ""),
  )


def _read_config(path: files.Path) -> dict[str, Any]:
  """The run's settings; empty if they are not there or not readable, which a page survives."""
  try:
    config = json.loads(path.read_text())
  except (OSError, ValueError):
    return {}
  return config if isinstance(config, dict) else {}


def _entries(config: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
  found = config.get(key)
  return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _lower(config: Mapping[str, Any], history: History) -> set[str]:
  """The metrics that improve by falling, as the settings name them."""
  last = history[-1][1] if history else {}
  return {
    one["metric"]
    for one in _entries(config, "eval")
    if "metric" in one and (found := last.get(one.get("name"))) and found.lower_is_better
  }
