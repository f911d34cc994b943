"""The gradient of a loss over the images of all devices, with what that takes and sends."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from rlft import microbatch as microbatch_lib
from rlft import sharding
from rlft.models.precision import cast

# (trained parameters, base parameters, rows [b, ...], *constants) -> (sum over the rows, outputs
# [b, ...]); the parameters are whole.
Loss = Callable[..., tuple[jax.Array, Any]]


def over_devices(
  loss: Loss,
  params: Any,
  base: Any,
  rows: Any,
  *constants: jax.Array,
  mesh: Mesh,
  dtype: Any,
  microbatch: int,
) -> tuple[Any, Any]:
  """Gradient of a loss that is a sum over all images, and what it returns for each of them.

  Each device gathers the parameters in the type of the computation, goes through its own images in
  parts, and adds up gradients in float32; then the sums of all devices are scattered back, each
  shard to where it belongs. Nothing else of that size is sent.

  Args:
    loss: of some images.
    params: trained, laid out as `sharding.parameters` says; the gradient is with respect to these.
    base: further parameters, laid out in the same way.
    rows: a tree of `[B, ...]`, spread over the devices.
    *constants: the same for all images.
    mesh: all devices.
    dtype: see `precision.cast`.
    microbatch: images of a device in a part, see `microbatch.size`.

  Returns:
    the gradient, float32 and laid out as `params`, and the outputs `[B, ...]`.
  """
  where, base_where = sharding.specs(mesh, (params, base))

  def local(params, base, rows, *constants):
    params, base = (
      sharding.gather(cast(tree, dtype), specs)
      for tree, specs in ((params, where), (base, base_where))
    )
    gradient, outputs = microbatch_lib.summed(
      lambda part: jax.grad(loss, has_aux=True)(params, base, part, *constants),
      rows,
      microbatch_lib.size(microbatch, len(jax.tree.leaves(rows)[0]), mesh, dtype),
    )
    return sharding.scatter(gradient, where), outputs

  return sharding.on_each(
    mesh,
    local,
    in_specs=(where, base_where, sharding.ROWS, *[sharding.EVERYWHERE] * len(constants)),
    out_specs=(where, sharding.ROWS),
  )(params, base, rows, *constants)
