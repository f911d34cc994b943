"""The optimizer of the policy: AdamW after clipping the global norm, with a constant rate."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def make_optimizer(
  *,
  learning_rate: float,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  max_grad_norm: float,
  param_dtype: str = "float32",
  moments_dtype: str = "float32",
) -> optax.GradientTransformation:
  """AdamW (Loshchilov & Hutter, 1711.05101); `max_grad_norm` 0 does not clip.

  In bfloat16, parameters have a float32 master (`with_master`), and moments are rounded at random
  (`stored_as`).
  """
  clip = clip_by_global_norm(max_grad_norm) if max_grad_norm else optax.identity()
  adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
  if jnp.dtype(moments_dtype) != jnp.float32:
    adam = stored_as(adam, jnp.dtype(moments_dtype))
  adamw = optax.chain(
    adam,
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(learning_rate),
  )
  whole = optax.chain(clip, adamw)
  return whole if jnp.dtype(param_dtype) == jnp.float32 else with_master(whole)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """`optax.clip_by_global_norm` as a product with one scalar, which XLA fuses into what follows.

  optax selects between every element and its quotient, and on CPUs the clipped gradient is then
  written out before Adam reads it: half of the time of a step (experiments/cpu_kernels.md).
  """

  def update(updates, state, params=None):
    del params
    factor = jnp.minimum(1.0, max_norm / optax.tree.norm(updates))
    return jax.tree.map(lambda x: x * factor, updates), state

  return optax.GradientTransformation(optax.init_empty_state, update)


class StoredState(NamedTuple):
  """`count` of updates, and the state of the transformation that is stored in another type."""

  count: jax.Array
  inner: Any


def stored_as(
  inner: optax.GradientTransformation, dtype: jnp.dtype
) -> optax.GradientTransformation:
  """Keeps the arrays of a transformation's state in bfloat16; what it computes is float32.

  They are rounded up or down at random, in proportion to what is lost, so that their mean is
  right. Rounded to the nearest, a second moment would stand still: with b2 = 0.999 it changes by
  less than half of bfloat16's last place (2^-9), unless the gradient's square is twice as large.
  """

  def init(params):
    return StoredState(jnp.zeros((), jnp.int32), _cast(inner.init(params), dtype))

  def update(updates, state, params=None):
    updates, found = inner.update(updates, _cast(state.inner, jnp.float32), params)
    leaves, structure = jax.tree.flatten(found)
    keys = jax.random.split(jax.random.key(state.count), len(leaves))
    rounded = [
      _round(key, leaf, dtype) if leaf.dtype == jnp.float32 else leaf
      for key, leaf in zip(keys, leaves, strict=True)
    ]
    return updates, StoredState(state.count + 1, jax.tree.unflatten(structure, rounded))

  return optax.GradientTransformation(init, update)


def _cast(tree: Any, dtype: Any) -> Any:
  return jax.tree.map(
    lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
  )


def _round(key: jax.Array, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """float32 to bfloat16, up with a probability of the share of the last place that is left."""
  if dtype != jnp.bfloat16:
    raise ValueError(f"{dtype} is not supported: bfloat16 has the upper half of float32's bits")
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  bits += jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


class MasterState(NamedTuple):
  """`master`: the parameters in float32; `inner`: the state of what updates them."""

  master: Any
  inner: optax.OptState


def with_master(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """Updates parameters in float32 that are used in bfloat16, where small updates would be lost."""

  def init(params):
    master = _cast(params, jnp.float32)
    return MasterState(master, inner.init(master))

  def update(updates, state, params=None):
    updates, found = inner.update(updates, state.inner, state.master)
    master = optax.apply_updates(state.master, updates)
    # What is added to a parameter makes it the rounded master: the sum is rounded only once.
    change = jax.tree.map(
      lambda m, p: m.astype(p.dtype).astype(jnp.float32) - p.astype(jnp.float32), master, params
    )
    return change, MasterState(master, found)

  return optax.GradientTransformation(init, update)


def full_precision(params: Any, opt: optax.OptState) -> Any:
  """The parameters in float32."""
  return opt.master if isinstance(opt, MasterState) else params
