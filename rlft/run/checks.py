"""Checks of a run before it starts: contradictions, missing files, sizes that do not divide.

Each raises a UserError of one line that ends with the remedy. All are cheap and none touches an
accelerator, so that a mistake is reported before anything is compiled.
"""

from collections.abc import Iterator, Mapping, Sequence
import logging
import math
import re

import jax

from rlft import catalog
from rlft.config import fields
from rlft.config.settings import EMOJI_SD, Config, TaskConfig
from rlft.models import scheduler_config, stable_diffusion
from rlft.models.files import lora_files, pretrained
from rlft.parallel import cpu
from rlft.storage import files
from rlft.types import UserError

_log = logging.getLogger(__name__)

_NOTICE = 15  # seconds, the least that clouds give to a machine which they take away
_PRETRAIN = "pretrain"  # In the names of metrics.
_NAME = re.compile(r"[A-Za-z0-9_.-]+")  # a task's name becomes part of metric and file names


def validate(config: Config) -> None:
  """Checks a whole run before it starts; creates the working directory.

  Raises:
    UserError: a value out of range, a contradiction, or a missing file or directory.
  """
  for name, remedy in (
    ("pretrained", f"give a model directory in the diffusers layout, a single file, or {EMOJI_SD}"),
    ("workdir", "give a directory for the run's files"),
    ("task", "give at least one, e.g. --task=emoji-skintone"),
  ):
    if not fields.flat(config)[name]:
      raise UserError(f"--{name} is missing: {remedy}")
  validate_settings(config)

  # What is on this machine; the working directory last, so that no mistake above leaves one behind.
  validate_pretrained(config.pretrained)
  for entry in (*config.task, *config.eval):
    catalog.check_prompts(entry.prompts)
  if config.pretraining.pretrain_weight:
    catalog.check_pairs(config.pretraining.pretrain_data)
  try:
    files.check_writable(config.output.workdir)
  except UserError as error:
    raise UserError(f"--workdir={error}") from error


def validate_settings(config: Config) -> None:
  """Checks what can be seen from the settings alone.

  Raises:
    UserError: a value out of range, or a contradiction.
  """
  fields.check(config)
  scheduler_config.parse(config.policy.scheduler)
  stable_diffusion.parse_size(config.policy.image_size)
  for message in _contradictions(config):
    raise UserError(message)
  catalog.make_algorithm(config.algorithm).check(config.policy, config.task)


def with_rank(config: Config) -> Config:
  """The settings with the rank of the LoRA that `--init_lora` names.

  Raises:
    UserError: the file cannot be read, or has another rank than `--lora_rank` says.
  """
  path, said = config.policy.init_lora, config.policy.lora_rank
  if not path:
    return config
  try:
    rank = lora_files.rank(path)
  except UserError as error:
    raise UserError(f"--init_lora={error}") from error
  if said not in (0, rank):
    raise UserError(
      f"--lora_rank={said} is not the rank of --init_lora={path}, which is {rank}: give"
      f" --lora_rank={rank}"
    )
  return fields.replace(config, lora_rank=rank)


def _contradictions(config: Config) -> Iterator[str]:
  """One line for every pair of settings that cannot both be meant."""
  policy, pretraining = config.policy, config.pretraining
  for flag, entries in (("task", config.task), ("eval", config.eval)):
    names = [entry.name for entry in entries]
    for name in names:
      if not _NAME.fullmatch(name):
        yield f"--{flag}=name={name}: use letters, digits, '_', '-' and '.' in the name"
      if (flag, name) == ("task", _PRETRAIN):
        yield f"--task=name={name}: that is what the pretraining step is called; give another name"
      if names.count(name) > 1:
        yield f"two of --{flag} have the name {name}: give each its own with name=..."
  for task in config.task:
    where, size, per_prompt = f"--task=name={task.name}", task.batch_size, task.images_per_prompt
    if size % per_prompt:
      yield (
        f"{where}: batch_size={size} is not a multiple of images_per_prompt={per_prompt}: "
        f"{_nearest_multiples('batch_size', size, per_prompt)}"
      )
  for entry in config.eval:
    if entry.images % entry.images_per_prompt:
      yield (
        f"--eval=name={entry.name}: images={entry.images} is not a multiple of "
        f"images_per_prompt={entry.images_per_prompt}: "
        f"{_nearest_multiples('images', entry.images, entry.images_per_prompt)}"
      )
  if pretraining.pretrain_weight and not pretraining.pretrain_data:
    yield (
      f"--pretrain_weight={pretraining.pretrain_weight} needs data: give --pretrain_data=emoji or a"
      " folder with metadata.jsonl, or --pretrain_weight=0 to go without"
    )
  if policy.lora_alpha and not policy.lora_rank:
    yield f"--lora_alpha={policy.lora_alpha} has no effect without LoRA: give --lora_rank too"
  if (config.optimizer.param_dtype, config.devices.compute_dtype) == ("bfloat16", "float32"):
    yield (
      "--param_dtype=bfloat16 would round what --compute_dtype=float32 computes with: use"
      " --compute_dtype=bfloat16 too, or --param_dtype=float32"
    )
  if config.evaluation.eval_every and not config.eval:
    yield f"--eval_every={config.evaluation.eval_every} has nothing to evaluate: give --eval too"


def _nearest_multiples(name: str, value: int, step: int) -> str:
  below = value // step * step
  return f"use {name}={below + step}" + (f" or {below}" if below else "")


def validate_pretrained(path: str) -> None:
  """Checks that there is a model, as `pretrained.find` takes it."""
  try:
    pretrained.find(path)
  except UserError as error:
    raise UserError(f"--pretrained={error}") from error


def validate_devices(config: Config, *, device_count: int, process_count: int) -> None:
  """Checks that batches and parameters divide evenly.

  Args:
    config: the run.
    device_count: devices of all processes.
    process_count: processes; the images of one prompt stay on one, where host rewards see them.
  """
  if device_count % config.devices.fsdp:
    raise UserError(
      f"--fsdp={config.devices.fsdp} does not divide the {device_count} devices: use a divisor of"
      " them"
    )
  for task in config.task:
    step = math.lcm(device_count, process_count * task.images_per_prompt)
    if task.batch_size % step:
      raise UserError(
        f"--task=name={task.name}: batch_size={task.batch_size} cannot be divided among "
        f"{device_count} devices of {process_count} processes with images_per_prompt="
        f"{task.images_per_prompt}: {_nearest_multiples('batch_size', task.batch_size, step)}"
      )
    where = f"--task=name={task.name}: batch_size={task.batch_size}"
    _check_parts(config, where, task.batch_size // device_count)
  size = config.pretraining.pretrain_batch_size
  if config.pretraining.pretrain_weight and size % device_count:
    raise UserError(
      f"--pretrain_batch_size={size} is not a multiple of the {device_count} devices: "
      f"{_nearest_multiples('pretrain_batch_size', size, device_count)}"
    )
  if config.pretraining.pretrain_weight:
    _check_parts(config, f"--pretrain_batch_size={size}", size // device_count)


def _check_parts(config: Config, where: str, images: int) -> None:
  """Checks that a device's images can be taken in parts."""
  for name in ("microbatch", "decode_chunk"):
    part = getattr(config.devices, name)
    if part and images % part:
      raise UserError(
        f"{where} is {images} images on each device, which is no multiple of --{name}={part}:"
        f" use a divisor of {images}, or 0"
      )


def validate_sets(task: TaskConfig, on_sets: Sequence[str]) -> None:
  """Checks that there are sets of images for the rewards of a task that score sets.

  Args:
    task: its settings.
    on_sets: the names of these rewards.
  """
  if on_sets and task.images_per_prompt == 1:
    raise UserError(
      f"--task=name={task.name}: {', '.join(on_sets)} scores the images of a prompt as a set: give"
      " images_per_prompt, e.g. 16"
    )


def warn(config: Config, metrics: Mapping[str, float], iteration: int) -> None:
  """Says what the first iterations show of settings that do not what they are meant to.

  Args:
    config: of the run.
    metrics: of the iteration.
    iteration: from 0; the second compiles nothing.
  """
  if iteration == 0:
    warn_if_unused(config)
    warn_if_bounded(config, metrics)
  if iteration == 1 and cpu.goes_on():  # No machine with CPUs alone is taken away.
    warn_if_slow_to_stop(metrics, jax.process_count())


def warn_if_slow_to_stop(metrics: Mapping[str, float], process_count: int) -> None:
  """Says so if a machine that is taken away may be gone before there is a checkpoint.

  Args:
    metrics: of an iteration that compiled nothing.
    process_count: of the run; several cannot stop while they draw or score.
  """
  phases = ("update",) if process_count == 1 else ("sample", "reward", "update")
  units = {
    key: value
    for key, value in metrics.items()
    if key.startswith(tuple(f"time/{phase}_s/" for phase in phases)) and value > _NOTICE
  }
  if units:
    name = max(units, key=units.get)
    _log.warning(
      "a unit of work (%s) takes %.0f s, and a run that is told to stop finishes it before it saves"
      " its state: spot machines are gone after 15 to 30 s, so keep --checkpoint_every small, or"
      " give fewer images an iteration (batch_size) or fewer --train_timesteps",
      name,
      units[name],
    )


def warn_if_unused(config: Config) -> None:
  """Says so if there are pictures for a pretraining loss that has no weight."""
  pretraining = config.pretraining
  if pretraining.pretrain_data and not pretraining.pretrain_weight:
    _log.warning(
      "--pretrain_data=%s is not used, as --pretrain_weight is 0 (some algorithms leave the"
      " pretraining loss out unless it is given)",
      pretraining.pretrain_data,
    )


def warn_if_bounded(config: Config, metrics: Mapping[str, float]) -> None:
  """Says so if the bound on gradients leaves the weights of losses without effect."""
  bound = config.optimizer.max_grad_norm
  if bound and (norm := metrics["grad_norm"]) > bound:
    _log.warning(
      "the tasks' gradients are cut from %.2g, their mean norm, to --max_grad_norm=%g: a factor of"
      " their losses (--kl_weight, timestep_weights) does not change how long a step is, unless it"
      " makes the gradient shorter than that",
      norm,
      bound,
    )
  if bound and (norm := metrics.get("pretrain/grad_norm", 0.0)) > bound:
    _log.warning(
      "the pretraining step's gradient is cut from %.2g to --max_grad_norm=%g: --pretrain_weight=%g"
      " does not change how long the step is, unless it makes the gradient shorter than that",
      norm,
      bound,
      config.pretraining.pretrain_weight,
    )
