"""A training's own programs on the devices that are here, with random weights."""

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from rlft.config import fields
from rlft.config.settings import Config, TaskConfig
from rlft.diffusion.sampler import image_keys
from rlft.models import architectures
from rlft.models.stable_diffusion import StableDiffusion
from rlft.parallel import sharding
from rlft.performance.accelerator.scales import Model
from rlft.performance.benchmark import work as work_lib
from rlft.performance.benchmark.work import Work
from rlft.performance.compile import hlo
from rlft.performance.compile.abstract_run import AbstractRun, Call
from rlft.run.programs import kept_parameters
from rlft.run.state import initial_state
from rlft.types import Guidance, TrainState, Trajectory

GUIDANCE = 7.0


def settings(model: Model, timesteps: int, **changes: Any) -> Config:
  """The training of a model: the paper's algorithm without a pretraining loss."""
  task = TaskConfig("accelerator", prompts="-", reward="-", batch_size=model.images)
  found = {
    "task": (task,),
    "sampling_steps": model.steps,
    "guidance_scale": GUIDANCE,
    "train_timesteps": timesteps,
    "pretrain_weight": 0.0,
    "lora_rank": model.lora_rank,
    "microbatch": model.microbatch,
    "decode_chunk": model.decode_chunk,
  }
  return fields.make(Config, **(found | changes))


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    call: the program with the shapes of its arguments.
    run: it; takes no static arguments.
    memory: what XLA says of it.
    seconds: that compiling it took, beside others.
    needed: bytes on a device while it runs, as `launch/compile.py` says it.
  """

  call: Call
  run: Callable[..., Any]
  memory: Any
  seconds: float
  needed: int


class Training:
  """The programs of an iteration of the paper's algorithm, compiled, and what they are given.

  Attributes:
    config: the settings.
    run: the same in shapes.
    state: of the last update.
    frozen: parameters that no update changes.
    programs: 'encode', 'sample' and 'update'.
  """

  def __init__(self, config: Config, model: Model, *, mesh: Mesh | None = None):
    """Makes weights on the mesh, by default the first device; `compile` follows."""
    mesh = mesh or sharding.make_mesh(1, 1)
    self._model = model
    self._take(config, mesh)
    params = {
      name: sharding.place(mesh, architectures.random_params(shapes, seed))
      for seed, (name, shapes) in enumerate(self.run.model.params.items())
    }
    programs = self.run.programs
    self.frozen = kept_parameters(config, programs.algorithm, params)
    self.state: TrainState = initial_state(
      config, programs.learner.optimizer, mesh, params["unet"], is_kept="unet" in self.frozen
    )

  def _take(self, config: Config, mesh: Mesh) -> None:
    self.config = config
    self.run = AbstractRun.of(config, mesh, described(self._model, config))
    self.programs: dict[str, Program] = {}
    self._updates = 0

  def change(self, **changes: Any) -> None:
    """Keeps the weights and changes settings; `compile` follows."""
    self._take(fields.replace(self.config, **changes), self.run.mesh)

  def compile(self, *names: str) -> None:
    """Compiles the programs of these names, all if none is given, at once."""
    resident = self.run.resident()
    calls = [call for call in self.run.calls() if not names or call.name in names]
    lowered = [call.program.lower(*call.args) for call in calls]
    with futures.ThreadPoolExecutor() as threads:
      done = list(threads.map(_compile, lowered))
    for call, (compiled, seconds) in zip(calls, done, strict=True):
      memory = compiled.memory_analysis()
      needed = hlo.peak_bytes(memory) + max(0, resident - memory.argument_size_in_bytes)
      self.programs[call.name] = Program(call, compiled, memory, seconds, needed)

  def as_called(self) -> None:
    """Takes the jitted functions in the place of what was compiled, as a run calls them."""
    for name, program in self.programs.items():
      program.call.program.clear_cache()  # What was compiled may still be in memory.
      static = [one for one in program.call.args if isinstance(one, int)]
      run = functools.partial(_with_last, program.call.program, static)
      self.programs[name] = dataclasses.replace(program, run=run)

  def encode(self) -> Guidance:
    """Random tokens, encoded; a text for each image."""
    program = self.programs["encode"]
    encoders, ids, empty, _ = program.call.args
    encoders = {name: self.frozen[name] for name in encoders}
    given = [random_tokens(self.run.model, shape.shape) for shape in (ids, empty)]
    return program.run(encoders, *map(_as_told, given, (ids, empty)))

  def sample(self, text: Guidance, seed: int = 0) -> tuple[Trajectory, jax.Array]:
    """Draws a batch."""
    program = self.programs["sample"]
    weights = self.run.programs.drawing_weights(self.state, self.frozen)
    keys = image_keys(jax.random.key(seed), 0, self.config.task[0].batch_size)
    return program.run(weights, self.frozen["vae"], text, _as_told(keys, program.call.args[3]))

  def update(self, text: Guidance, path: Trajectory, images: jax.Array) -> dict[str, jax.Array]:
    """A step on a timestep of the batch, towards brighter images; the next one each time."""
    program = self.programs["update"]
    rewards = images.mean(axis=(1, 2, 3))
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    steps = program.call.args[-1].shape[0]
    index = np.arange(self._updates, self._updates + steps) % self.config.policy.sampling_steps
    self._updates += 1
    given = [advantages, jnp.isfinite(rewards), index.astype(np.int32)]
    given = map(_as_told, given, program.call.args[-3:])
    self.state, metrics = program.run(self.state, self.frozen, path, text, *given)
    return metrics

  def iteration(self) -> TrainState:
    """Texts, images, and an update for each trained timestep."""
    text = self.encode()
    path, images = self.sample(text)
    for _ in range(self.programs["update"].call.times):
      self.update(text, path, images)
    return self.state


def _as_told(x: Any, shape: jax.ShapeDtypeStruct) -> Any:
  """`x` where the program was told that it is: elsewhere it would be another program."""
  return x if shape.sharding is None else jax.device_put(x, shape.sharding)


def _compile(lowered: Any) -> tuple[Any, float]:
  start = time.perf_counter()
  return lowered.compile(), time.perf_counter() - start


def _with_last(program: Callable[..., Any], last: Sequence[Any], *args: Any) -> Any:
  return program(*args, *last)


def described(model: Model, config: Config) -> StableDiffusion:
  """The model without weights, with the settings' types and kernels."""
  made = architectures.build(
    model.architecture(),
    dtype=jnp.dtype(config.devices.compute_dtype),
    remat=config.devices.remat,
  )
  return dataclasses.replace(made, unet=made.unet.clone(attention=config.devices.attention))


def random_tokens(model: StableDiffusion, shape: tuple[int, ...]) -> np.ndarray:
  """Token ids `[..., E, L]` int32 that every text encoder has; the last is the text's end."""
  least = min(encoder.config.vocab_size for encoder in model.text_encoders)
  ids = np.random.default_rng(0).integers(3, least - 2, shape)
  for number, encoder in enumerate(model.text_encoders):
    end = encoder.config.eos_token_id
    # CLIP's own tokenizer has 2 in the config, and its highest id where it means the end.
    ids[..., number, -1] = encoder.config.vocab_size - 1 if end == 2 else end
  return ids.astype(np.int32)


def work_of(training_config: Config, model: StableDiffusion, folder: pathlib.Path) -> Work:
  """The same work, as sides of a benchmark take it."""
  count, steps = training_config.task[0].batch_size, training_config.policy.sampling_steps
  length = model.text_encoders[0].config.max_position_embeddings
  shape = (len(model.text_encoders), length)
  timesteps = training_config.algorithm.train_timesteps
  return Work(
    model=folder,
    scratch=folder,
    devices=1,
    batch_size=count,
    sampling_steps=steps,
    guidance_scale=training_config.policy.guidance_scale,
    train_timesteps=timesteps,
    dtype=training_config.devices.compute_dtype,
    ids=random_tokens(model, (count, *shape)),
    empty=random_tokens(model, shape),
    timesteps=tuple(range(timesteps)),
    prompts=(),
    microbatch=training_config.devices.microbatch,
  )


def flops(training_config: Config, model: StableDiffusion) -> dict[str, float]:
  """FLOPs of 'sampling', an 'update' and an 'iteration' as the networks define them.

  What remat computes again does not count. The gradient of an adapter takes two forward passes, of
  all weights three.
  """
  found = work_lib.count_flops(model, work_of(training_config, model, pathlib.Path()))
  if training_config.policy.lora_rank:
    found["update"] *= 2 / 3
    timesteps = training_config.algorithm.train_timesteps
    found["iteration"] = found["sampling"] + timesteps * found["update"]
  return found
