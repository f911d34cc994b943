"""Sampling and training of a whole model: the work, the same for all sides, and our side.

    sampling   from token ids to images, with the trajectory and its log-probabilities
    update     one clipped policy-gradient step of AdamW on one timestep of every image
    iteration  sampling, a trivial reward, gradients at K timesteps, one step on their sum

Every side reads the same model from a directory in the diffusers layout: the shipped miniature, or
another size with random weights.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import pathlib
import tempfile
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlft import train
from rlft.config import fields as fields_lib
from rlft.config.settings import Config, TaskConfig
from rlft.diffusion import sampler as sampler_lib
from rlft.models import architectures, clip, stable_diffusion, unet, vae
from rlft.models import text as text_lib
from rlft.models.files import pretrained
from rlft.models.stable_diffusion import StableDiffusion
from rlft.performance.benchmark import contest as benchmark
from rlft.performance.compile import hlo
from rlft.run import open as run_lib
from rlft.run import preemption
from rlft.run import state as state_lib
from rlft.types import UserError

PROMPTS = "emoji:pair/train"
# Of a side: parameters, gradients and Adam's moments in float32, and as much for what is computed.
_BYTES_PER_PARAMETER = 2 * 4 * 4
_PREFIX = "rlft-benchmark-"


@dataclasses.dataclass(frozen=True)
class Size:
  """A model and the work that is usual for it.

  Attributes:
    architecture: makes the description of the model; None is the shipped miniature.
    batch_size: images in a call.
    sampling_steps: T.
    guidance_scale: 1 is none.
    train_timesteps: K of an iteration.
    cpu_devices: into which our side splits a CPU.
  """

  architecture: Callable[[], architectures.Architecture] | None
  batch_size: int
  sampling_steps: int
  guidance_scale: float
  train_timesteps: int
  cpu_devices: int = 2


@dataclasses.dataclass(frozen=True)
class Work:
  """What each side does in a call.

  Attributes:
    model: directory in the diffusers layout.
    scratch: a directory to write to.
    devices: of our side.
    batch_size, sampling_steps, guidance_scale, train_timesteps: see `Size`.
    dtype: type that the UNet computes in.
    ids: `[B, E, L]` int32 tokens of the prompts.
    empty: `[E, L]` int32 tokens of the empty prompt.
    timesteps: positions in the schedule, each trained in a call of `update` in turn, and all of
      them in an iteration (but by ours and TRL, which draw as many).
    prompts: the texts.
  """

  model: pathlib.Path
  scratch: pathlib.Path
  devices: int
  batch_size: int
  sampling_steps: int
  guidance_scale: float
  train_timesteps: int
  dtype: str
  ids: np.ndarray
  empty: np.ndarray
  timesteps: tuple[int, ...]
  prompts: tuple[str, ...]


def random_architecture(
  channels: tuple[int, ...],
  attend: tuple[bool, ...],
  heads: int,
  features: int,
  sample_size: int,
) -> architectures.Architecture:
  """A UNet with a resnet at each level, and a small VAE and text encoder; 77 tokens."""
  return architectures.Architecture(
    unet=unet.UNetConfig(
      sample_size=sample_size,
      block_out_channels=channels,
      down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attend),
      up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attend)),
      layers_per_block=1,
      attention_head_dim=heads,
      cross_attention_dim=features,
      use_linear_projection=True,
    ),
    vae=vae.VAEConfig(
      down_block_types=("DownEncoderBlock2D",) * 3,
      up_block_types=("UpDecoderBlock2D",) * 3,
      block_out_channels=(24, 48, 64),
      layers_per_block=1,
      norm_num_groups=8,
      sample_size=4 * sample_size,
    ),
    texts=(
      clip.CLIPTextConfig(
        vocab_size=813,
        hidden_size=features,
        intermediate_size=2 * features,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=811,
        eos_token_id=812,
      ),
    ),
    scheduler=architectures.get("sd2.1").scheduler,
  )


def _small() -> architectures.Architecture:
  return random_architecture((64, 128), (True, False), heads=4, features=128, sample_size=8)


def _medium() -> architectures.Architecture:
  channels, attend = (128, 256, 512), (True, True, False)
  return random_architecture(channels, attend, heads=8, features=256, sample_size=16)


def _published(name: str) -> Size:
  return Size(functools.partial(architectures.get, name), 8, 10, 7.0, 2, cpu_devices=1)


SIZES: Mapping[str, Size] = types.MappingProxyType(
  {
    "miniature": Size(None, 64, 10, 1.0, 5),
    "small": Size(_small, 128, 20, 5.0, 5),
    # Of two devices each would read all weights, and take the whole step of the optimizer.
    "medium": Size(_medium, 8, 10, 5.0, 3, cpu_devices=1),
    **{name: _published(name) for name in ("sd1.5", "sd2-base", "sdxl-base")},
  }
)


def suite(what: str) -> benchmark.Suite:
  """The suite of 'sampling', 'update' or 'iteration'."""
  sides = (benchmark.OURS, "torch", "torch.compile", "flax")
  return benchmark.Suite(
    flag="size",
    names=tuple(SIZES),
    sides=(*sides, "trl") if what == "iteration" else sides,
    unit="samples" if what == "update" else "images",
    contest=functools.partial(contest, what),
    cpu_devices=max(size.cpu_devices for size in SIZES.values()),
  )


@contextlib.contextmanager
def contest(what: str, name: str, config: benchmark.BenchmarkConfig) -> Iterator[benchmark.Contest]:
  """The contest at one of `SIZES`; the model is in a temporary directory.

  Raises:
    UserError: settings that contradict each other.
  """
  from rlft.performance.benchmark import torch_policy as benchmark_diffusers
  from rlft.performance.benchmark import trl as benchmark_trl

  settings = parse_settings(config.settings)
  size = SIZES[name]
  given = ("batch_size", "sampling_steps", "guidance_scale", "train_timesteps")
  numbers = {field: getattr(config, field) or getattr(size, field) for field in given}
  if numbers["train_timesteps"] > numbers["sampling_steps"]:
    raise UserError(
      f"--train_timesteps={numbers['train_timesteps']} is more than"
      f" --sampling_steps={numbers['sampling_steps']}: train at most as many as are sampled"
    )
  devices = jax.device_count()
  if jax.default_backend() == "cpu":
    devices = config.cpu_devices or size.cpu_devices
  if numbers["batch_size"] % devices:
    raise UserError(
      f"--batch_size={numbers['batch_size']} cannot be spread over {devices} devices: choose a"
      " multiple"
    )
  with tempfile.TemporaryDirectory(prefix=_PREFIX) as scratch:
    root = pathlib.Path(scratch)
    model = _model(size, root)
    work = _work(model, root, numbers, config.dtype, devices)
    flops = count_flops(model, work)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params["unet"]))
    yield benchmark.Contest(
      name=name,
      about=_about(what, model, work),
      count=work.batch_size,
      parameters=parameters,
      side_bytes=parameters * _BYTES_PER_PARAMETER,
      sides={
        benchmark.OURS: lambda: ours(what, work, settings),
        "torch": lambda: benchmark_diffusers.side(what, work),
        "torch.compile": lambda: benchmark_diffusers.side(what, work, is_compiled=True),
        "flax": lambda: _flax(what, work, settings),
        "trl": lambda: benchmark_trl.side(work, config.trl_python),
      },
      flops=flops[what],
    )


def _about(what: str, model: StableDiffusion, work: Work) -> str:
  """The work in words."""
  height, width, _ = stable_diffusion.latent_shape(model)
  guidance = f"guidance {work.guidance_scale:g}" if work.guidance_scale != 1.0 else "no guidance"
  words = [
    f"{work.batch_size} images",
    f"latents of {height} x {width}",
    f"{work.ids.shape[-1]} tokens",
    f"{work.sampling_steps} steps",
    guidance,
  ]
  if what == "iteration":
    words.append(f"{work.train_timesteps} timesteps trained")
  return ", ".join([*words, work.dtype])


def parse_settings(text: str) -> dict[str, Any]:
  """'key=value,...' as fields of `Config`; raises `UserError`."""
  leaves = fields_lib.leaves(Config)
  found: dict[str, Any] = {}
  for entry in filter(None, text.split(",")):
    key, _, value = entry.partition("=")
    if key not in leaves or leaves[key].type not in (str, int, float, bool):
      near = fields_lib.suggestion(key, leaves, "see launch/train.py --help")
      raise UserError(f"--settings={entry}: no setting of a training is called {key}: {near}")
    try:
      found[key] = fields_lib.convert(value, leaves[key].type)
    except ValueError as error:
      raise UserError(f"--settings={entry} {error}") from error
  return found


def _model(size: Size, root: pathlib.Path) -> StableDiffusion:
  """The model of a size; writes it below `root` if it is not the shipped one."""
  if size.architecture is None:
    return pretrained.load(pretrained.EMOJI_SD)
  model = architectures.build(size.architecture())
  tokenizers = pretrained.load(pretrained.EMOJI_SD).tokenizers * len(model.text_encoders)
  for tokenizer in tokenizers:
    tokenizer.model_max_length = model.text_encoders[0].config.max_position_embeddings
  params = {
    name: architectures.random_params(shapes, seed)
    for seed, (name, shapes) in enumerate(model.params.items())
  }
  model = dataclasses.replace(model, tokenizers=tokenizers, params=params)
  pretrained.save(root / "model", model)
  return model


def _work(
  model: StableDiffusion,
  root: pathlib.Path,
  numbers: Mapping[str, Any],
  dtype: str,
  devices: int,
) -> Work:
  from rlft.catalog import load_prompts

  texts = [prompt.text for prompt in load_prompts(PROMPTS)[: numbers["batch_size"]]]
  texts = [texts[i % len(texts)] for i in range(numbers["batch_size"])]
  steps, count = numbers["sampling_steps"], numbers["train_timesteps"]
  written = root / "model"
  return Work(
    model=written if written.exists() else pretrained.EMOJI_SD_PATH,
    scratch=root,
    devices=devices,
    dtype=dtype,
    ids=model.tokenize(texts)[0],
    empty=model.tokenize([""])[0][0],
    timesteps=tuple(np.linspace(0, steps - 1, count).round().astype(int).tolist()),
    prompts=tuple(texts),
    **numbers,
  )


def count_flops(model: StableDiffusion, work: Work) -> dict[str, float]:
  """Of a call of each suite, as the networks define them: a gradient is three forward passes.

  What a side computes twice, or spares itself, plays no part.
  """
  params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), dict(model.params))
  size, shape = stable_diffusion.image_size(model), (1, *stable_diffusion.latent_shape(model))
  ids = jax.ShapeDtypeStruct((1, *work.ids.shape[1:]), jnp.int32)
  latents = jax.ShapeDtypeStruct(shape, jnp.float32)

  def encode(params, ids):
    return text_lib.encode(model, params, ids, size)

  def denoise(params, latents, text):
    return model.unet.apply({"params": params}, latents, jnp.zeros(1, jnp.int32), text)

  def decode(params, latents):
    return stable_diffusion.decode(model, params, latents)

  def count(function, *args):
    return hlo.flops(jax.make_jaxpr(function)(*args))

  text = jax.eval_shape(encode, params, ids)
  forward = count(denoise, params["unet"], latents, text)
  forward *= work.batch_size * (1 if work.guidance_scale == 1.0 else 2)
  others = count(encode, params, ids) + count(decode, params["vae"], latents)
  sampling = work.sampling_steps * forward + work.batch_size * others
  update = 3 * forward
  return {
    "sampling": sampling,
    "update": update,
    "iteration": sampling + work.train_timesteps * update,
  }


# ---------------------------------------------------------------------------- our side


def brightness(images: jax.Array) -> jax.Array:
  """The trivial reward, `[B]`: the mean of an image's pixels."""
  return images.mean(axis=(1, 2, 3))


def training(what: str, work: Work, settings: Mapping[str, Any]) -> Config:
  """The training that does the work; `settings` have the last word."""
  task = TaskConfig(
    name="benchmark",
    prompts=PROMPTS,
    reward=f"jax:{__name__}:{brightness.__name__}",
    batch_size=work.batch_size,
  )
  options: dict[str, Any] = {
    "pretrained": str(work.model),
    "workdir": str(work.scratch / f"run_{settings.get('backend', 'rlft')}"),
    "task": (task,),
    "sampling_steps": work.sampling_steps,
    "guidance_scale": work.guidance_scale,
    "train_timesteps": work.train_timesteps,
    "accumulate_timesteps": what == "iteration",  # TRL knows no other way.
    "compute_dtype": work.dtype,
    "pretrain_weight": 0.0,
    "remat": False,
    "ratio_tolerance": 1.0,  # Nothing is learnt here.
  }
  return fields_lib.make(Config, **(options | settings))


def ours(what: str, work: Work, settings: Mapping[str, Any]) -> benchmark.Side:
  """What `launch/train.py` runs: its programs, and for an iteration its whole `run_task`."""
  config = training(what, work, settings)
  run = run_lib.open_run(config, work.devices)
  optimizer = state_lib.optimizer_of(config)
  programs = train.make_programs(config, run.model, run.schedule, optimizer, run.mesh)
  state = state_lib.initial_state(run, optimizer)
  makers = {"sampling": sampling, "update": update, "iteration": iteration}
  return benchmark.Side(makers[what](run, programs, state, work), close=run.close)


def rollout(run: run_lib.Run, state: state_lib.TrainState, work: Work, seed: int) -> Any:
  """What `Sampler.rollout` returns for the work's prompts."""
  weights = state_lib.sampling_weights(run.config, state.params, run.frozen)
  keys = sampler_lib.image_keys(jax.random.key(seed), 0, work.batch_size)
  return run.sampler.rollout(weights, work.ids, keys)


def sampling(
  run: run_lib.Run, programs: train.Programs, state: state_lib.TrainState, work: Work
) -> Callable[[], Any]:
  del programs
  return lambda: jax.block_until_ready(rollout(run, state, work, 0))


def update(
  run: run_lib.Run, programs: train.Programs, state: state_lib.TrainState, work: Work
) -> Callable[[], Any]:
  path, images, text = rollout(run, state, work, 0)
  advantages = programs.advantages(brightness(images), None)
  mask = jnp.isfinite(advantages)
  calls = 0

  def update() -> None:
    nonlocal state, calls
    index = np.array(work.timesteps, np.int32)[calls % len(work.timesteps)][None]
    state, _ = programs.update(state, run.frozen, path, text, advantages, mask, index)
    jax.block_until_ready(state)
    calls += 1

  return update


def iteration(
  run: run_lib.Run, programs: train.Programs, state: state_lib.TrainState, work: Work
) -> Callable[[], Any]:
  del work
  stop, iteration = preemption.Stop(), 0

  def iterate() -> None:
    nonlocal state, iteration
    state, _ = train.run_task(run, programs, state, 0, iteration, stop)
    jax.block_until_ready(state)
    iteration += 1

  return iterate


def _flax(what: str, work: Work, settings: Mapping[str, Any]) -> benchmark.Side:
  """The Flax UNet of diffusers in our programs."""
  try:
    return ours(what, work, {**settings, "backend": "diffusers"})
  except UserError as error:
    raise benchmark.Unavailable(str(error)) from error
