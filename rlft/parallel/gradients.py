"""Functions of the images of all devices, and their gradients: what is gathered and sent."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from rlft.parallel import cpu, sharding
from rlft.parallel import microbatch as microbatch_lib

# (trained parameters, base parameters, rows [n, ...]) -> (sum over the rows, outputs [n, ...]);
# the parameters are whole.
Loss = Callable[..., tuple[jax.Array, Any]]


def over_devices(
  loss: Loss,
  params: Any,
  base: Any,
  rows: Any,
  *,
  mesh: Mesh,
  cast: Callable[[Any, Any], Any],
  dtype: Any,
  microbatch: int,
) -> tuple[Any, Any]:
  """The gradient of a loss that is a sum over all rows, and what the loss returns for each row.

  Each device gathers the parameters in the type of the computation, goes through its own rows in
  parts, and adds up gradients in float32; then the sums of all devices are scattered back, each
  shard to where it belongs. Nothing else of that size is sent, however many steps there are.

  Args:
    loss: of some rows.
    params: trained, laid out as `sharding.parameters` says; the gradient is with respect to these.
    base: further parameters, laid out in the same way.
    rows: a tree of `[K, B, ...]`: K steps of B images, which are spread over the devices.
    mesh: all devices.
    cast: (parameters, type) -> what the loss reads when it computes in that type.
    dtype: type of the computation.
    microbatch: images of a device in a part, see `microbatch.size`.

  Returns:
    the gradient, float32 and laid out as `params`, and the outputs `[K, B, ...]`.
  """
  where, base_where = sharding.specs(mesh, (params, base))

  def local(params, base, rows):
    shape, part = _rows(rows, mesh, dtype, microbatch)
    params, base = (
      sharding.gather(cast(tree, dtype), specs)
      for tree, specs in ((params, where), (base, base_where))
    )
    gradient, outputs = microbatch_lib.summed(
      lambda part: jax.grad(loss, has_aux=True)(params, base, part),
      params,
      jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows),
      part,
    )
    outputs = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), outputs)
    return sharding.scatter(gradient, where), outputs

  return sharding.on_each(
    mesh,
    local,
    in_specs=(where, base_where, sharding.COLUMNS),
    out_specs=(where, sharding.COLUMNS),
  )(params, base, rows)


def values_over_devices(
  function: Callable[..., Any],
  params: Any,
  base: Any,
  rows: Any,
  *,
  mesh: Mesh,
  cast: Callable[[Any, Any], Any],
  dtype: Any,
  microbatch: int,
) -> Any:
  """What a function returns for each row, without a gradient.

  Args:
    function: `(params, base, rows [n, ...]) -> outputs [n, ...]`; the parameters are whole.
    params, base, rows, mesh, cast, dtype, microbatch: as in `over_devices`.

  Returns:
    The outputs `[K, B, ...]`.
  """
  where = sharding.specs(mesh, (params, base))

  def local(params, base, rows):
    shape, part = _rows(rows, mesh, dtype, microbatch)
    params, base = (
      sharding.gather(cast(tree, dtype), specs)
      for tree, specs in zip((params, base), where, strict=True)
    )
    outputs = microbatch_lib.mapped(
      lambda part: function(params, base, part),
      jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows),
      part,
    )
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), outputs)

  return sharding.on_each(
    mesh, local, in_specs=(*where, sharding.COLUMNS), out_specs=sharding.COLUMNS
  )(params, base, rows)


def _rows(rows: Any, mesh: Mesh, dtype: Any, microbatch: int) -> tuple[tuple[int, int], int]:
  """(Steps, images) of a device's rows `[K, b, ...]`, and how many rows it takes at once."""
  steps, images = jax.tree.leaves(rows)[0].shape[:2]
  part = microbatch_lib.size(microbatch, images, mesh, dtype)
  return (steps, images), part or images * cpu.steps_at_once(images, steps, mesh, dtype)
