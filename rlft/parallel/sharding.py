"""The device mesh ('data', 'fsdp') and how arrays are laid out on it.

The batch is spread over both axes; parameters and optimizer state over 'fsdp'. With one shard the
parameters are replicated, which is plain data parallelism. Axes are of type Auto: explicit axes
refuse convolutions.
"""

from collections.abc import Callable
import ctypes
import math
import os
from typing import Any

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlft.types import UserError

_SMALLEST_SHARDED = 4096  # elements; gathering less costs more than keeping it
_LARGEST_JOINED = 2**16  # elements; on CPUs devices wait for each other for every array summed

EVERYWHERE = P()
ROWS = P(("data", "fsdp"))  # axis 0 spread over all devices
COLUMNS = P(None, ("data", "fsdp"))  # axis 1


def split_host(devices: int) -> None:
  """Splits the host's CPU into devices; before JAX has started, and 0 leaves it as it is.

  XLA runs many operations of a program on one thread: two devices on two cores train the miniature
  1.7 times as fast as one. A network of 50 M parameters is 1.1 times as fast on one, which reads
  all weights once. Freed memory stays with the process. Accelerators are not affected.

  Raises:
    UserError: JAX has started already, with another number of CPU devices.
  """
  if devices:
    # XLA cuts an operation into as many tasks as there are threads, and those of two devices get in
    # each other's way: with 5 threads for two cores sampling takes a fifth longer than with 2
    # (experiments/cpu_kernels.md). So few threads are safe because of `jit`.
    os.environ.setdefault("PJRT_NPROC", str(max(devices, os.cpu_count() or 1)))
    _keep_heap()
    try:
      jax.config.update("jax_num_cpu_devices", devices)
      jax.config.update("jax_cpu_enable_async_dispatch", False)  # See `_keep_heap`.
    except RuntimeError as error:  # JAX has started: a second run in a notebook, for example.
      if jax.default_backend() == "cpu" and jax.device_count() != devices:
        raise UserError(
          f"--cpu_devices={devices}: JAX has started with {jax.device_count()} devices already;"
          " start a new process, or give 0 to use them"
        ) from error


def _keep_heap() -> None:
  """Has the C library keep memory that the calling thread has freed, where it is glibc.

  Each call of a program on a CPU allocates its activations anew, and fresh pages for them take a
  tenth of an iteration at 50 M parameters (experiments/cpu_kernels.md). A program of one device
  allocates in the thread that calls it. Those of more allocate in threads of XLA, whose arenas hold
  64 MB at most: nothing changes for them, as to share an arena costs more than the pages do.
  """
  trim_threshold, mmap_max = -1, -4  # M_... of malloc.h
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (OSError, AttributeError):
    return
  for option, value in ((mmap_max, 0), (trim_threshold, -1)):
    mallopt(option, value)


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
  """`jax.jit` for programs of several devices; on CPUs a call returns when its program has run.

  A device of a CPU waits for the others in one of the few threads. Of two programs at once, one
  device may be in the first and another in the second, with no thread left for either to go on.
  """
  return _Awaited(jax.jit(function, **options))


class _Awaited:
  """Behaves like the jitted function, but for when it returns."""

  def __init__(self, program: Any):
    self._program = program

  def __call__(self, *args: Any) -> Any:
    result = self._program(*args)
    return jax.block_until_ready(result) if jax.default_backend() == "cpu" else result

  def __getattr__(self, name: str) -> Any:
    return getattr(self._program, name)


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


def spec(mesh: Mesh, shape: tuple[int, ...]) -> P:
  """Of a parameter: the largest axis that 'fsdp' divides is sharded, where it is worth it."""
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

  CPUs send small arrays that no device has a shard of as one; elsewhere XLA combines them itself.

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

  def joined(tree):
    line, separate = ravel_pytree(tree)
    return separate(summed(line))

  small = {
    i: x for i, x in enumerate(leaves) if "fsdp" not in specs[i] and x.size < _LARGEST_JOINED
  }
  sums = jax.lax.platform_dependent(small, cpu=joined, default=summed) if small else {}
  return structure.unflatten(
    [sums[i] if i in sums else leaf(specs[i], x) for i, x in enumerate(leaves)]
  )


def _is_spec(x: Any) -> bool:
  return isinstance(x, P)


def place(mesh: Mesh, tree: Any) -> Any:
  """Places a parameter tree of host arrays as `parameters` says."""
  return put(tree, parameters(mesh, tree))


def put(x: Any, sharding: Any) -> Any:
  """Places host arrays that every process has whole; `sharding` is one, or a tree like `x`."""

  def leaf(value, where):
    return jax.make_array_from_callback(value.shape, where, lambda index: value[index])

  if isinstance(sharding, NamedSharding):
    return jax.tree.map(lambda value: leaf(value, sharding), x)
  return jax.tree.map(leaf, x, sharding)
