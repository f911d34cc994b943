"""The programs of an iteration with the shapes that they are called with, on devices not present.

No weights are read and nothing is computed: arrays are `jax.ShapeDtypeStruct`s with shardings, but
for those that a run leaves to JAX to place: what is compiled here is what a run finds in a cache.
"""

from collections.abc import Iterator
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from rlft import catalog
from rlft.config.settings import Config
from rlft.models import architectures, scheduler_config, stable_diffusion
from rlft.models.files import pretrained
from rlft.models.stable_diffusion import StableDiffusion
from rlft.parallel import sharding
from rlft.performance.compile import communication
from rlft.run import state as state_lib
from rlft.run.programs import Programs, kept_parameters, make_programs
from rlft.types import Drawn, TrainState

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
    programs: those of a run (`run.programs`).
    state: see `TrainState`.
    frozen: see `programs.kept_parameters`.
  """

  config: Config
  mesh: Mesh
  model: StableDiffusion
  programs: Programs
  state: TrainState
  frozen: dict[str, Any]

  @classmethod
  def of(cls, config: Config, mesh: Mesh, model: StableDiffusion) -> "AbstractRun":
    """The run that `config` describes, of the parameters only shapes."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.params)
    model = dataclasses.replace(model, params=shapes)
    algorithm = catalog.make_algorithm(config.algorithm)
    frozen = kept_parameters(config, algorithm, shapes)
    frozen = _placed(frozen, sharding.parameters(mesh, frozen))
    programs = make_programs(config, algorithm, model, mesh, frozen)

    def begin(unet):
      trained = state_lib.make_trained(config, unet)
      return state_lib.make_state(config.optimizer, programs.learner.optimizer, trained)

    state = jax.eval_shape(begin, shapes["unet"])
    state = _placed(state, sharding.parameters(mesh, state))
    return cls(config, mesh, model, programs, state, frozen)

  def calls(self) -> list[Call]:
    """The programs of an iteration, in its order; one for each size of batch."""
    config, calls = self.config, []
    sizes = sorted({task.batch_size for task in config.task}, reverse=True)
    for size in sizes:
      encoded = self._encode(size)
      sampled, drawn = self._sample(encoded, size)
      count = sum(task.batch_size == size for task in config.task)
      for call in (encoded, sampled, *self._grading(drawn, size), *self._learning(drawn, size)):
        name = f"{call.name} {size}" if len(sizes) > 1 else call.name
        calls.append(dataclasses.replace(call, name=name, times=count * call.times))
    if config.pretraining.pretrain_weight:
      calls.append(self._pretrain())
    if config.optimizer.ema_decay:
      calls.append(Call("average", self.programs.average, (self.state,), 1, 0, {}))
    return calls

  def resident(self) -> int:
    """Bytes on a device of what is kept from one program to the next."""
    return device_bytes((self.state, self.frozen))

  def _encode(self, size: int) -> Call:
    tasks = [task for task in self.config.task if task.batch_size == size]
    # Of all tasks of this size, the one that encodes the most texts.
    texts = max(size // task.images_per_prompt for task in tasks)
    texts = size if texts % self.mesh.size else texts
    encoders = {name: tree for name, tree in self.frozen.items() if name not in ("unet", "vae")}
    ids = self._rows((texts, *self._tokens), jnp.int32)
    args = (encoders, ids, jax.ShapeDtypeStruct(self._tokens, jnp.int32), size)
    theory, sparable = self._theory(encoders, ()), communication.sparable(self.mesh, encoders)
    return Call("encode", self.programs.sampler.encode, args, 1, size, theory, sparable)

  def _sample(self, encoded: Call, size: int) -> tuple[Call, Drawn]:
    weights = self.programs.drawing_weights(self.state, self.frozen)
    text = encoded.program.eval_shape(*encoded.args)
    rows = sharding.returned(self.mesh, sharding.ROWS)
    text = _placed(text, rows)
    args = (weights, self.frozen["vae"], text, jax.ShapeDtypeStruct((size,), _KEY.dtype))
    program = self.programs.sampler.sample
    collected, images = program.eval_shape(*args)
    columns = self.programs.algorithm.collects == "trajectory"
    where = sharding.returned(self.mesh, sharding.COLUMNS) if columns else rows
    drawn = Drawn(_placed(images, rows), text, _placed(collected, where))
    decoder = _without(self.frozen["vae"], "encoder")
    gathered = (self._computed(weights.unet), weights.adapter, decoder)
    theory, sparable = self._theory(gathered, ()), communication.sparable(self.mesh, gathered)
    return Call("sample", program, args, 1, size, theory, sparable), drawn

  def _learning(self, drawn: Drawn, size: int) -> Iterator[Call]:
    gathered = self._unet(with_base=self.programs.algorithm.needs_base)
    for call in self.programs.learning.calls(self.state, self.frozen, drawn):
      theory = self._theory(gathered, self.state.params if call.is_update else ())
      theory["all-reduce"] += call.moved if self.mesh.size > 1 else 0
      yield Call(call.name, call.program, call.args, call.times, size, theory)

  def _grading(self, drawn: Drawn, size: int) -> Iterator[Call]:
    """What the reward's gradient takes, where an algorithm follows it, beside the reward's own."""
    if times := self.programs.algorithm.slopes:
      latents = self._rows((size, *stable_diffusion.latent_shape(self.model)), jnp.float32)
      vae, decoder = self.frozen["vae"], self.programs.decoder
      gathered = _without(vae, "encoder")
      theory, sparable = self._theory(gathered, ()), communication.sparable(self.mesh, gathered)
      for name, program, args in (
        ("decode", decoder.decode, (vae, latents)),
        ("pull", decoder.pull, (vae, latents, drawn.images)),
      ):
        yield Call(name, program, args, times, size, theory, sparable)

  def _pretrain(self) -> Call:
    count, state = self.config.pretraining.pretrain_batch_size, self.state
    images = self._rows((count, *stable_diffusion.image_size(self.model), 3), jnp.uint8)
    sources = self._rows((count, 4), jnp.int32)
    ids = self._rows((count, *self._tokens), jnp.int32)
    others = {name: tree for name, tree in self.frozen.items() if name != "unet"}
    gathered = (self._unet(), {**others, "vae": _without(others["vae"], "decoder")})
    args = (state, self.frozen, images, sources, ids, _KEY)
    theory = self._theory(gathered, state.params)
    sparable = communication.sparable(self.mesh, gathered)
    return Call("pretrain", self.programs.pretrain, args, 1, count, theory, sparable)

  @property
  def _tokens(self) -> tuple[int, int]:
    """(E, L) of the token ids of a text."""
    encoders = self.model.text_encoders
    return len(encoders), encoders[0].config.max_position_embeddings

  def _theory(self, gathers: Any, scatters: Any) -> dict[str, int]:
    return communication.expected(self.mesh, gathers=gathers, scatters=scatters)

  def _unet(self, *, with_base: bool = False) -> Any:
    """The shapes of the UNet's parameters that a gradient reads; of an adapter also its base's."""
    reads_base = with_base or self.config.policy.lora_rank
    return self._computed((self.state.params, self.frozen["unet"] if reads_base else {}))

  def _computed(self, tree: Any) -> Any:
    """The shapes in the type that the UNet computes in, in which they are gathered."""
    return jax.tree.map(lambda x: x.update(dtype=self.model.unet.dtype), tree)

  def _rows(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch(self.mesh))


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
    weights=False,
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
