"""Where a run stands, its checkpoints, and how it goes on from one."""

import dataclasses
import logging
import os

from jax.experimental import multihost_utils
import numpy as np

from rlft.config import stored
from rlft.evaluation import results
from rlft.run.open import Run
from rlft.types import TrainState, UserError

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Cursor:
  """Where a run stands between two units of work (a task, or the pretraining step).

  Attributes:
    iteration: being done, from 0.
    task: next task of the iteration; the number of tasks stands for the pretraining step.
    metrics: of this iteration so far.
    evaluated: whether the evaluation that is due before this iteration has been done.
  """

  iteration: int = 0
  task: int = 0
  metrics: dict[str, float] = dataclasses.field(default_factory=dict)
  evaluated: bool = False


def save(run: Run, state: TrainState, cursor: Cursor) -> None:
  """Starts an asynchronous save."""
  run.checkpointer.save(
    cursor.iteration,
    state,
    {
      "cursor": dataclasses.asdict(cursor),
      "config": stored.to_json(run.config),
      "base_model": run.model.fingerprint,
      "prompts": dict(run.digests),
      "started_in": os.getcwd(),  # Paths of prompts may be relative.
      "histories": [task.memory.state() if task.memory else None for task in run.tasks],
    },
    task=cursor.task,
  )


def resume(run: Run, state: TrainState) -> tuple[TrainState, Cursor]:
  """The newest checkpoint's state and place; the given state and the start if there is none.

  Raises:
    UserError: the checkpoint belongs to another base model, to other settings or other prompts.
  """
  changes = []

  def check(meta):
    if meta["base_model"] != run.model.fingerprint:
      raise UserError(
        f"the checkpoint in {run.workdir} was trained from another base model than"
        f" {run.config.pretrained}: give that model, or a new --workdir"
      )
    changes[:] = stored.check_resume(stored.from_json(meta["config"]), run.config)
    for source, digest in meta.get("prompts", {}).items():  # Older checkpoints have none.
      if run.digests.get(source, digest) != digest:
        raise UserError(
          f"the prompts or pictures of {source} are not those that the run in {run.workdir} began"
          " with: put them back as they were, or give a new --workdir"
        )

  restored = run.checkpointer.restore(state, check)
  if restored is None:
    return state, Cursor()
  _, state, meta = restored
  for change in changes:
    _log.warning("resuming with a changed setting: %s", change)
  for task, memory in zip(run.tasks, meta["histories"], strict=True):
    if task.memory is not None:
      task.memory.restore(memory)
  cursor = Cursor(**meta["cursor"])
  # The checkpoint may be older than the evaluation that followed it.
  cursor.evaluated = _agreed(run.writes and results.resume_history(run.workdir, cursor.iteration))
  _log.warning("resuming %s at iteration %d", run.workdir, cursor.iteration)
  return state, cursor


def _agreed(value: bool) -> bool:
  """What the process that writes says, on every process."""
  return bool(multihost_utils.broadcast_one_to_all(np.array(value)))
