"""Whether rewards could score what they were given.

A reward that scores nothing stops the run before its first update; one whose scores are all the
same gets a warning.
"""

from collections.abc import Mapping
import functools
import logging

from rlft.config.settings import Config, TaskConfig
from rlft.evaluation.results import EvalResult
from rlft.rewards.scoring.errors import RewardError
from rlft.types import UserError

_log = logging.getLogger(__name__)


def check_scores(
  config: Config, task: TaskConfig, metrics: Mapping[str, float], iteration: int
) -> None:
  """Checks what a task's images scored; warns, once, of scores that are all the same.

  Args:
    config: of the run.
    task: one of its tasks.
    metrics: of its images.
    iteration: from 0.

  Raises:
    RewardError: too many images could not be scored; in the first iteration also if the judge or
      the veto's reward could score none.
  """
  name, bound = task.name, config.scoring.max_nan_share
  where = f"task {name}, iteration {iteration}"
  unscored = max(metrics.get(f"{kind}/{name}/unscored", 0.0) for kind in ("reward", "credit"))
  if unscored > bound:
    source = task.reward + (f" and veto={task.veto}" if task.veto else "")
    raise RewardError(
      f"{where}: {unscored:.0%} of the images could not be scored by {source}, more than"
      f" --max_nan_share={bound:g}: correct the reward, then run the same command to go on"
    )
  for key in ("veto", "watch"):
    if iteration == 0 and metrics.get(f"{key}/{name}/unscored") == 1.0:
      raise RewardError(
        f"{where}: {key}={getattr(task, key)} could score none of the images: see whether it can"
        f" score these prompts at all, or leave {key} out"
      )
  if metrics.get(f"reward/{name}/constant") == 1.0:
    _warn_of_constant(config.output.workdir, name, task.reward)


@functools.cache  # Once in a run.
def _warn_of_constant(workdir: str, task: str, reward: str) -> None:
  del workdir
  _log.warning(
    "task %s: %s gives all images that are compared the same score, so that nothing is learned from"
    " them: see whether it can tell them apart (said once; reward/%s/constant is 1 whenever it is"
    " so)",
    task,
    reward,
    task,
  )


def check_evaluations(found: Mapping[str, EvalResult], iteration: int) -> None:
  """Checks that each metric could score any of the images.

  Args:
    found: what was measured.
    iteration: number of iterations done; 0 is the base model.

  Raises:
    UserError: one could not.
  """
  for name, result in found.items():
    if result.unscored == len(result.scores):
      where, remedy = f"after iteration {iteration}", "what it needs is there"
      if iteration == 0:
        where, remedy = "of the base model", "it can score these prompts at all"
      raise UserError(
        f"--eval=name={name}: metric={result.metric} could score none of the {result.images} images"
        f" {where}: see whether {remedy}, or leave it out; the same command measures again"
      )
