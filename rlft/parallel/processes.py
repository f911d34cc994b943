"""What the processes of a run have to agree on."""

import jax
from jax.experimental import multihost_utils
import numpy as np

from rlft.types import UserError


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
