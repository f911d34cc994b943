"""The device mesh ('data', 'fsdp') and how arrays are laid out on it.

The batch is spread over both axes; parameters and optimizer state over 'fsdp'. With one shard the
parameters are replicated, which is plain data parallelism. Axes are of type Auto: explicit axes
refuse convolutions.
"""

import os
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlft.types import UserError

_SMALLEST_SHARDED = 4096  # elements; gathering less costs more than keeping it


def split_host(devices: int) -> None:
  """Splits the host's CPU into devices; before JAX has started, and 0 leaves it as it is.

  XLA runs many operations of a program on one thread: two devices on two cores train the miniature
  1.5 times as fast as one. Accelerators are not affected.

  Raises:
    UserError: JAX has started already, with another number of CPU devices.
  """
  if devices:
    # A device waits for the others in a thread of its own; with only one thread for each core,
    # programs that were launched one after another can wait for each other for ever.
    os.environ.setdefault("PJRT_NPROC", str(8 * devices))
    try:
      jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError as error:  # JAX has started: a second run in a notebook, for example.
      if jax.default_backend() == "cpu" and jax.device_count() != devices:
        raise UserError(
          f"--cpu_devices={devices}: JAX has started with {jax.device_count()} devices already;"
          " start a new process, or give 0 to use them"
        ) from error


def make_mesh(fsdp: int = 1) -> Mesh:
  """All devices as `[devices / fsdp, fsdp]`."""
  shape = (jax.device_count() // fsdp, fsdp)
  return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, P())


def batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Axis `axis` spread over all devices."""
  return NamedSharding(mesh, P(*[None] * axis, ("data", "fsdp")))


def parameters(mesh: Mesh, tree: Any) -> Any:
  """A sharding for each leaf: its largest axis that 'fsdp' divides, or replicated."""
  shards = mesh.shape["fsdp"]

  def leaf(x) -> NamedSharding:
    axes = [i for i, n in enumerate(x.shape) if n % shards == 0]
    if shards == 1 or x.size < _SMALLEST_SHARDED or not axes:
      return NamedSharding(mesh, P())
    axis = max(axes, key=lambda i: x.shape[i])
    return NamedSharding(mesh, P(*[None] * axis, "fsdp"))

  return jax.tree.map(leaf, tree)


def gather(mesh: Mesh, tree: Any) -> Any:
  """Whole parameters for a forward pass; their gradient is scattered back to the shards.

  An explicit gather keeps XLA from resharding activations instead (which costs all-to-alls).
  """
  if mesh.shape["fsdp"] == 1:
    return tree
  shardings = parameters(mesh, tree)
  constrain = jax.lax.with_sharding_constraint

  @jax.custom_vjp
  def run(tree):
    return jax.tree.map(lambda x: constrain(x, replicated(mesh)), tree)

  run.defvjp(
    lambda tree: (run(tree), None),
    lambda _, gradient: (jax.tree.map(constrain, gradient, shardings),),
  )
  return run(tree)


def put(x: Any, sharding: Any) -> Any:
  """Places host arrays that every process has whole; `sharding` is one, or a tree like `x`."""

  def leaf(value, where):
    return jax.make_array_from_callback(value.shape, where, lambda index: value[index])

  if isinstance(sharding, NamedSharding):
    return jax.tree.map(lambda value: leaf(value, sharding), x)
  return jax.tree.map(leaf, x, sharding)
