"""What a training run is made of, opened once: model, tasks, evaluations, data, checkpoints.

Nothing here is the algorithm (that is rlft/train.py), and nothing here changes during a run.
"""

from collections.abc import Sequence
import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from rlft import catalog
from rlft.algorithms.advantages import PromptHistory
from rlft.config.settings import Config, TaskConfig
from rlft.data import pairs as pairs_lib
from rlft.diffusion import ddim
from rlft.diffusion import sampler as sampler_lib
from rlft.evaluation import evaluate as evaluate_lib
from rlft.evaluation import metric, results
from rlft.evaluation.metric import MetricScorer
from rlft.models import lora, stable_diffusion
from rlft.models.files import pretrained
from rlft.models.stable_diffusion import StableDiffusion
from rlft.parallel import sharding
from rlft.report import samples
from rlft.rewards.scoring import task as combine
from rlft.rewards.scoring import trial
from rlft.rewards.scoring.task import TaskScorer
from rlft.run import checks, scored
from rlft.run.preemption import Stop
from rlft.storage.checkpoint import Checkpointer
from rlft.types import Prompt, UserError

_COUNTED_PROMPTS = 100_000  # of a list, in which those that are too long are counted at the start


@dataclasses.dataclass(frozen=True)
class Task:
  """A task of the run, made from its `TaskConfig`; `history` where advantages are per prompt."""

  config: TaskConfig
  prompts: Sequence[Prompt]
  scorer: TaskScorer
  history: PromptHistory | None


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything that a run holds apart from its state.

  Attributes:
    config: the settings.
    workdir: where everything is written.
    mesh: all devices.
    rows: the sharding of a batch.
    model: modules, tokenizer and base parameters.
    fingerprint: identity of the base parameters.
    schedule: T reverse steps.
    tasks: in the order in which an iteration does them.
    evals: held-out evaluations.
    metrics: applies their metrics.
    pairs: pretraining images with captions; None where they have no weight.
    frozen: parameters that no update changes, on the devices: 'vae', 'text_encoder' (and
      'text_encoder_2'), and 'unet' (of the base model) where LoRA or the KL divergence needs it.
    sampler: draws the evaluations' images.
    checkpointer: keeps the state.
  """

  config: Config
  workdir: Path
  mesh: Mesh
  rows: NamedSharding
  model: StableDiffusion
  fingerprint: str
  schedule: ddim.Schedule
  tasks: Sequence[Task]
  evals: Sequence[evaluate_lib.EvalSpec]
  metrics: MetricScorer
  pairs: pairs_lib.Pairs | None
  frozen: dict[str, Any]
  sampler: sampler_lib.Sampler
  checkpointer: Checkpointer

  @property
  def writes(self) -> bool:
    """Whether this process writes metrics and pictures."""
    return jax.process_index() == 0

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
    UserError: a mistake in the settings or in the files that they name.
  """
  checks.validate(config)
  checks.validate_devices(
    config, device_count=devices or jax.device_count(), process_count=jax.process_count()
  )
  mesh = sharding.make_mesh(config.devices.fsdp, devices)
  made_once = functools.cache(catalog.make_reward)
  rewards = [combine.task_reward(task, made_once) for task in config.task]
  for task, reward in zip(config.task, rewards, strict=True):
    checks.validate_set_reward(
      config,
      task,
      on_sets=[one.name for one in reward.rewards if one.is_set],
      same_in_set=reward.same_in_set,
    )
  prompts = [catalog.load_prompts(task.prompts) for task in config.task]
  for task, entries in zip(config.task, prompts, strict=True):
    checks.validate_prompt_count(config, task, len(entries))
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
  schedule = ddim.make_schedule(
    model.scheduler, config.policy.sampling_steps, eta=config.policy.eta
  )
  if len(schedule.trainable) < config.algorithm.train_timesteps:
    raise UserError(
      f"--train_timesteps={config.algorithm.train_timesteps}: only {len(schedule.trainable)} of the"
      f" {config.policy.sampling_steps} sampling steps are random; lower it"
    )
  for task, entries in zip(config.task, prompts, strict=True):
    texts = [entry.text for entry in entries[:_COUNTED_PROMPTS]]
    model.tokenize(texts, source=task.prompts)
  pairs = None
  if config.pretraining.pretrain_weight:
    size = stable_diffusion.image_size(model)
    pairs = catalog.load_pairs(config.pretraining.pretrain_data, size=size, seed=config.seed)

  uses = [
    *itertools.chain(*map(combine.uses, config.task, rewards, prompts)),
    *metric.uses(evals),
  ]
  trial.try_each(
    uses,
    image_shape=(*stable_diffusion.image_size(model), 3),
    timeout_s=config.scoring.reward_timeout_s,
  )

  kept = config.policy.lora_rank or config.algorithm.kl_weight
  frozen = {name: tree for name, tree in model.params.items() if name != "unet" or kept}
  rows = sharding.batch(mesh)
  return Run(
    config=config,
    workdir=Path(config.output.workdir),
    mesh=mesh,
    rows=rows,
    model=model,
    fingerprint=model.fingerprint,
    schedule=schedule,
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
        history=PromptHistory(
          length=config.algorithm.prompt_history,
          minimum=config.algorithm.prompt_history_min,
        )
        if config.algorithm.advantage == "prompt"
        else None,
      )
      for task, entries, reward in zip(config.task, prompts, rewards, strict=True)
    ],
    evals=evals,
    metrics=MetricScorer(rows=rows, scoring=config.scoring),
    pairs=pairs,
    frozen=frozen,
    sampler=sampler_lib.Sampler(
      model,
      batch_size=max(task.batch_size for task in config.task),
      sampling_steps=config.policy.sampling_steps,
      guidance_scale=config.policy.guidance_scale,
      eta=config.policy.eta,
      mesh=mesh,
      frozen={name: tree for name, tree in frozen.items() if name != "unet"},
      **sampling_settings(config),
    ),
    checkpointer=Checkpointer(
      Path(config.output.workdir, "checkpoints"), keep=config.output.keep_checkpoints
    ),
  )


def sampling_settings(config: Config) -> dict[str, Any]:
  """Settings of `sampler.generate` that a run has and a plain model has not."""
  return {
    "lora_scale": lora.scale(config.policy.lora_rank, config.policy.lora_alpha),
    "microbatch": config.devices.microbatch,
    "decode_chunk": config.devices.decode_chunk,
  }


def measure(run: Run, weights: lora.Weights, iteration: int, stop: Stop) -> None:
  """Measures the held-out evaluations; keeps their results and pictures in the workdir.

  Args:
    run: the run.
    weights: of the UNet, on the devices.
    iteration: number of iterations done; 0 is the base model.
    stop: asked for each batch, and while a metric is waited for.

  Raises:
    RewardError: a metric failed.
    UserError: a metric could score none of the base model's images.
    Stopped: the run was told to stop; nothing has been kept of the results.
  """

  def sample(prompts, seed):
    texts = [prompt.text for prompt in prompts]
    progress = "evaluating" if run.writes else ""
    for batch in run.sampler.batches(texts, seed, weights=weights, progress=progress):
      stop.check()
      yield batch

  keep = samples.Keeper(run.workdir, iteration, max_prompts=run.config.evaluation.report_images)
  with stop.at_once():
    measured = evaluate_lib.evaluate(
      run.evals,
      sample=sample,
      score=run.metrics,
      seed=run.config.evaluation.eval_seed,
      keep=keep if run.writes else None,
    )
  if iteration == 0:
    scored.check_evaluations(measured)
  if run.writes:
    results.append_history(run.workdir, iteration, measured)
