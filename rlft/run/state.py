"""What training changes, and how it begins."""

import functools
from typing import Any

import jax
import optax

from rlft.algorithms.optimizer import MasterState, make_optimizer
from rlft.config.settings import Config, OptimizerSettings, PolicySettings
from rlft.models import lora
from rlft.models.files import lora_files
from rlft.parallel import sharding
from rlft.types import TrainState

_LORA_KEY = 2**31  # keys below are iterations


def optimizer_of(settings: OptimizerSettings) -> optax.GradientTransformation:
  """The optimizer that a run's settings describe."""
  return make_optimizer(
    learning_rate=settings.learning_rate,
    b1=settings.adam_b1,
    b2=settings.adam_b2,
    eps=settings.adam_eps,
    weight_decay=settings.weight_decay,
    max_grad_norm=settings.max_grad_norm,
    param_dtype=settings.param_dtype,
    moments_dtype=settings.moments_dtype,
  )


def make_trained(config: Config, unet: Any) -> Any:
  """The tree that is trained, float32: the UNet's parameters, or a new adapter of them."""
  if not config.policy.lora_rank:
    return unet
  key = jax.random.fold_in(jax.random.key(config.seed), _LORA_KEY)
  return lora.init(key, unet, config.policy.lora_rank)


def _given_adapter(settings: PolicySettings, unet: Any) -> lora.Adapter:
  """What `--init_lora` says of the adapter of a UNet; nothing of modules that it leaves out."""
  if not settings.init_lora:
    return {}
  found = lora_files.load(settings.init_lora, lora.targets(unet))
  scale = lora.scale(settings.lora_rank, settings.lora_alpha)
  return {path: {"a": factors["a"], "b": factors["b"] / scale} for path, factors in found.items()}


def make_state(
  settings: OptimizerSettings, optimizer: optax.GradientTransformation, trained: Any
) -> TrainState:
  """The state before the first update, from the trained tree in float32."""
  used = jax.tree.map(lambda x: x.astype(settings.param_dtype), trained)
  opt = optimizer.init(used)
  if isinstance(opt, MasterState):
    opt = opt._replace(master=trained)  # With the digits that `used` has lost.
  return TrainState(params=used, opt=opt, ema=trained if settings.ema_decay else None)


def initial_state(
  config: Config,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  unet: Any,
  *,
  is_kept: bool,
) -> TrainState:
  """The state before the first update, each leaf made in its shard.

  Args:
    config: the settings.
    optimizer: see `optimizer_of`.
    mesh: all devices.
    unet: the model's own parameters, on the devices.
    is_kept: whether something else reads them, too; they are given up if not.
  """

  def placed(make, argument, donated=()):
    shardings = sharding.parameters(mesh, jax.eval_shape(make, argument))
    return sharding.jit(make, out_shardings=shardings, donate_argnums=donated)(argument)

  trained, adapts = unet, bool(config.policy.lora_rank)
  if adapts:
    trained = placed(functools.partial(make_trained, config), unet)
    given = _given_adapter(config.policy, unet)
    shardings = sharding.parameters(mesh, trained)
    trained |= sharding.put(given, {path: shardings[path] for path in given})
  make = functools.partial(make_state, config.optimizer, optimizer)
  return placed(make, trained, donated=() if is_kept and not adapts else (0,))
