"""What the settings make of a model: policy, algorithm and jitted programs.

The same for a run and for its compilation ahead of time, where arrays are shapes.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax

from rlft.algorithms import pretraining
from rlft.algorithms.base import Algorithm, Learner, Learning
from rlft.algorithms.optimizer import full_precision
from rlft.config.settings import Config, PolicySettings
from rlft.diffusion.decoder import Decoder
from rlft.diffusion.policy import Policy, make_policy
from rlft.diffusion.sampler import Sampler
from rlft.models import lora
from rlft.models.stable_diffusion import StableDiffusion
from rlft.parallel import sharding
from rlft.run import state as state_lib
from rlft.types import Collect, TrainState


@dataclasses.dataclass(frozen=True)
class Programs:
  """Everything that computes; each program is compiled once for each batch shape.

  Attributes:
    algorithm: of the run.
    learner: the policy and the optimizer.
    sampler: draws.
    decoder: of final latents that were not drawn.
    learning: the algorithm's own.
    pretrain: see `pretraining.make_pretrain`.
    average: `state -> state`, with an updated average of the weights.
  """

  algorithm: Algorithm
  learner: Learner
  sampler: Sampler
  decoder: Decoder
  learning: Learning
  pretrain: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
  average: Callable[[TrainState], TrainState]

  def drawing_weights(self, state: TrainState, frozen: Any) -> lora.Weights:
    """Those that the algorithm draws images with for training."""
    if self.algorithm.draws_with == "base":
      return lora.Weights(frozen["unet"])
    return self.learner.weights(state.params, frozen.get("unet"))

  def averaged_weights(self, state: TrainState, frozen: Any) -> lora.Weights:
    """Those that are evaluated."""
    return self.learner.weights(state.averaged, frozen.get("unet"))


def kept_parameters(config: Config, algorithm: Algorithm, params: Any) -> dict[str, Any]:
  """Parameters that no update changes: 'vae', text encoders, and 'unet' where the base is used."""
  base = config.policy.lora_rank or algorithm.needs_base or algorithm.draws_with == "base"
  return {name: tree for name, tree in params.items() if name != "unet" or base}


def make_run_policy(settings: PolicySettings, model: StableDiffusion) -> Policy:
  """The policy that the settings say."""
  return make_policy(
    model,
    sampling_steps=settings.sampling_steps,
    guidance_scale=settings.guidance_scale,
    eta=settings.eta,
    lora_scale=lora.scale(settings.lora_rank, settings.lora_alpha),
  )


def make_sampler(
  config: Config,
  model: StableDiffusion,
  policy: Policy,
  mesh: jax.sharding.Mesh,
  frozen: Any,
  *,
  collect: Collect,
) -> Sampler:
  """The program that draws a run's images with some policy; arguments as of `make_programs`."""
  return Sampler(
    model,
    policy,
    batch_size=max(task.batch_size for task in config.task),
    mesh=mesh,
    frozen={name: tree for name, tree in frozen.items() if name != "unet"},
    collect=collect,
    microbatch=config.devices.microbatch,
    decode_chunk=config.devices.decode_chunk,
  )


def make_programs(
  config: Config,
  algorithm: Algorithm,
  model: StableDiffusion,
  mesh: jax.sharding.Mesh,
  frozen: Any,
) -> Programs:
  """Builds the pure functions of an iteration and jits them over the mesh.

  Args:
    config: the settings.
    algorithm: see `catalog.make_algorithm`.
    model: the modules.
    mesh: all devices.
    frozen: see `kept_parameters`; arrays or shapes.

  Raises:
    UserError: a process that cannot be learnt from, or a batch that does not divide.
  """
  policy = make_run_policy(config.policy, model)
  learner = Learner(
    policy,
    state_lib.optimizer_of(config.optimizer),
    mesh,
    trains_adapter=bool(config.policy.lora_rank),
    microbatch=config.devices.microbatch,
  )
  sampler = make_sampler(config, model, policy, mesh, frozen, collect=algorithm.collects)
  pretrain = pretraining.make_pretrain(
    learner,
    model,
    weight=config.pretraining.pretrain_weight,
    decode_chunk=config.devices.decode_chunk,
  )

  def average(state):
    decay = config.optimizer.ema_decay
    params = full_precision(state.params, state.opt)
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
    return dataclasses.replace(state, ema=ema)

  return Programs(
    algorithm=algorithm,
    learner=learner,
    sampler=sampler,
    decoder=Decoder(model, mesh, chunk=config.devices.decode_chunk),
    learning=algorithm.bind(learner),
    pretrain=sharding.jit(pretrain, donate_argnums=0),
    average=sharding.jit(average, donate_argnums=0),
  )
