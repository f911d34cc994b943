"""What only CPUs need where several devices compute one program.

There a device is a few threads of the host, which waits for the others in one of them.
"""

from collections.abc import Callable
import ctypes
import os
from typing import Any

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
from jax.sharding import Mesh

from rlft.types import UserError

# What the caches of a CPU hold: updates are 1.2 times as fast as with 32 or 64 images at once, and
# sampling no slower; see experiments/cpu_kernels.md.
_SIZES = range(16, 7, -1)
LARGEST_JOINED = 2**16  # elements of an array that is worth sending with others


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
    # (experiments/cpu_kernels.md). So few threads are safe because of `Awaited`.
    os.environ.setdefault("PJRT_NPROC", str(max(devices, os.cpu_count() or 1)))
    _keep_heap()
    try:
      jax.config.update("jax_num_cpu_devices", devices)
      jax.config.update("jax_cpu_enable_async_dispatch", False)  # See `_keep_heap`.
    except RuntimeError as error:  # JAX has started: a second run in a notebook, for example.
      if jax.default_backend() == "cpu" and jax.local_device_count() != devices:
        raise UserError(
          f"--cpu_devices={devices}: JAX has started with {jax.local_device_count()} devices"
          " already; start a new process, or give 0 to use them"
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


def goes_on() -> bool:
  """Whether a program may still run when its call has returned; not on CPUs, see `Awaited`."""
  return jax.default_backend() != "cpu"


class Awaited:
  """A jitted function of several devices, of which on CPUs a call returns when it has run.

  A device of a CPU waits for the others in one of the few threads. Of two programs at once, one
  device may be in the first and another in the second, with no thread left for either to go on.
  """

  def __init__(self, program: Any):
    self._program = program

  def __call__(self, *args: Any) -> Any:
    result = self._program(*args)
    return result if goes_on() else jax.block_until_ready(result)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._program, name)


def images_at_once(count: int, mesh: Mesh, dtype: Any) -> int:
  """Images of a device in a part: in float32 on CPUs 16, or 8 and more that divide all; else 0.

  In bfloat16 XLA rounds elsewhere in a loop than outside.

  Args:
    count: images of the device.
    mesh: the devices.
    dtype: type of the computation.

  Returns:
    The number, or 0 for all.
  """
  if not _is_exact(mesh, dtype):
    return 0
  return next((n for n in _SIZES if count % n == 0), 0)


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
  most = max(1, _SIZES[0] // count)
  return next(n for n in range(most, 0, -1) if steps % n == 0)


def _is_exact(mesh: Mesh, dtype: Any) -> bool:
  """Whether the devices are CPUs, and what depends on shapes and loops is no more than 1e-6."""
  return mesh.devices.flat[0].platform == "cpu" and dtype == jnp.float32


def joined(function: Callable[[jax.Array], jax.Array]) -> Callable[[Any], Any]:
  """A function of the sums of many arrays that sends them as one.

  CPU devices wait for each other for every array that is summed.

  Args:
    function: sums a line of numbers over the devices.
  """

  def apply(tree: Any) -> Any:
    line, separate = ravel_pytree(tree)
    return separate(function(line))

  return apply
