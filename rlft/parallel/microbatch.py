"""A device's images in parts, one after the other, so that only one part's activations exist.

A part has the same size wherever the same images are computed again: sampling and training agree to
the last bit only where the shapes of all products do.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

Rows = Any  # a tree of arrays [b, ...], a row for each image

# What the caches of a CPU hold: updates are 1.2 times as fast as with 32 or 64 images at once, and
# sampling no slower; see experiments/cpu_kernels.md.
_CPU_SIZES = range(16, 7, -1)


def size(asked: int, count: int, mesh: Mesh, dtype: Any) -> int:
  """Images of a device in a part.

  Args:
    asked: 0 leaves it to this function: all images, but in float32 on CPUs 16, or 8 and more that
      divide them. (In bfloat16 XLA rounds elsewhere in a loop than outside.)
    count: images of a device.
    mesh: the devices.
    dtype: type of the computation.

  Returns:
    The number, or 0 for all.
  """
  if asked or not _is_exact(mesh, dtype):
    return asked
  return next((n for n in _CPU_SIZES if count % n == 0), 0)


def steps_at_once(count: int, steps: int, mesh: Mesh, dtype: Any) -> int:
  """Timesteps of all of a device's images in a part, where one optimizer step trains several.

  One, as in sampling, but on CPUs as many as make 16 images: each part reads all weights. In
  float32 only, where another shape changes the ratio by no more than a rounding error.

  Args:
    count: images of a device.
    steps: timesteps; what is returned divides them.
    mesh: the devices.
    dtype: type of the computation.
  """
  if not _is_exact(mesh, dtype):
    return 1
  most = max(1, _CPU_SIZES[0] // count)
  return next(n for n in range(most, 0, -1) if steps % n == 0)


def _is_exact(mesh: Mesh, dtype: Any) -> bool:
  """Whether the devices are CPUs, and what depends on shapes and loops is no more than 1e-6."""
  return mesh.devices.flat[0].platform == "cpu" and dtype == jnp.float32


def mapped(function: Callable[[Rows], Rows], rows: Rows, size: int) -> Rows:
  """`function(rows)`, computed for `size` rows at a time; 0 takes all at once.

  Args:
    function: rows to as many rows.
    rows: b of them, a multiple of `size`.
    size: of a part.
  """
  if _is_whole(rows, size):
    return function(rows)
  return _joined(jax.lax.map(function, _parts(rows, size)))


def summed(
  function: Callable[[Rows], tuple[Any, Rows]], like: Any, rows: Rows, size: int
) -> tuple[Any, Rows]:
  """As `mapped`, for a function that also returns what is to be summed over the parts.

  Args:
    function: rows to a tree, which is summed in float32, and as many rows.
    like: a tree with the shapes of that which is summed.
    rows, size: as in `mapped`.
  """
  if _is_whole(rows, size):
    return function(rows)
  parts = _parts(rows, size)

  def step(total, part):
    values, outputs = function(part)
    return jax.tree.map(lambda t, v: t + v.astype(jnp.float32), total, values), outputs

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)
  total, outputs = jax.lax.scan(step, zeros, parts)
  return total, _joined(outputs)


def _is_whole(rows: Rows, size: int) -> bool:
  count = len(jax.tree.leaves(rows)[0])
  if size and count % size:
    raise ValueError(f"{count} rows cannot be divided into parts of {size}")
  return size in (0, count)


def _parts(rows: Rows, size: int) -> Rows:
  return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), rows)


def _joined(parts: Rows) -> Rows:
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), parts)
