"""Numbers that the devices are still computing while they are given more to do."""

from collections.abc import Callable

from rlft.algorithms.base import Numbers
from rlft.parallel.cpu import goes_on


class Unsettled:
  """The numbers of the last unit of work, which the devices may be busy with, and what follows."""

  def __init__(self) -> None:
    self._numbers: Numbers | None = None
    self._metrics: dict[str, float] = {}
    self._then: Callable[[], None] | None = None

  def put(self, numbers: Numbers, metrics: dict[str, float]) -> None:
    """Takes numbers that are to be added to `metrics`; on CPUs, where they are there, adds them."""
    self._numbers, self._metrics = numbers, metrics
    if not goes_on():
      self.settle()

  def then(self, call: Callable[[], None]) -> None:
    """Takes what is to be done when the numbers are there; on CPUs, where they are, does it."""
    self._then = call
    if not goes_on():
      self.settle()

  def settle(self) -> bool:
    """Waits for the numbers, if there are any, and does what follows; says whether it waited.

    Raises:
      UserError: what was learnt cannot be right.
    """
    numbers, self._numbers = self._numbers, None
    if numbers is not None:
      self._metrics.update(numbers())
    then, self._then = self._then, None
    if then is not None:
      then()
    return numbers is not None
