"""What the processes of a run have to agree on."""

from collections.abc import Iterator
import contextlib
import re

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np

from rlft.parallel import sharding
from rlft.types import UserError

# JAX and Orbax raise ValueError as well as JaxRuntimeError, with what the library said.
_COLLECTIVE = re.compile(r"gloo|nccl|all-?gather|all-?reduce|coordination", re.I)


def is_collective(error: BaseException) -> bool:
  """Whether an error is of what processes do together, as where another is gone, or of devices."""
  if isinstance(error, jax.errors.JaxRuntimeError):
    return True
  return jax.process_count() > 1 and bool(_COLLECTIVE.search(str(error)))


def meet(mesh: Mesh) -> None:
  """Connects the devices of several processes, while all are at the same place of their work.

  CPUs that do not find each other within 30 s of their first collective give up, and one process
  may compile, or read a model, for longer than that before another is there. Once they have met
  they wait.
  """
  if jax.process_count() == 1:
    return
  raise_together(None)
  ones = sharding.put(np.ones(mesh.size, np.float32), sharding.batch(mesh))
  for axes in ("data", "fsdp", ("data", "fsdp")):
    total = sharding.on_each(
      mesh,
      lambda x, axes=axes: jax.lax.psum(x, axes),
      in_specs=sharding.ROWS,
      out_specs=sharding.ROWS,
    )
    sharding.jit(total)(ones)


def raise_together(error: UserError | None, kind: type[UserError] = UserError) -> None:
  """Raises on every process if any has an error: else the others would wait for it forever.

  Args:
    error: of this process, or None; it raises that. All processes must call this in the same order.
    kind: what a process raises of which only another has an error.
  """
  if jax.process_count() > 1:
    own = np.zeros(1024, np.uint8)
    text = str(error or "").encode()[: own.size]
    own[: len(text)] = np.frombuffer(text, np.uint8)
    for process, other in enumerate(multihost_utils.process_allgather(own)):
      if error is None and other.any():
        text = bytes(other[other > 0]).decode(errors="replace")
        error = kind(f"on process {process}: {text}")
  if error is not None:
    raise error


@contextlib.contextmanager
def together(kind: type[UserError] = UserError) -> Iterator[None]:
  """Raises a UserError of the block on every process; see `raise_together`."""
  failed = None
  try:
    yield
  except UserError as error:
    failed = error
  raise_together(failed, kind)
