"""What training changes, and how it begins."""

import dataclasses
import functools
from typing import Any

import jax
import optax

from rlft.algorithms.optimizer import MasterState, make_optimizer
from rlft.config.settings import Config
from rlft.models import lora as lora_lib
from rlft.models.files import lora_files
from rlft.parallel import sharding
from rlft.run.open import Run

_LORA_KEY = 2**31  # keys below are iterations


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """What an update changes, sharded over 'fsdp'.

  Attributes:
    params: the trained tree: the UNet's parameters, or the LoRA adapter.
    opt: state of the optimizer.
    ema: averaged `params`, or None.
  """

  params: Any
  opt: optax.OptState
  ema: Any

  @property
  def averaged(self) -> Any:
    """The parameters to evaluate: averaged where they are."""
    return self.params if self.ema is None else self.ema


def optimizer_of(config: Config) -> optax.GradientTransformation:
  """The optimizer that a run's settings describe."""
  return make_optimizer(
    learning_rate=config.optimizer.learning_rate,
    b1=config.optimizer.adam_b1,
    b2=config.optimizer.adam_b2,
    eps=config.optimizer.adam_eps,
    weight_decay=config.optimizer.weight_decay,
    max_grad_norm=config.optimizer.max_grad_norm,
    param_dtype=config.optimizer.param_dtype,
    moments_dtype=config.optimizer.moments_dtype,
  )


def make_state(config: Config, optimizer: optax.GradientTransformation, params: Any) -> TrainState:
  """The state before the first update, from the trained tree in float32."""
  used = jax.tree.map(lambda x: x.astype(config.optimizer.param_dtype), params)
  opt = optimizer.init(used)
  if isinstance(opt, MasterState):
    opt = opt._replace(master=params)  # With the digits that `used` has lost.
  return TrainState(params=used, opt=opt, ema=params if config.optimizer.ema_decay else None)


def initial_state(run: Run, optimizer: optax.GradientTransformation) -> TrainState:
  """The state before the first update, each leaf made in its shard.

  The model's own parameters are given up, unless `run.frozen` has them.
  """
  config, params = run.config, run.model.params["unet"]
  if config.policy.lora_rank:
    key = jax.random.fold_in(jax.random.key(config.seed), _LORA_KEY)
    init = functools.partial(lora_lib.init, params=params, rank=config.policy.lora_rank)
    shardings = sharding.parameters(run.mesh, jax.eval_shape(init, key))
    started = sharding.jit(init, out_shardings=shardings)(key)
    given = _given_adapter(config, params)
    params = started | sharding.put(given, {path: shardings[path] for path in given})

  make = functools.partial(make_state, config, optimizer)
  shardings = sharding.parameters(run.mesh, jax.eval_shape(make, params))
  donated = () if "unet" in run.frozen and not config.policy.lora_rank else (0,)
  return sharding.jit(make, out_shardings=shardings, donate_argnums=donated)(params)


def _given_adapter(config: Config, unet: Any) -> lora_lib.Adapter:
  """What `--init_lora` says of the adapter of a UNet; nothing of modules that it leaves out."""
  policy = config.policy
  if not policy.init_lora:
    return {}
  found = lora_files.load(policy.init_lora, lora_lib.targets(unet))
  scale = lora_lib.scale(policy.lora_rank, policy.lora_alpha)
  return {path: {"a": factors["a"], "b": factors["b"] / scale} for path, factors in found.items()}


def sampling_weights(config: Config, params: Any, frozen: Any) -> lora_lib.Weights:
  """What the sampler takes, from the trained tree and `Run.frozen`."""
  return (
    lora_lib.Weights(frozen["unet"], params)
    if config.policy.lora_rank
    else lora_lib.Weights(params)
  )
