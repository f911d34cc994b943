"""A device's images in parts, one after the other, so that only one part's activations exist.

A part has the same size wherever the same images are computed again: sampling and training agree to
the last bit only where the shapes of all products do.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlft.parallel import cpu

Rows = Any  # a tree of arrays [b, ...], a row for each image


def size(asked: int, count: int, mesh: Mesh, dtype: Any) -> int:
  """Images of a device in a part.

  Args:
    asked: 0 leaves it to this function: all images, but on CPUs see `cpu.images_at_once`.
    count: images of a device.
    mesh: the devices.
    dtype: type of the computation.

  Returns:
    The number, or 0 for all.
  """
  return asked or cpu.images_at_once(count, mesh, dtype)


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
  """Maps like `mapped`, with a function that also returns what is to be summed over the parts.

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
