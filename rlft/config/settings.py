"""Every setting of a training run: names, defaults (the paper's), meaning and range.

A run's settings come in parts, so that a function is given the part that it needs. A field carries
its help text, its range and whether a resumed run may change it; the flags (rlft/config/flags.py),
the check of ranges and the comparison on resume (rlft/config/stored.py) are all made from these.
What depends on several fields, on files or on devices is checked in rlft/run/checks.py.
"""

import dataclasses

from rlft.config.fields import option

EMOJI = "emoji"  # the renderer, in the place of a folder of images with captions
EMOJI_SD = "emoji-sd"  # the name of the shipped checkpoint, in the place of a directory
_SEED_LIMIT = 2**32  # jax.random.key drops higher bits


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  """A reward and the prompts on which it is maximised."""

  name: str = option("used in metric names")
  prompts: str = option(
    "emoji:TASK/SPLIT, records:DIRECTORY/SPLIT, tfds:NAME/SPLIT or a file; a part of one as"
    " SOURCE[:-2000] or SOURCE[heldout], or several as NUMBER*SOURCE + NUMBER*SOURCE"
  )
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
  prompts: str = option(
    "emoji:TASK/SPLIT, records:DIRECTORY/SPLIT, tfds:NAME/SPLIT or a file; or a part of one"
  )
  metric: str = option("a reward's name or an oracle's")
  images: int = option("images in all", 256, least=2)
  images_per_prompt: int = option("images drawn for each prompt", 1, least=1)
  development: str = option(
    "other prompts of the same kind, on which the base model's guidance is chosen when runs are"
    " compared with it",
    "",
    free=True,
  )
  guard: bool = option("not to be improved, but not to become worse", False, free=True)
  base_guidance: float = option(
    "guidance at which the base model is best in this metric, chosen on development prompts; a run"
    " measures it there, too, as the row to beat; 0 leaves that out",
    0.0,
    least=0,
    free=True,
  )


@dataclasses.dataclass(frozen=True)
class PolicySettings:
  """How images are drawn, in sampling and in training, and which weights are trained."""

  scheduler: str = option(
    "KEY=VALUE,...: options in the place of those in the model's scheduler_config.json, e.g."
    " timestep_spacing=trailing",
    "",
    fixed=True,
  )
  image_size: str = option(
    "height and width of the images in pixels, e.g. 512 or 512x768; the model's own if empty",
    "",
    fixed=True,
  )
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
  lora_rank: int = option("rank of LoRA; 0 trains the full UNet", 0, least=0, fixed=True)
  init_lora: str = option(
    "safetensors file with a LoRA of PEFT, diffusers or Kohya to start from; its rank is taken",
    "",
    path=True,
    fixed=True,
  )
  lora_alpha: float = option("LoRA's scale times rank; 0 means the rank", 0.0, least=0, fixed=True)


# Other defaults of the run's settings by the name of an algorithm: what its source has, where that
# differs. The table of arXiv 2401.12244 for what it compares with; for DDPO its authors' code.
_PRESETS = {
  "ddpo": {
    "advantage": "prompt",
    "accumulate_timesteps": True,
    "train_timesteps": 0,
    "learning_rate": 1e-5,
  },
  "dpok": {"kl_weight": 0.01},
  "draft": {"learning_rate": 5e-5, "lora_rank": 32, "pretrain_weight": 0.0},
  "raft": {"learning_rate": 3e-6},
  "refl": {"learning_rate": 1e-5, "sampling_steps": 40},
  "reward-weighted": {"learning_rate": 1e-5, "pretrain_weight": 0.5},
}


@dataclasses.dataclass(frozen=True)
class AlgorithmSettings:
  """How the model learns from scored images.

  The fields below `algorithm` are parameters of algorithms: each takes those that its factory
  names, and one that is changed though the algorithm has no use for it is refused. Some algorithms
  have other defaults, of these fields and of other parts.
  """

  algorithm: str = option(
    "how scored images change the model, with options of its own as 'NAME?key=value&key=value':"
    " policy-gradient (the paper), ddpo (statistics for each prompt, one update on all timesteps),"
    " dpok (KL divergence to the base model), reward-weighted (denoising loss on images, weighted"
    " by reward), raft (denoising loss on the best images), refl or draft (the reward's own"
    " gradient, through one of the last steps or the last)",
    "policy-gradient",
    fixed=True,
    presets=_PRESETS,
  )
  train_timesteps: int = option(
    "timesteps trained per iteration, drawn at random; 0 for all", 5, least=0
  )
  accumulate_timesteps: bool = option(
    "one optimizer update over all trained timesteps (DDPO) instead of one for each", False
  )
  clip_range: float = option(
    "clip range of the ratio, for a log-probability averaged over the latents' dimensions: fits the"
    " 16,384 of 512 x 512 pixels; it should fall as one over the root of their number",
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
  ratio_tolerance: float = option(
    "stop if the ratio before an iteration's first update is further from 1", 1e-5, above=0
  )


@dataclasses.dataclass(frozen=True)
class PretrainingSettings:
  """The loss that keeps the pictures good, in a step of its own after the tasks of an iteration.

  The authors' code sums the policy's loss over the 16 images of a device where ours is a mean. With
  the same weight, their policy gradient is 16 times as large beside the pretraining loss. Adam sees
  only the ratio of the two.
  """

  pretrain_weight: float = option(
    "weight of the pretraining loss, 0 is off; the policy's loss is a mean over images where the"
    " authors of the paper sum the 16 of a device, so that 0.0625 has the ratio of their 1",
    1.0,
    least=0,
  )
  pretrain_data: str = option(
    "emoji, or a folder of images with metadata.jsonl", "", path=True, fixed=True
  )
  pretrain_batch_size: int = option(
    "images per pretraining step, over all devices", 2048, least=1, fixed=True
  )


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """AdamW, and the average of the weights."""

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


@dataclasses.dataclass(frozen=True)
class DeviceSettings:
  """Numbers in which the networks compute, and how the work is spread and cut."""

  compute_dtype: str = option(
    "of the UNet's products; latents and log-probabilities stay float32",
    "bfloat16",
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
  compilation_cache: str = option(
    "directory, or gs://BUCKET/..., that keeps compiled programs for the next run with the same"
    " ones; off keeps none; if empty, what JAX_COMPILATION_CACHE_DIR says, or"
    " ~/.cache/rlft/programs",
    "",
  )


@dataclasses.dataclass(frozen=True)
class ScoringSettings:
  """How rewards and metrics are called."""

  reward_timeout_s: float = option(
    "deadline in seconds for a batch of host rewards", 300.0, above=0
  )
  reward_threads: int = option("threads for host rewards on each process", 8, least=1)
  max_nan_share: float = option(
    "stop if more than this share of a batch could not be scored", 0.1, least=0, most=1
  )


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
  """When and with which noise the evaluations are made, and what they keep."""

  eval_every: int = option("iterations between evaluations; 0: before and after", 0, least=0)
  eval_seed: int = option(
    "seed of the evaluations' noise", 1000, least=0, below=_SEED_LIMIT, fixed=True
  )
  report_images: int = option("prompts of each task in the report's grids", 8, least=0)


@dataclasses.dataclass(frozen=True)
class OutputSettings:
  """Where and when the state is saved."""

  workdir: str = option(
    "directory, or gs://BUCKET/..., for checkpoints, metrics and the report", "", path=True
  )
  checkpoint_every: int = option(
    "iterations between checkpoints; 0: only at the end and on SIGTERM", 10, least=0
  )
  keep_checkpoints: int = option("newest checkpoints kept", 2, least=1)
  tracker: str = option(
    "where metrics, evaluations and pictures go while the run goes on, beside its own files;"
    " TensorBoard's are in its tensorboard/, wandb is to be installed and logged in to",
    "tensorboard",
    choices=("tensorboard", "wandb", "tensorboard+wandb", "none"),
  )


@dataclasses.dataclass(frozen=True)
class Config:
  """A training run. Defaults are those of arXiv 2401.12244, where it gives them."""

  pretrained: str = option(
    "the model to fine-tune: a directory in the diffusers layout, org/name@revision of the Hugging"
    f" Face hub, MODEL.safetensors?tokenizer=FOLDER, or {EMOJI_SD}",
    "",
    path=True,
  )
  task: tuple[TaskConfig, ...] = option("what to maximise", (), fixed=True)
  eval: tuple[EvalConfig, ...] = option("what to measure before and after", (), fixed=True)
  seed: int = option(
    "seed of prompts, noise and timesteps", 0, least=0, below=_SEED_LIMIT, fixed=True
  )
  iterations: int = option("iterations of sampling, scoring and updating", 1000, least=1)
  policy: PolicySettings = PolicySettings()
  algorithm: AlgorithmSettings = AlgorithmSettings()
  pretraining: PretrainingSettings = PretrainingSettings()
  optimizer: OptimizerSettings = OptimizerSettings()
  devices: DeviceSettings = DeviceSettings()
  scoring: ScoringSettings = ScoringSettings()
  evaluation: EvaluationSettings = EvaluationSettings()
  output: OutputSettings = OutputSettings()
