"""Products, norms, gates and attention in forms that are fast on CPUs; float32.

`experiments/cpu_kernels.md` has the measurements.
"""

import functools
import math

import jax
import jax.numpy as jnp


def made_once(x: jax.Array) -> jax.Array:
  """`x`, made before a loop in which it does not change.

  XLA leaves slices and transposed arrays in a loop that does not change them: they cost nothing on
  accelerators, but on CPUs they are copies.
  """
  return jax.lax.optimization_barrier(x)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """A product whose gradient transposes neither `x` nor the cotangent; JAX's transposes both."""
  return x @ kernel


def _product_backward(residuals, d):
  x, kernel = residuals
  d_x = jax.lax.dot_general(d, kernel, (((d.ndim - 1,), (1,)), ((), ())))
  x, d = (y.reshape(-1, y.shape[-1]) for y in (x, d))
  return d_x, jax.lax.dot_general(x, d, (((0,), (0,)), ((), ())))


product.defvjp(lambda x, kernel: (product(x, kernel), (x, kernel)), _product_backward)


def _spread(x: jax.Array, channels: int) -> jax.Array:
  """`[B, G]` of groups to `[B, 1, C]` of channels.

  By a product: XLA fuses a broadcast into the loop over the map, which then divides an index for
  every value and is three times slower where C / G is no power of two.
  """
  groups = x.shape[1]
  return (x @ jnp.repeat(jnp.eye(groups, dtype=x.dtype), channels // groups, axis=1))[:, None]


def _group_sum(x: jax.Array, groups: int) -> jax.Array:
  return x.reshape(x.shape[0], groups, -1).sum(-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def group_norm(groups, epsilon, silu, x, scale, bias):
  """See `dispatch.group_norm`; few passes over the map, also for the gradient."""
  return _group_norm_forward(groups, epsilon, silu, x, scale, bias)[0]


def _group_norm_forward(groups, epsilon, silu, x, scale, bias):
  shape, channels = x.shape, x.shape[-1]
  x = x.reshape(shape[0], -1, channels)
  count = x.shape[1] * channels // groups
  offset = _spread(_group_sum(x.sum(1), groups) / count, channels)
  variance = _group_sum(jnp.square(x - offset).sum(1), groups) / count
  factor = _spread(jax.lax.rsqrt(variance + epsilon), channels)
  y = (x - offset) * (factor * scale) + bias
  y = y * jax.lax.logistic(y) if silu else y
  return y.reshape(shape), (x, scale, bias, offset, factor)


def _group_norm_backward(groups, epsilon, silu, residuals, d):
  del epsilon
  x, scale, bias, offset, factor = residuals
  shape, channels = d.shape, d.shape[-1]
  count = x.shape[1] * channels // groups
  d = d.reshape(x.shape)
  normal = (x - offset) * factor
  if silu:
    y = normal * scale + bias
    gate = jax.lax.logistic(y)
    d = d * gate * (1 + y * (1 - gate))
  d_bias, d_scale = d.sum(1), (d * normal).sum(1)  # [B, C]
  along_mean = _spread(_group_sum(d_bias * scale, groups) / count, channels)
  along_normal = _spread(_group_sum(d_scale * scale, groups) / count, channels)
  d_x = factor * (d * scale - along_mean - normal * along_normal)
  return d_x.reshape(shape), d_scale.sum(0), d_bias.sum(0)


group_norm.defvjp(_group_norm_forward, _group_norm_backward)


def _normal_cdf(x: jax.Array) -> jax.Array:
  # jax.nn.gelu has erfc, which takes XLA several times as long.
  return 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))


@jax.custom_vjp
def gated_gelu(x: jax.Array) -> jax.Array:
  """See `dispatch.gated_gelu`; the gradient computes the gate once for both halves."""
  x, gate = jnp.split(x, 2, axis=-1)
  return x * gate * _normal_cdf(gate)


def _gated_gelu_backward(x, d):
  x, gate = jnp.split(x, 2, axis=-1)
  cdf = _normal_cdf(gate)
  density = jnp.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi)
  return (jnp.concatenate([d * gate * cdf, d * x * (cdf + gate * density)], axis=-1),)


gated_gelu.defvjp(lambda x: (gated_gelu(x), x), _gated_gelu_backward)


@jax.custom_vjp
def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """Attention over `[B, N, heads, D]`, `[B, M, heads, D]` twice, with few passes over the logits.

  The weights are never divided by their sums, the small output and cotangent are; and the large
  operand of a product is never transposed, which leaves XLA without its fast kernels.
  """
  return _attention_forward(query, key, value)[0]


def _attention_forward(query, key, value):
  query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
  key, value = made_once(key), made_once(value)  # Of a text, they are the same at each step.
  logits = jnp.einsum("bhnd,bhmd->bhnm", query * query.shape[-1] ** -0.5, key)
  weights = jnp.exp(logits - logits.max(-1, keepdims=True))
  total = weights.sum(-1, keepdims=True)
  y = jnp.einsum("bhnm,bhmd->bhnd", weights, value) / total
  return y.transpose(0, 2, 1, 3), (query, key, value, weights, total, y)


def _attention_backward(residuals, d):
  query, key, value, weights, total, y = residuals
  factor = query.shape[-1] ** -0.5
  d_rows = d.transpose(0, 2, 1, 3) / total  # [B, heads, N, D]
  d_columns = d.transpose(0, 2, 3, 1) / total.swapaxes(2, 3)  # [B, heads, D, N]
  d_logits = jnp.einsum("bhnd,bhmd->bhnm", d_rows, value)
  d_logits = weights * (d_logits - (d_rows * y).sum(-1, keepdims=True))
  d_query = jnp.einsum("bhnm,bhmd->bhnd", d_logits, key * factor)
  d_key = jnp.einsum("bhdn,bhnm->bhdm", query.swapaxes(2, 3) * factor, d_logits)
  d_value = jnp.einsum("bhdn,bhnm->bhdm", d_columns, weights)
  return (
    d_query.transpose(0, 2, 1, 3),
    d_key.transpose(0, 3, 1, 2),
    d_value.transpose(0, 3, 1, 2),
  )


attention.defvjp(_attention_forward, _attention_backward)
