"""The programs of an iteration with the shapes that they are called with, on devices not present.

No weights are read and nothing is computed: arrays are `jax.ShapeDtypeStruct`s with shardings.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from rlft import train
from rlft.config.settings import Config
from rlft.diffusion import ddim
from rlft.diffusion import sampler as sampler_lib
from rlft.models import architectures, lora, scheduler_config, stable_diffusion
from rlft.models.files import pretrained
from rlft.models.stable_diffusion import StableDiffusion
from rlft.parallel import sharding
from rlft.performance.compile import communication
from rlft.run import open as run_lib
from rlft.run import state as state_lib

_KEY = jax.eval_shape(lambda: jax.random.key(0))


@dataclasses.dataclass(frozen=True)
class Call:
  """A program and its arguments.

  Attributes:
    name: of the program.
    program: jitted.
    args: trees of shapes.
    times: calls in an iteration.
    images: that one call is for; 0 if its work does not depend on them.
    theory, sparable: communication of one call, see `communication`.
  """

  name: str
  program: Any
  args: tuple[Any, ...]
  times: int
  images: int
  theory: dict[str, int]
  sparable: int = 0


@dataclasses.dataclass(frozen=True)
class AbstractRun:
  """A training run in shapes.

  Attributes:
    config: the settings.
    mesh: all devices.
    model: modules, with shapes in the place of parameters.
    state: see `state.TrainState`.
    frozen: see `run.Run`.
  """

  config: Config
  mesh: Mesh
  model: StableDiffusion
  state: state_lib.TrainState
  frozen: dict[str, Any]

  @classmethod
  def of(cls, config: Config, mesh: Mesh, model: StableDiffusion) -> "AbstractRun":
    """The run that `config` describes, of the parameters only shapes."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.params)
    model = dataclasses.replace(model, params=shapes)
    params = shapes["unet"]
    if config.policy.lora_rank:
      params = jax.eval_shape(
        lambda key, x: lora.init(key, x, config.policy.lora_rank), _KEY, params
      )
    optimizer = state_lib.optimizer_of(config)
    state = jax.eval_shape(lambda x: state_lib.make_state(config, optimizer, x), params)
    has_base = config.policy.lora_rank or config.algorithm.kl_weight
    frozen = {name: tree for name, tree in shapes.items() if name != "unet" or has_base}
    state, frozen = (_placed(tree, sharding.parameters(mesh, tree)) for tree in (state, frozen))
    return cls(config, mesh, model, state, frozen)

  def calls(self) -> list[Call]:
    """The programs of an iteration, in its order; one for each size of batch."""
    config, model, mesh = self.config, self.model, self.mesh
    schedule = ddim.make_schedule(
      model.scheduler, config.policy.sampling_steps, eta=config.policy.eta
    )
    programs = train.make_programs(config, model, schedule, state_lib.optimizer_of(config), mesh)
    scale = {"guidance_scale": config.policy.guidance_scale}
    encode = jax.jit(sampler_lib.make_encode(model, mesh, **scale), static_argnums=3)
    sample = jax.jit(
      sampler_lib.make_sample(model, schedule, mesh, **scale, **run_lib.sampling_settings(config))
    )
    calls = []
    sizes = sorted({task.batch_size for task in config.task}, reverse=True)
    for size in sizes:
      encoded = self._encode(encode, size)
      drawn = self._sample(sample, encoded, size)
      count = sum(task.batch_size == size for task in config.task)
      update = self._update(programs, drawn, size)
      for call in (encoded, drawn, update):
        name = f"{call.name} {size}" if len(sizes) > 1 else call.name
        calls.append(dataclasses.replace(call, name=name, times=count * call.times))
    if config.pretraining.pretrain_weight:
      calls.append(self._pretrain(programs))
    if config.optimizer.ema_decay:
      calls.append(Call("average", programs.average, (self.state,), 1, 0, {}))
    return calls

  def resident(self) -> int:
    """Bytes on a device of what is kept from one program to the next."""
    return device_bytes((self.state, self.frozen))

  def _encode(self, program: Any, size: int) -> Call:
    tasks = [task for task in self.config.task if task.batch_size == size]
    # Of all tasks of this size, the one that encodes the most texts.
    texts = max(size // task.images_per_prompt for task in tasks)
    texts = size if texts % self.mesh.size else texts
    encoders = {name: tree for name, tree in self.frozen.items() if name not in ("unet", "vae")}
    ids = self._rows((texts, *self._tokens), jnp.int32)
    args = (encoders, ids, self._everywhere(self._tokens, jnp.int32), size)
    theory, sparable = self._theory(encoders, ()), communication.sparable(self.mesh, encoders)
    return Call("encode", program, args, 1, size, theory, sparable)

  def _sample(self, program: Any, encoded: Call, size: int) -> Call:
    weights = state_lib.sampling_weights(self.config, self.state.params, self.frozen)
    text = jax.eval_shape(encoded.program, *encoded.args)
    text = _placed(text, sharding.batch(self.mesh))
    args = (weights, self.frozen["vae"], text, self._rows((size,), _KEY.dtype))
    decoder = _without(self.frozen["vae"], "encoder")
    gathered = (self._computed(weights.unet), weights.adapter, decoder)
    theory, sparable = self._theory(gathered, ()), communication.sparable(self.mesh, gathered)
    return Call("sample", program, args, 1, size, theory, sparable)

  def _update(self, programs: train.Programs, sample: Call, size: int) -> Call:
    config, state, mesh = self.config, self.state, self.mesh
    steps, times = config.algorithm.train_timesteps, 1
    if not config.algorithm.accumulate_timesteps:
      steps, times = times, steps
    path, _ = jax.eval_shape(sample.program, *sample.args)
    text = sample.args[2]
    batch = (
      self.frozen,
      _placed(path, NamedSharding(mesh, sharding.COLUMNS)),
      text,
      self._rows((size,), jnp.float32),
      self._rows((size,), jnp.bool_),
      self._everywhere((steps,), jnp.int32),
    )
    gathered = self._computed((state.params, self.frozen.get("unet", {})))
    theory = self._theory(gathered, state.params)
    return Call("update", programs.update, (state, *batch), times, size, theory)

  def _pretrain(self, programs: train.Programs) -> Call:
    count, state = self.config.pretraining.pretrain_batch_size, self.state
    images = self._rows((count, *stable_diffusion.image_size(self.model), 3), jnp.uint8)
    sources = self._rows((count, 4), jnp.int32)
    ids = self._rows((count, *self._tokens), jnp.int32)
    others = {name: tree for name, tree in self.frozen.items() if name != "unet"}
    unet = self._computed((state.params, self.frozen.get("unet", {})))
    gathered = (unet, {**others, "vae": _without(others["vae"], "decoder")})
    args = (state, self.frozen, images, sources, ids, _KEY)
    theory = self._theory(gathered, state.params)
    sparable = communication.sparable(self.mesh, gathered)
    return Call("pretrain", programs.pretrain, args, 1, count, theory, sparable)

  @property
  def _tokens(self) -> tuple[int, int]:
    """(E, L) of the token ids of a text."""
    encoders = self.model.text_encoders
    return len(encoders), encoders[0].config.max_position_embeddings

  def _theory(self, gathers: Any, scatters: Any) -> dict[str, int]:
    return communication.expected(self.mesh, gathers=gathers, scatters=scatters)

  def _computed(self, tree: Any) -> Any:
    """The shapes in the type that the UNet computes in, in which they are gathered."""
    return jax.tree.map(lambda x: x.update(dtype=self.model.unet.dtype), tree)

  def _rows(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch(self.mesh))

  def _everywhere(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(self.mesh))


def open_model(config: Config, architecture: str = "") -> StableDiffusion:
  """The model that a run would open; `architecture` names one in the place of a directory."""
  dtype = jnp.dtype(config.devices.compute_dtype)
  if architecture:
    model = architectures.abstract(architecture, dtype=dtype, remat=config.devices.remat)
    size = stable_diffusion.parse_size(config.policy.image_size)
    sized = stable_diffusion.sized(model.unet.config, model.vae.config, size)
    return dataclasses.replace(
      model,
      unet=model.unet.clone(attention=config.devices.attention, config=sized),
      scheduler={**model.scheduler, **scheduler_config.parse(config.policy.scheduler)},
    )
  return pretrained.load(
    config.pretrained,
    dtype=dtype,
    remat=config.devices.remat,
    attention=config.devices.attention,
    backend=config.devices.backend,
    scheduler=config.policy.scheduler,
    image_size=config.policy.image_size,
  )


def _without(vae: dict[str, Any], half: str) -> dict[str, Any]:
  """The parameters of the VAE but for the half that a program does not use."""
  return {name: tree for name, tree in vae.items() if name != half}


def device_bytes(tree: Any) -> int:
  """Bytes on one device of arrays or shapes with shardings."""
  return sum(
    leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
    for leaf in jax.tree.leaves(tree)
  )


def _placed(tree: Any, where: Any) -> Any:
  """The shapes with a sharding, or with a tree of them."""
  if isinstance(where, NamedSharding):
    where = jax.tree.map(lambda _: where, tree)
  return jax.tree.map(
    lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), tree, where
  )
