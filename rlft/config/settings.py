"""Every setting of a training run: names, defaults (the paper's), meaning and range.

A field carries its help text, its range and whether a resumed run may change it; the flags
(rlft/config/flags.py), the check of ranges and the comparison on resume are all made from these.
What depends on several fields, on files or on devices is checked in rlft/run/checks.py.
"""

from collections.abc import Iterable
import dataclasses
import difflib
import json
import math
import re
from typing import Any

from rlft.types import UserError

EMOJI = "emoji"  # the renderer, in the place of a folder of images with captions
EMOJI_SD = "emoji-sd"  # the name of the shipped checkpoint, in the place of a directory
_ADDRESS = re.compile(r"https?://\S*?(?=/v2/models/)")  # of a model on an inference server
_SEED_LIMIT = 2**32  # jax.random.key drops higher bits


def option(help_text: str, default: Any = dataclasses.MISSING, **rules: Any) -> Any:
  """A field with its flag's help and rules.

  Args:
    help_text: one line, shown by `--help`.
    default: of the flag; none for a required key of `--task` or `--eval`.
    **rules: `least`, `most` (inclusive) and `above`, `below` (exclusive) bounds; `choices`; `path`
      (a leading `~` stands for the home directory); `fixed`: True if a resumed run must have the
      same value, 'switch' if only zero and non-zero must not be exchanged; `free`: True if a
      resumed run may change this key of a task that is otherwise fixed.
  """
  return dataclasses.field(default=default, metadata={"help": help_text, **rules})


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  """A reward and the prompts on which it is maximised."""

  name: str = option("used in metric names")
  prompts: str = option("emoji:TASK/SPLIT, tfds:NAME/SPLIT or a file")
  reward: str = option("a reward's name, or 'NUMBER*NAME + NUMBER*NAME', normalised and added")
  batch_size: int = option("images per iteration, over all devices", 2048, least=2)
  images_per_prompt: int = option("images drawn for each prompt", 1, least=1)
  veto: str = option(
    "NAME>=NUMBER: images of which it does not hold score less than all others", ""
  )
  watch: str = option(
    "a reward's or oracle's name: measured on the same images, never trained on", "", free=True
  )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """A held-out measurement: the same prompts and seeds every time."""

  name: str = option("used in metric names")
  prompts: str = option("emoji:TASK/SPLIT, tfds:NAME/SPLIT or a file")
  metric: str = option("a reward's name or an oracle's")
  images: int = option("images in all", 256, least=2)
  images_per_prompt: int = option("images drawn for each prompt", 1, least=1)


@dataclasses.dataclass(frozen=True)
class Config:
  """A training run. Defaults are those of arXiv 2401.12244, where it gives them."""

  pretrained: str = option(
    "the model to fine-tune: a directory in the diffusers layout, org/name@revision of the Hugging"
    f" Face hub, or {EMOJI_SD}",
    "",
    path=True,
  )
  workdir: str = option("directory for checkpoints, metrics and the report", "", path=True)
  task: tuple[TaskConfig, ...] = option("what to maximise", (), fixed=True)
  eval: tuple[EvalConfig, ...] = option("what to measure before and after", (), fixed=True)
  seed: int = option(
    "seed of prompts, noise and timesteps", 0, least=0, below=_SEED_LIMIT, fixed=True
  )
  iterations: int = option("iterations of sampling, scoring and updating", 1000, least=1)

  # The policy: how images are drawn.
  sampling_steps: int = option("DDIM steps per image", 50, least=1, most=1000, fixed=True)
  guidance_scale: float = option(
    "classifier-free guidance, in sampling and in training; 1 is none", 7.0, above=0, fixed=True
  )
  eta: float = option(
    "noise of the DDIM steps, 1 as DDPM; 0 would leave nothing random to learn from",
    1.0,
    above=0,
    most=1,
    fixed=True,
  )

  # Policy gradient.
  train_timesteps: int = option("timesteps trained per iteration, drawn at random", 5, least=1)
  accumulate_timesteps: bool = option(
    "one optimizer update over all trained timesteps (DDPO) instead of one for each", False
  )
  clip_range: float = option(
    "clip range of the ratio, for a log-probability averaged over dimensions",
    1e-4,
    above=0,
    below=1,
  )
  advantage: str = option(
    "rewards are normalised over the task's batch, each prompt's history, or each prompt's images",
    "batch",
    choices=("batch", "prompt", "group"),
    fixed=True,
  )
  advantage_clip: float = option("bound on the size of advantages", 10.0, above=0)
  prompt_history: int = option(
    "rewards kept for each prompt (advantage=prompt)", 32, least=2, fixed=True
  )
  prompt_history_min: int = option(
    "rewards of a prompt before its own statistics are used (advantage=prompt)", 16, least=2
  )
  kl_weight: float = option("weight of the KL divergence to the base model", 0.0, least=0)
  pretrain_weight: float = option("weight of the pretraining loss; 0 is off", 1.0, least=0)
  pretrain_data: str = option(
    "emoji, or a folder of images with metadata.jsonl", "", path=True, fixed=True
  )
  pretrain_batch_size: int = option(
    "images per pretraining step, over all devices", 2048, least=1, fixed=True
  )

  # Optimizer (AdamW).
  learning_rate: float = option("constant learning rate", 2e-6, above=0)
  adam_b1: float = option("decay of the gradient's mean", 0.9, least=0, below=1)
  adam_b2: float = option("decay of the gradient's square", 0.999, least=0, below=1)
  adam_eps: float = option("added to the root of the gradient's square", 1e-8, above=0)
  weight_decay: float = option("decoupled weight decay", 1e-2, least=0)
  max_grad_norm: float = option(
    "bound on the gradient's global norm; 0 is none", 1.0, least=0, fixed="switch"
  )
  ema_decay: float = option(
    "decay of averaged weights, updated each iteration; 0 is off",
    0.0,
    least=0,
    below=1,
    fixed="switch",
  )
  lora_rank: int = option("rank of LoRA; 0 trains the full UNet", 0, least=0, fixed=True)
  lora_alpha: float = option("LoRA's scale times rank; 0 means the rank", 0.0, least=0, fixed=True)

  # Numerics and devices.
  compute_dtype: str = option(
    "of the UNet's products; latents and log-probabilities stay float32",
    "bfloat16",
    choices=("float32", "bfloat16"),
    fixed=True,
  )
  param_dtype: str = option(
    "of the trained parameters; bfloat16 keeps float32 ones in the optimizer's state",
    "float32",
    choices=("float32", "bfloat16"),
    fixed=True,
  )
  moments_dtype: str = option(
    "of Adam's moments; bfloat16, rounded at random, halves their memory",
    "float32",
    choices=("float32", "bfloat16"),
    fixed=True,
  )
  remat: bool = option("recompute activations in the backward pass to save memory", True)
  microbatch: int = option(
    "images at once on each device, to sample and to train; 0 for all, in float32 on CPUs for 16",
    0,
    least=0,
    fixed=True,
  )
  decode_chunk: int = option("images at once on each device in the VAE; 0 for all", 0, least=0)
  attention: str = option(
    "kernel of the UNet's attention; auto takes the fastest that the device has",
    "auto",
    choices=("auto", "xla", "cudnn", "splash"),
  )
  backend: str = option(
    "whose UNet: rlft's, or diffusers' own Flax class, for comparison",
    "rlft",
    choices=("rlft", "diffusers"),
    fixed=True,
  )
  cpu_devices: int = option(
    "on CPUs, split the host into so many devices: with one XLA leaves cores idle in small"
    " networks, but is faster from some 50 M parameters on; 0 leaves it",
    0,
    least=0,
  )
  fsdp: int = option("parameter shards; divides the number of devices", 1, least=1)

  # Rewards and safety.
  reward_timeout_s: float = option(
    "deadline in seconds for a batch of host rewards", 300.0, above=0
  )
  reward_threads: int = option("threads for host rewards on each process", 8, least=1)
  max_nan_share: float = option(
    "stop if more than this share of a batch could not be scored", 0.1, least=0, most=1
  )
  ratio_tolerance: float = option(
    "stop if the ratio before an iteration's first update is further from 1", 1e-5, above=0
  )

  # Output.
  checkpoint_every: int = option(
    "iterations between checkpoints; 0: only at the end and on SIGTERM", 10, least=0
  )
  keep_checkpoints: int = option("newest checkpoints kept", 2, least=1)
  eval_every: int = option("iterations between evaluations; 0: before and after", 0, least=0)
  eval_seed: int = option(
    "seed of the evaluations' noise", 1000, least=0, below=_SEED_LIMIT, fixed=True
  )
  report_images: int = option("prompts of each task in the report's grids", 8, least=0)


def suggestion(word: str, options: Iterable[str], otherwise: str | None = None) -> str:
  """'did you mean ...?' with the nearest of `options`; if none is near, `otherwise` or them all."""
  options = sorted(options)
  near = difflib.get_close_matches(word, options, n=1)
  if near:
    return f"did you mean {near[0]}?"
  return otherwise or f"use one of {', '.join(options)}"


def check_fields(config: Config | TaskConfig | EvalConfig, where: str = "--") -> None:
  """Checks type and range of every field by itself.

  Args:
    config: the settings; the tasks and evaluations of a Config are checked with it.
    where: what to write before a field's name in a message.
  """
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if isinstance(value, tuple):
      for entry in value:
        check_fields(entry, f"--{field.name}=name={entry.name},...,")
      continue
    shown, rules = f"{where}{field.name}={value}", field.metadata
    numbers = {int: int, float: (int, float)}.get(field.type)
    if numbers is None:
      if not isinstance(value, field.type):
        raise UserError(f"{shown} has the wrong type: give a {field.type.__name__}")
    elif not isinstance(value, numbers) or isinstance(value, bool) or not math.isfinite(value):
      raise UserError(f"{shown} is not a number: give a finite {field.type.__name__}")
    if "choices" in rules and value not in rules["choices"]:
      raise UserError(f"{shown} is not known: {suggestion(value, rules['choices'])}")
    for rule, words, holds in (
      ("least", "at least", lambda bound, v=value: v >= bound),
      ("most", "at most", lambda bound, v=value: v <= bound),
      ("above", "greater than", lambda bound, v=value: v > bound),
      ("below", "less than", lambda bound, v=value: v < bound),
    ):
      if rule in rules and not holds(rules[rule]):
        raise UserError(f"{shown} is out of range: it must be {words} {rules[rule]}")


def to_json(config: Config) -> str:
  """The configuration as one JSON object."""
  return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str) -> Config:
  """The inverse of `to_json`; a field that is not in `text` has its default.

  Raises:
    UserError: it is no configuration, or has fields that this version does not know.
  """
  kinds = {"task": TaskConfig, "eval": EvalConfig}
  try:
    values = json.loads(text)
    unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(Config)})
    if unknown:
      raise UserError(
        f"the stored configuration has unknown fields ({', '.join(unknown)}): "
        "go on with the version of rlft that wrote it"
      )
    for name, kind in kinds.items():
      if name in values:
        values[name] = tuple(kind(**entry) for entry in values[name])
    config = Config(**values)
  except (ValueError, TypeError, AttributeError) as error:
    raise UserError(
      f"the stored configuration cannot be read ({error}): go on with the version of rlft that "
      "wrote it"
    ) from error
  check_fields(config, "stored ")
  return config


def check_resume(stored: Config, current: Config) -> list[str]:
  """Compares a resumed run's settings with those that its checkpoint was written with.

  Args:
    stored: from the checkpoint.
    current: from the flags.

  Returns:
    One 'name: old -> new' for each permitted change, for the log.

  Raises:
    UserError: a setting differs that is part of the policy, of the order of data or of the shape
      of the state.
  """
  refused, permitted = [], []
  for field in dataclasses.fields(Config):
    old, new = getattr(stored, field.name), getattr(current, field.name)
    if old == new or field.name == "workdir":
      continue
    fixed = field.metadata.get("fixed", False)
    if fixed == "switch":
      fixed = bool(old) != bool(new)
    elif fixed and isinstance(old, tuple):
      fixed = [_without_free(entry) for entry in old] != [_without_free(entry) for entry in new]
    (refused if fixed else permitted).append(f"{field.name}: {_shown(old)} -> {_shown(new)}")
  if refused:
    raise UserError(
      f"the run in {current.workdir} was started with other settings ({'; '.join(refused)}): "
      "give the old ones to resume it, or a new --workdir"
    )
  return permitted


def _without_free(entry: TaskConfig | EvalConfig) -> dict[str, Any]:
  """The entry without what a resumed run may change: free keys, and the addresses of servers."""
  fixed = [field.name for field in dataclasses.fields(entry) if not field.metadata.get("free")]
  return {name: _ADDRESS.sub("", str(getattr(entry, name))) for name in fixed}


def _shown(value: Any) -> str:
  """A field's value as on the command line."""
  if not isinstance(value, tuple):
    return str(value)
  entries = (
    ",".join(f"{k}={v}" for k, v in dataclasses.asdict(entry).items() if v != "") for entry in value
  )
  return " ".join(entries) or "none"
