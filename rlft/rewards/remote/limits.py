"""What a reward on a server may take (requests at once, time, tries), and its token."""

import dataclasses
import math
import os

from rlft.rewards.scoring import host
from rlft.types import UserError

_MARGIN, _LONGEST_MARGIN_S = 0.05, 2.0  # Of the batch's deadline: left to say what went wrong.


@dataclasses.dataclass(frozen=True)
class Limits:
  """Bounds on what is sent to a server.

  Attributes:
    in_flight: requests at once, from each process.
    timeout_s: seconds for a request.
    deadline_s: seconds for a batch with all its tries, also bounded by the run's own deadline;
      None leaves that alone.
    retries: how often a request is sent again.
    start_s: seconds to wait at the start for a server that is not ready.
  """

  in_flight: int
  timeout_s: float
  deadline_s: float | None
  retries: int
  start_s: float

  def check(self, spec: str) -> None:
    """Raises `UserError` if a number is out of range; `spec` is what the user wrote."""
    for name, least in (("in_flight", 1), ("retries", 0), ("start_s", 0)):
      if getattr(self, name) < least:
        raise UserError(f"reward {spec!r}: {name} must be {least} or more")
    for name in ("timeout_s", "deadline_s"):
      value = getattr(self, name)
      if value is not None and value <= 0:
        raise UserError(f"reward {spec!r}: {name} must be greater than 0")

  def times(self) -> tuple[float, float]:
    """When the batch that is scored was started, and by when to give it up (`time.monotonic`)."""
    started, deadline = host.batch_times()
    deadline -= min(_MARGIN * (deadline - started), _LONGEST_MARGIN_S)
    return started, min(deadline, started + (self.deadline_s or math.inf))


def token(spec: str, name: str | None) -> str:
  """The server's token in the environment variable `name`; '' if that is None.

  Raises:
    UserError: the variable is not set, or holds no token.
  """
  if name is None:
    return ""
  value = os.environ.get(name, "").strip()
  if not value or not value.isascii() or not value.isprintable() or " " in value:
    raise UserError(f"reward {spec!r}: set the environment variable {name} to the server's token")
  return value


def without_password(netloc: str, host: str | None) -> None:
  """Raises `UserError` if an address holds a password."""
  if "@" in netloc:
    raise UserError(
      f"reward to {host}: an address is shown and stored, so give no password in it, but"
      " the name of an environment variable with a token: token_env=NAME"
    )
