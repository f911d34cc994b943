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

  name: str = option("a short name, used in the names of metrics")
  prompts: str = option(
    "a file, emoji:TASK/SPLIT, paper:NAME/SPLIT, records:DIRECTORY/SPLIT or tfds:NAME/SPLIT; part"
    " of a source as SOURCE[:-2000] or SOURCE[heldout]; a mixture as NUMBER*SOURCE + NUMBER*SOURCE"
  )
  reward: str = option(
    "the reward to maximise, or a weighted sum 'NUMBER*NAME + NUMBER*NAME' of rewards that are each"
    " normalised over the batch"
  )
  batch_size: int = option("images per iteration, over all devices", 2048, least=2)
  images_per_prompt: int = option("images drawn for each prompt", 1, least=1)
  veto: str = option(
    "a condition NAME>=NUMBER or NAME<=NUMBER: images that fail it score less than all others", ""
  )
  watch: str = option(
    "the judge: a reward or oracle that is measured on the same images and never trained on",
    "",
    free=True,
  )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """A held-out measurement: the same prompts and seeds every time."""

  name: str = option("a short name, used in the names of metrics")
  prompts: str = option("a source of prompts or part of one, as for a task; no mixture")
  metric: str = option("a reward or an oracle")
  images: int = option(
    "images in total: the first prompts of the source are used, again from the start if they are"
    " too few",
    256,
    least=2,
  )
  images_per_prompt: int = option("images drawn for each prompt", 1, least=1)
  development: str = option(
    "development prompts of the same kind: launch/compare.py chooses the base model's guidance"
    " scale on them",
    "",
    free=True,
  )
  guard: bool = option(
    "true if the metric should not become worse, but is not meant to improve", False, free=True
  )
  base_guidance: float = option(
    "the guidance scale at which the base model is best in this metric, chosen on development"
    " prompts; the run measures the base model there as well, as the row to beat; 0 leaves it out",
    0.0,
    least=0,
  )


@dataclasses.dataclass(frozen=True)
class PolicySettings:
  """How images are drawn, in sampling and in training, and which weights are trained."""

  scheduler: str = option(
    "KEY=VALUE,... that replace options of the model's scheduler_config.json, e.g."
    " timestep_spacing=trailing",
    "",
    fixed=True,
  )
  image_size: str = option(
    "height x width of the images in pixels, e.g. 512 or 512x768; if empty, the model's own",
    "",
    fixed=True,
  )
  sampling_steps: int = option("DDIM steps per image", 50, least=1, most=1000, fixed=True)
  guidance_scale: float = option(
    "scale of classifier-free guidance, in sampling and in training; 1 is no guidance",
    7.0,
    above=0,
    fixed=True,
  )
  eta: float = option(
    "noise of the DDIM steps: 1 is as much as DDPM; at 0 no step would be random, and nothing could"
    " be learned",
    1.0,
    above=0,
    most=1,
    fixed=True,
  )
  lora_rank: int = option(
    "rank of the LoRA that is trained; 0 trains the full UNet", 0, least=0, fixed=True
  )
  init_lora: str = option(
    "safetensors file of a LoRA (PEFT, diffusers or Kohya) to start from; the run has its rank",
    "",
    path=True,
    fixed=True,
  )
  lora_alpha: float = option(
    "alpha of the LoRA, whose output is scaled by alpha / rank; 0: alpha is the rank",
    0.0,
    least=0,
    fixed=True,
  )


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
    "how the model learns from scored images; options of the algorithm follow its name, as"
    " 'NAME?key=value&key=value' (docs/which_algorithm.md): policy-gradient (the paper's), ddpo"
    " (advantages by prompt, one update on all timesteps), dpok (KL divergence to the base model),"
    " reward-weighted (denoising loss on the images, weighted by reward), raft (denoising loss on"
    " the best images), refl and draft (the reward's own gradient, through one of the last steps)",
    "policy-gradient",
    fixed=True,
    presets=_PRESETS,
  )
  train_timesteps: int = option(
    "timesteps of each trajectory that an iteration trains on, drawn at random; 0: all",
    5,
    least=0,
  )
  accumulate_timesteps: bool = option(
    "one optimizer update over all trained timesteps (DDPO) instead of one for each timestep", False
  )
  clip_range: float = option(
    "the ratio is clipped to 1 +- this. Log-probabilities are means over the D numbers of a latent,"
    " so use about 1e-4 * sqrt(16384 / D): 1e-4 at 512 x 512 pixels, 5e-5 at 1024 x 1024",
    1e-4,
    above=0,
    below=1,
  )
  advantage: str = option(
    "what a reward is normalised over: the task's batch, the history of its prompt, or the group of"
    " the prompt's images in this iteration",
    "batch",
    choices=("batch", "prompt", "group"),
    fixed=True,
  )
  advantage_clip: float = option("advantages are cut to +- this", 10.0, above=0)
  prompt_history: int = option(
    "with --advantage=prompt: how many of a prompt's newest rewards are kept",
    32,
    least=2,
    fixed=True,
  )
  prompt_history_min: int = option(
    "with --advantage=prompt: a prompt with fewer rewards than this uses the batch's statistics",
    16,
    least=2,
  )
  kl_weight: float = option(
    "weight of the KL divergence to the base model in the loss", 0.0, least=0
  )
  ratio_tolerance: float = option(
    "stop if, before a task's first update, a ratio is further from 1 than this", 1e-5, above=0
  )


@dataclasses.dataclass(frozen=True)
class PretrainingSettings:
  """The loss that keeps the pictures good, in a step of its own after the tasks of an iteration.

  The authors' code sums the policy's loss over the 16 images of a device; ours is their mean. So at
  the same weight, their policy gradient is 16 times as large relative to the pretraining loss. Adam
  sees only the ratio of the two.
  """

  pretrain_weight: float = option(
    "weight of the pretraining loss, 0 is off; the paper's code sums the policy's loss over the 16"
    " images of a device where rlft takes their mean, so its weight of 1 is 0.0625 here",
    1.0,
    least=0,
  )
  pretrain_data: str = option(
    "pictures for the pretraining loss: a folder of images with a metadata.jsonl, or emoji (the"
    " miniature's own)",
    "",
    path=True,
    fixed=True,
  )
  pretrain_batch_size: int = option(
    "images per pretraining step, over all devices", 2048, least=1, fixed=True
  )


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """AdamW, and the average of the weights."""

  learning_rate: float = option("learning rate of AdamW, constant", 2e-6, above=0)
  adam_b1: float = option(
    "Adam's beta 1: decay of the gradient's running mean", 0.9, least=0, below=1
  )
  adam_b2: float = option(
    "Adam's beta 2: decay of the running mean of the gradient's square", 0.999, least=0, below=1
  )
  adam_eps: float = option("Adam's epsilon, in the denominator", 1e-8, above=0)
  weight_decay: float = option("decoupled weight decay of AdamW", 1e-2, least=0)
  max_grad_norm: float = option(
    "gradients are clipped to this global norm; 0: not clipped", 1.0, least=0, fixed="switch"
  )
  ema_decay: float = option(
    "decay of the averaged weights (EMA), updated once an iteration and used for evaluation and"
    " export; 0 is off",
    0.0,
    least=0,
    below=1,
    fixed="switch",
  )
  param_dtype: str = option(
    "type of the trained parameters; with bfloat16 the optimizer's state keeps a float32 copy",
    "float32",
    choices=("float32", "bfloat16"),
    fixed=True,
  )
  moments_dtype: str = option(
    "type of Adam's moments; bfloat16, with stochastic rounding, halves their memory",
    "float32",
    choices=("float32", "bfloat16"),
    fixed=True,
  )


@dataclasses.dataclass(frozen=True)
class DeviceSettings:
  """Numbers in which the networks compute, and how the work is spread and cut."""

  compute_dtype: str = option(
    "type that the UNet computes in; latents and log-probabilities stay float32",
    "bfloat16",
    choices=("float32", "bfloat16"),
    fixed=True,
  )
  remat: bool = option("recompute activations in the backward pass to save memory", True)
  microbatch: int = option(
    "images at once on each device, in sampling and in training; 0: all of them, but 8 to 16 on"
    " CPUs in float32",
    0,
    least=0,
    fixed=True,
  )
  decode_chunk: int = option("images at once on each device in the VAE; 0: all", 0, least=0)
  attention: str = option(
    "kernel of the UNet's attention; auto takes the fastest one that the device has",
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
    "on CPUs: split the machine into this many devices. One device per core is faster for small"
    " networks, a single device from some 50 M parameters on; 0: JAX's default, one device",
    0,
    least=0,
  )
  fsdp: int = option(
    "number of shards of parameters, gradients and optimizer state; must divide the number of"
    " devices",
    1,
    least=1,
  )
  compilation_cache: str = option(
    "directory, or gs://BUCKET/..., in which compiled programs are kept for later runs; off keeps"
    " none; if empty, $JAX_COMPILATION_CACHE_DIR or else ~/.cache/rlft/programs",
    "",
  )


@dataclasses.dataclass(frozen=True)
class ScoringSettings:
  """How rewards and metrics are called."""

  reward_timeout_s: float = option(
    "deadline, in seconds, in which a host or remote reward must score a batch", 300.0, above=0
  )
  reward_threads: int = option("threads of each process for host rewards", 8, least=1)
  max_nan_share: float = option(
    "stop if the reward returns NaN for more than this share of a batch", 0.1, least=0, most=1
  )


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
  """When and with which noise the evaluations are made, and what they keep."""

  eval_every: int = option(
    "iterations between evaluations; 0: only before and after the run", 0, least=0
  )
  eval_seed: int = option(
    "seed of the evaluations' noise", 1000, least=0, below=_SEED_LIMIT, fixed=True
  )
  report_images: int = option(
    "prompts of each evaluation whose pictures the report shows", 8, least=0
  )


@dataclasses.dataclass(frozen=True)
class OutputSettings:
  """Where and when the state is saved."""

  workdir: str = option(
    "directory, or gs://BUCKET/..., for checkpoints, metrics and the report", "", path=True
  )
  checkpoint_every: int = option(
    "iterations between checkpoints; 0: only before an evaluation, at the end and when the run is"
    " stopped",
    10,
    least=0,
  )
  keep_checkpoints: int = option("how many of the newest checkpoints are kept", 2, least=1)
  tracker: str = option(
    "where metrics, evaluations and pictures go during the run, beside the run's own files;"
    " TensorBoard's files are in WORKDIR/tensorboard, wandb must be installed and logged in to",
    "tensorboard",
    choices=("tensorboard", "wandb", "tensorboard+wandb", "none"),
  )


@dataclasses.dataclass(frozen=True)
class Config:
  """A training run. Defaults are those of arXiv 2401.12244, where it gives them."""

  pretrained: str = option(
    "the model to fine-tune: a directory in the diffusers layout, org/name@revision on the Hugging"
    f" Face hub, MODEL.safetensors?tokenizer=FOLDER, or {EMOJI_SD} (docs/your_model.md)",
    "",
    path=True,
  )
  task: tuple[TaskConfig, ...] = option(
    "what to maximise; may be given several times", (), fixed=True
  )
  eval: tuple[EvalConfig, ...] = option(
    "what to measure on held-out prompts; may be given several times", (), fixed=True
  )
  seed: int = option(
    "seed of prompts, noise and timesteps", 0, least=0, below=_SEED_LIMIT, fixed=True
  )
  iterations: int = option("iterations, each of sampling, scoring and updating", 1000, least=1)
  policy: PolicySettings = PolicySettings()
  algorithm: AlgorithmSettings = AlgorithmSettings()
  pretraining: PretrainingSettings = PretrainingSettings()
  optimizer: OptimizerSettings = OptimizerSettings()
  devices: DeviceSettings = DeviceSettings()
  scoring: ScoringSettings = ScoringSettings()
  evaluation: EvaluationSettings = EvaluationSettings()
  output: OutputSettings = OutputSettings()
