"""The device mesh ('data', 'fsdp') and how arrays are laid out on it.

The batch is spread over both axes; parameters and optimizer state over 'fsdp'. With one shard the
parameters are replicated, which is plain data parallelism. Axes are of type Auto: explicit axes
refuse convolutions.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from rlft.parallel import cpu

_SMALLEST_SHARDED = 4096  # elements; gathering less costs more than keeping it

EVERYWHERE = P()
ROWS = P(("data", "fsdp"))  # axis 0 spread over all devices
COLUMNS = P(None, ("data", "fsdp"))  # axis 1


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
  """`jax.jit` for programs of several devices; on CPUs a call is awaited, see `cpu.Awaited`."""
  return cpu.Awaited(jax.jit(function, **options))


def make_mesh(fsdp: int = 1, count: int = 0) -> Mesh:
  """The first `count` devices, all if 0, as `[count / fsdp, fsdp]`."""
  devices = jax.devices()[: count or None]
  shape = (len(devices) // fsdp, fsdp)
  return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, P())


def batch(mesh: Mesh) -> NamedSharding:
  """Axis 0 spread over all devices."""
  return NamedSharding(mesh, ROWS)


def returned(mesh: Mesh, spec: P) -> NamedSharding:
  """The sharding of what a program returns, as JAX calls it: of one device it knows no axes."""
  return NamedSharding(mesh, spec if mesh.size > 1 else P())


def spec(mesh: Mesh, shape: tuple[int, ...]) -> P:
  """Where a parameter lies: its largest axis that 'fsdp' divides is sharded, if it is worth it."""
  shards = mesh.shape["fsdp"]
  axes = [i for i, n in enumerate(shape) if n % shards == 0]
  if shards == 1 or math.prod(shape) < _SMALLEST_SHARDED or not axes:
    return P()
  axis = max(axes, key=lambda i: shape[i])
  return P(*[None] * axis, "fsdp")


def specs(mesh: Mesh, tree: Any) -> Any:
  """`spec` of each leaf."""
  return jax.tree.map(lambda x: spec(mesh, x.shape), tree)


def parameters(mesh: Mesh, tree: Any) -> Any:
  """`specs` as shardings."""
  return jax.tree.map(lambda x: NamedSharding(mesh, spec(mesh, x.shape)), tree)


def on_each(mesh: Mesh, function: Callable[..., Any], *, in_specs: Any, out_specs: Any) -> Any:
  """`function` on each device's own part of its arguments.

  Inside, nothing moves between devices but by `gather` and `scatter`, so no activation is ever
  gathered, and kernels that XLA cannot partition (attention on TPUs) need not be.
  """
  return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def gather(shards: Any, where: Any) -> Any:
  """Whole parameters from the shards of all devices; inside `on_each`.

  Args:
    shards: this device's part of a parameter tree.
    where: its specs.
  """

  def leaf(spec, x):
    if "fsdp" not in spec:
      return x
    return jax.lax.all_gather(x, "fsdp", axis=spec.index("fsdp"), tiled=True)

  return jax.tree.map(leaf, where, shards, is_leaf=_is_spec)


def scatter(gradient: Any, where: Any) -> Any:
  """The sum of all devices' gradients, each device's own shard of it; inside `on_each`.

  Small arrays that no device has a shard of are sent as one: by XLA, but on CPUs by `cpu.joined`.

  Args:
    gradient: of whole parameters, by this device's images.
    where: specs of the parameters.
  """
  specs, structure = jax.tree.flatten(where, is_leaf=_is_spec)
  leaves = [x.astype(jnp.float32) for x in structure.flatten_up_to(gradient)]
  several = [axis for axis in ("data", "fsdp") if jax.lax.axis_size(axis) > 1]
  if not several:  # On CPUs XLA copies what it sums, even over a single device.
    return structure.unflatten(leaves)

  def total(x, *axes):
    axes = [axis for axis in axes if axis in several]
    return jax.lax.psum(x, axes) if axes else x

  def leaf(spec, x):
    if "fsdp" not in spec:
      return total(x, "data", "fsdp")
    shard = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=spec.index("fsdp"), tiled=True)
    return total(shard, "data")

  def summed(tree):
    return jax.tree.map(lambda x: total(x, "data", "fsdp"), tree)

  small = {
    i: x for i, x in enumerate(leaves) if "fsdp" not in specs[i] and x.size < cpu.LARGEST_JOINED
  }
  sums = jax.lax.platform_dependent(small, cpu=cpu.joined(summed), default=summed) if small else {}
  return structure.unflatten(
    [sums[i] if i in sums else leaf(specs[i], x) for i, x in enumerate(leaves)]
  )


def _is_spec(x: Any) -> bool:
  return isinstance(x, P)


def place(mesh: Mesh, tree: Any) -> Any:
  """Places a parameter tree of host arrays as `parameters` says."""
  return put(tree, parameters(mesh, tree))


def put(x: Any, sharding: Any) -> Any:
  """Places arrays of which every process has what its devices need.

  Unlike `jax.device_put` this compares nothing between processes.

  Args:
    x: a tree of arrays.
    sharding: of each, or a tree like `x`.
  """

  def leaf(value, where):
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, where, lambda index: value[index])

  if isinstance(sharding, NamedSharding):
    return jax.tree.map(lambda value: leaf(value, sharding), x)
  return jax.tree.map(leaf, x, sharding)


def own_rows(sharding: NamedSharding, count: int) -> np.ndarray:
  """The rows of a batch that this process's devices hold, ascending."""
  held = np.zeros(count, bool)
  for (rows,) in sharding.addressable_devices_indices_map((count,)).values():
    held[rows] = True
  return np.flatnonzero(held)


def put_own(x: np.ndarray, own: np.ndarray, count: int, sharding: NamedSharding) -> jax.Array:
  """Places a batch of which this process has its own rows.

  Args:
    x: `[len(own), ...]`.
    own: see `own_rows`.
    count: rows of the batch.
    sharding: of the batch.
  """
  if len(own) < count:
    whole = np.zeros((count, *x.shape[1:]), x.dtype)
    whole[own] = x
    x = whole
  return put(x, sharding)


def fetch(x: jax.Array) -> np.ndarray:
  """A sharded array as a numpy array on every process."""
  if x.is_fully_addressable:
    return np.asarray(x)
  return multihost_utils.process_allgather(x, tiled=True)
