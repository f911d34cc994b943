"""Numbers that the devices are still computing while they are given more to do."""

import jax

from rlft.algorithms.base import Numbers


class Unsettled:
  """The numbers of the last unit of work, which the devices may be busy with."""

  def __init__(self) -> None:
    self._numbers: Numbers | None = None
    self._metrics: dict[str, float] = {}

  def put(self, numbers: Numbers, metrics: dict[str, float]) -> None:
    """Takes numbers that are to be added to `metrics`; on CPUs, where they are there, adds them."""
    self._numbers, self._metrics = numbers, metrics
    if not waits():
      self.settle()

  def settle(self) -> bool:
    """Waits for the numbers, if there are any; says whether.

    Raises:
      UserError: what was learnt cannot be right.
    """
    numbers, self._numbers = self._numbers, None
    if numbers is not None:
      self._metrics.update(numbers())
    return numbers is not None


def waits() -> bool:
  """Whether a program may still run when its call has returned; not on CPUs, see `cpu.Awaited`."""
  return jax.default_backend() != "cpu"
