"""Sampling, an update and an iteration of a whole model: the suites, and our side of them."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlft import train
from rlft.config import fields as fields_lib
from rlft.config.settings import Config, TaskConfig
from rlft.diffusion.sampler import image_keys
from rlft.models import stable_diffusion
from rlft.models.stable_diffusion import StableDiffusion
from rlft.performance.benchmark import torch_policy, trl
from rlft.performance.benchmark import work as work_lib
from rlft.performance.benchmark.contest import (
  OURS,
  BenchmarkConfig,
  Contest,
  Side,
  Suite,
  Unavailable,
)
from rlft.performance.benchmark.work import SIZES, Work
from rlft.run import preemption
from rlft.run.open import Run, open_run
from rlft.types import Drawn, TrainState, UserError

# Of a side: parameters, gradients and Adam's moments in float32, and as much for what is computed.
_BYTES_PER_PARAMETER = 2 * 4 * 4
_PREFIX = "rlft-benchmark-"


def suite(what: str) -> Suite:
  """The suite of 'sampling', 'update' or 'iteration'."""
  sides = (OURS, "torch", "torch.compile", "flax")
  return Suite(
    flag="size",
    names=tuple(SIZES),
    sides=(*sides, "trl") if what == "iteration" else sides,
    unit="samples" if what == "update" else "images",
    contest=functools.partial(contest, what),
    cpu_devices=max(size.cpu_devices for size in SIZES.values()),
  )


@contextlib.contextmanager
def contest(what: str, name: str, config: BenchmarkConfig) -> Iterator[Contest]:
  """The contest at one of `SIZES`; the model is in a temporary directory.

  Raises:
    UserError: settings that contradict each other.
  """
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
    model = work_lib.make_model(size, root)
    work = work_lib.make_work(model, root, numbers, config.dtype, devices)
    flops = work_lib.count_flops(model, work)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params["unet"]))
    yield Contest(
      name=name,
      about=_about(what, model, work),
      count=work.batch_size,
      parameters=parameters,
      side_bytes=parameters * _BYTES_PER_PARAMETER,
      sides={
        OURS: lambda: ours(what, work, settings),
        "torch": lambda: torch_policy.side(what, work),
        "torch.compile": lambda: torch_policy.side(what, work, is_compiled=True),
        "flax": lambda: _flax(what, work, settings),
        "trl": lambda: trl.side(work, config.trl_python),
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


def training(what: str, work: Work, settings: Mapping[str, Any]) -> Config:
  """The training that does the work; `settings` have the last word."""
  task = TaskConfig(
    name="benchmark",
    prompts=work_lib.PROMPTS,
    reward=f"jax:{work_lib.__name__}:{work_lib.brightness.__name__}",
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


def ours(what: str, work: Work, settings: Mapping[str, Any]) -> Side:
  """What `launch/train.py` runs: its programs, and for an iteration its whole `run_task`."""
  run = open_run(training(what, work, settings), work.devices)
  state = run.initial_state()
  makers = {"sampling": sampling, "update": update, "iteration": iteration}
  return Side(makers[what](run, state, work), close=run.close)


def draw(run: Run, state: TrainState, work: Work, seed: int) -> Drawn:
  """What a run draws for the work's prompts."""
  weights = run.programs.drawing_weights(state, run.frozen)
  keys = image_keys(jax.random.key(seed), 0, work.batch_size)
  return run.programs.sampler.draw(weights, work.ids, keys)


def sampling(run: Run, state: TrainState, work: Work) -> Callable[[], Any]:
  return lambda: jax.block_until_ready(draw(run, state, work, 0))


def update(run: Run, state: TrainState, work: Work) -> Callable[[], Any]:
  drawn, learning = draw(run, state, work, 0), run.programs.learning
  advantages = learning.normalise(work_lib.brightness(drawn.images), None)
  batch = (drawn.collected, drawn.text, advantages, jnp.isfinite(advantages))
  calls = 0

  def update() -> None:
    nonlocal state, calls
    index = np.array(work.timesteps, np.int32)[calls % len(work.timesteps)][None]
    state, _ = learning.update(state, run.frozen, *batch, index)
    jax.block_until_ready(state)
    calls += 1

  return update


def iteration(run: Run, state: TrainState, work: Work) -> Callable[[], Any]:
  del work
  stop, iteration = preemption.Stop(), 0

  def iterate() -> None:
    nonlocal state, iteration
    state, numbers = train.run_task(run, state, 0, iteration, stop)
    numbers()
    iteration += 1

  return iterate


def _flax(what: str, work: Work, settings: Mapping[str, Any]) -> Side:
  """The Flax UNet of diffusers in our programs."""
  try:
    return ours(what, work, {**settings, "backend": "diffusers"})
  except UserError as error:
    raise Unavailable(str(error)) from error
