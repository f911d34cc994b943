"""What a training run is made of, opened once: model, tasks, evaluations, data, checkpoints.

The loop is rlft/train.py; nothing here changes during a run.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from rlft import catalog
from rlft.algorithms.base import Memory
from rlft.config.settings import Config, TaskConfig
from rlft.data import pairs as pairs_lib
from rlft.data import sources
from rlft.evaluation import metric
from rlft.evaluation.evaluate import EvalSpec
from rlft.evaluation.metric import MetricScorer
from rlft.models import stable_diffusion
from rlft.models.files import pretrained
from rlft.models.stable_diffusion import StableDiffusion
from rlft.parallel import processes, sharding
from rlft.parallel.join import announced
from rlft.rewards.scoring import gradient, trial
from rlft.rewards.scoring.task import TaskScorer, task_reward, uses
from rlft.run import checks
from rlft.run.programs import Programs, kept_parameters, make_programs
from rlft.run.state import initial_state
from rlft.storage import files
from rlft.storage.checkpoint import Checkpointer
from rlft.types import Prompt, TrainState

_COUNTED_PROMPTS = 2_000  # of a task, in which those that are too long are counted at the start


@dataclasses.dataclass(frozen=True)
class Task:
  """A task of the run, made from its `TaskConfig`; `memory` is the algorithm's, if it needs one."""

  config: TaskConfig
  prompts: Sequence[Prompt]
  scorer: TaskScorer
  memory: Memory | None


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything that a run holds apart from its state.

  Attributes:
    config: the settings.
    workdir: where everything is written.
    mesh: all devices.
    rows: the sharding of a batch.
    model: modules, tokenizer and base parameters.
    programs: everything that computes, with the algorithm.
    tasks: in the order in which an iteration does them.
    evals: held-out evaluations.
    metrics: applies their metrics.
    pairs: pretraining images with captions; None where they have no weight.
    frozen: parameters that no update changes, on the devices, see `programs.kept_parameters`.
    checkpointer: keeps the state.
    digests: what stands for the prompts of tasks and evaluations, by their source, and for the list
      of pretraining pictures.
  """

  config: Config
  workdir: files.Path
  mesh: Mesh
  rows: NamedSharding
  model: StableDiffusion
  programs: Programs
  tasks: Sequence[Task]
  evals: Sequence[EvalSpec]
  metrics: MetricScorer
  pairs: pairs_lib.Pairs | None
  frozen: dict[str, Any]
  checkpointer: Checkpointer
  digests: Mapping[str, str]

  @property
  def writes(self) -> bool:
    """Whether this process writes metrics and pictures."""
    return jax.process_index() == 0

  def initial_state(self) -> TrainState:
    """The state before the first update; gives up the model's own UNet if nothing else reads it."""
    return initial_state(
      self.config,
      self.programs.learner.optimizer,
      self.mesh,
      self.model.params["unet"],
      is_kept="unet" in self.frozen,
    )

  def close(self) -> None:
    """Waits for pending saves and ends the threads of host rewards."""
    for task in self.tasks:
      task.scorer.close()
    self.metrics.close()
    self.checkpointer.close()


def open_run(config: Config, devices: int = 0) -> Run:
  """Checks everything that can be checked before compiling, cheapest first, and loads the model.

  Args:
    config: the settings.
    devices: to run on, the first of all; 0 takes all.

  Raises:
    UserError: a mistake in the settings or in the files that they name, or another run writes into
      the working directory.
  """
  checks.validate(config)
  checks.validate_devices(
    config, device_count=devices or jax.device_count(), process_count=jax.process_count()
  )
  mesh = sharding.make_mesh(config.devices.fsdp, devices)
  processes.meet(mesh)
  checkpointer = Checkpointer(
    files.path_of(config.output.workdir) / "checkpoints", keep=config.output.keep_checkpoints
  )
  try:
    with announced():
      return _open(config, mesh, checkpointer)
  except BaseException:
    checkpointer.close()
    raise


def _open(config: Config, mesh: Mesh, checkpointer: Checkpointer) -> Run:
  algorithm = catalog.make_algorithm(config.algorithm)
  made_once = functools.cache(catalog.make_reward)
  rewards = [task_reward(task, made_once) for task in config.task]
  prompts = [catalog.load_prompts(task.prompts) for task in config.task]
  for task, reward, entries in zip(config.task, rewards, prompts, strict=True):
    checks.validate_sets(task, [one.name for one in reward.rewards if one.is_set])
    algorithm.check_task(
      task,
      prompts=len(entries),
      iterations=config.iterations,
      same_in_set=reward.same_in_set,
    )
    if algorithm.slopes:
      gradient.check_kind(task, reward, config.algorithm.algorithm)
  evals = catalog.make_specs(config.eval, trained_on=config.task, make=made_once)

  def place(path, shape):
    return NamedSharding(mesh, sharding.spec(mesh, shape))

  model = pretrained.load(
    config.pretrained,
    dtype=jnp.dtype(config.devices.compute_dtype),
    remat=config.devices.remat,
    attention=config.devices.attention,
    backend=config.devices.backend,
    place=place,
    identify=True,
    scheduler=config.policy.scheduler,
    image_size=config.policy.image_size,
  )
  for task, entries in zip(config.task, prompts, strict=True):
    counted = sources.spread(len(entries), _COUNTED_PROMPTS)
    model.tokenize([entry.text for entry in sources.take(entries, counted)], source=task.prompts)
  pairs = None
  if config.pretraining.pretrain_weight:
    size = stable_diffusion.image_size(model)
    pairs = catalog.load_pairs(config.pretraining.pretrain_data, size=size, seed=config.seed)

  may_lack = config.scoring.max_nan_share
  tried = [
    use
    for task, reward, entries in zip(config.task, rewards, prompts, strict=True)
    for use in uses(task, reward, entries, may_lack=may_lack)
  ]
  trial.try_each(
    [*tried, *metric.uses(evals)],
    image_shape=(*stable_diffusion.image_size(model), 3),
    timeout_s=config.scoring.reward_timeout_s,
  )
  if algorithm.slopes:
    shape = (*stable_diffusion.image_size(model), 3)
    for task, reward, entries in zip(config.task, rewards, prompts, strict=True):
      gradient.check_path(task, reward, config.algorithm.algorithm, entries, shape)

  frozen = kept_parameters(config, algorithm, model.params)
  rows = sharding.batch(mesh)
  return Run(
    config=config,
    workdir=files.path_of(config.output.workdir),
    mesh=mesh,
    rows=rows,
    model=model,
    programs=make_programs(config, algorithm, model, mesh, frozen),
    tasks=[
      Task(
        config=task,
        prompts=entries,
        scorer=TaskScorer(
          reward,
          batch_sharding=rows,
          batch_size=task.batch_size,
          images_per_prompt=task.images_per_prompt,
          timeout_s=config.scoring.reward_timeout_s,
          threads=config.scoring.reward_threads,
        ),
        memory=algorithm.memory(),
      )
      for task, entries, reward in zip(config.task, prompts, rewards, strict=True)
    ],
    evals=evals,
    metrics=MetricScorer(rows=rows, scoring=config.scoring),
    pairs=pairs,
    frozen=frozen,
    checkpointer=checkpointer,
    digests={
      entry.prompts: sources.digest(opened)
      for entry, opened in zip(
        (*config.task, *config.eval), (*prompts, *(spec.prompts for spec in evals)), strict=True
      )
    }
    | ({f"--pretrain_data={config.pretraining.pretrain_data}": pairs.digest} if pairs else {}),
  )
