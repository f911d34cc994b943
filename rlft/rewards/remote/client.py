"""A client of one HTTP server that may be slow, away for a while, or gone for good.

Requests are tried again after connection errors, time-outs, 429 and 5xx, ever more rarely, until
a number of failures in a row or a deadline. Then all threads stop at once (a circuit breaker), with
one line for the user: a run must neither hang nor go on without its reward.

urllib3, because its pool of connections may be shared by threads, and because nothing in the
environment (proxies, .netrc) changes what it sends.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import json
import logging
import random
import socket
import threading
import time
from typing import Any, NoReturn, TypeVar

import urllib3

from rlft.rewards.scoring.errors import RewardError

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

QUESTION_S = 10.0  # For a request that asks what the server has.
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 15.0
_LAST_TRY_S = 0.05  # With less time left nothing is tried any more.
_MAX_ANSWER = 2**26  # Bytes. Scores and descriptions of models are far smaller.
_QUOTED = 120  # Characters of a server's message.


class TryAgain(Exception):
  """A request failed in a way that may pass. `after_s`: seconds that the server asked for."""

  def __init__(self, cause: str, after_s: float = 0.0):
    super().__init__(cause)
    self.after_s = after_s


@dataclasses.dataclass(frozen=True)
class Answer:
  """Status, headers (names in any case) and whole body of an answer."""

  status: int
  headers: Mapping[str, str]
  data: bytes


_waiting = threading.local()  # `connections`: what this thread's request was sent by


class _Noted:
  """Notes a connection where `_cut_after` finds it."""

  def request(self, *args: Any, **kwargs: Any) -> None:
    _waiting.connections.append(self)
    super().request(*args, **kwargs)  # type: ignore[misc]


class _HTTP(_Noted, urllib3.connection.HTTPConnection):
  pass


class _HTTPS(_Noted, urllib3.connection.HTTPSConnection):
  pass


class _HTTPPool(urllib3.HTTPConnectionPool):
  ConnectionCls = _HTTP


class _HTTPSPool(urllib3.HTTPSConnectionPool):
  ConnectionCls = _HTTPS


@contextlib.contextmanager
def _cut_after(seconds: float) -> Iterator[None]:
  """Cuts the connection of this thread's request if it is not done after so many seconds.

  Time-outs of connections only bound the wait for the next bytes, and a server that sends a header
  a byte at a time never runs into one.
  """
  connections = _waiting.connections = []

  def cut() -> None:
    for connection in connections:
      # There may be none yet, or none any more. TLS's own shutdown is not for two threads.
      with contextlib.suppress(OSError, AttributeError, TypeError):
        socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)

  timer = threading.Timer(seconds, cut)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()
    connections.clear()


class Client:
  """Sends requests to one server, from any number of threads."""

  def __init__(self, server: str, *, connections: int, token: str = ""):
    """Connects to nothing yet.

    Args:
      server: 'http://host:port/prefix', without a slash at the end.
      connections: that are kept open.
      token: sent as a bearer token; never shown.
    """
    self.server = server
    self._token = token
    self._pool = urllib3.PoolManager(
      num_pools=1,
      maxsize=connections,
      headers={"Authorization": f"Bearer {token}"} if token else None,
    )
    self._pool.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
    self._changed = threading.Condition()
    self._gave_up: tuple[float, str] = (float("-inf"), "")  # When, and the message.
    self._down_since: float | None = None

  def request(
    self,
    method: str,
    path: str,
    *,
    timeout_s: float,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
  ) -> Answer:
    """Sends one request, once.

    Raises:
      TryAgain: no answer in time, a broken connection, 429 or 5xx.
      RewardError: the server's certificate is refused, or its answer is too long.
    """
    end, late = time.monotonic() + timeout_s, f"no whole answer in {timeout_s:.3g} s"
    response = None
    try:
      with _cut_after(timeout_s):
        response = self._pool.request(
          method,
          self.server + path,
          body=body,
          headers={**self._pool.headers, **(headers or {})},
          timeout=urllib3.Timeout(connect=timeout_s, read=timeout_s),
          retries=False,
          redirect=False,
          preload_content=False,
        )
        data = b""
        while piece := response.read1(2**16):
          data += piece
          if len(data) > _MAX_ANSWER:
            raise RewardError(f"{self.server} answered with more than {_MAX_ANSWER} bytes")
          if time.monotonic() > end:  # A connection that is to be closed is not noted any more.
            break
      if time.monotonic() > end:
        raise TryAgain(late)
    except urllib3.exceptions.SSLError as error:
      if "CERTIFICATE_VERIFY_FAILED" not in str(error):
        raise TryAgain(_cause(error)) from error
      raise RewardError(
        f"{self.server} is not trusted ({self._short(str(error))}): name the file with the"
        " certificate of its authority in the environment variable SSL_CERT_FILE"
      ) from error
    except urllib3.exceptions.NewConnectionError as error:  # Also a TimeoutError.
      raise TryAgain(_cause(error)) from error
    except urllib3.exceptions.TimeoutError as error:
      raise TryAgain(late) from error
    except (urllib3.exceptions.HTTPError, OSError) as error:
      raise TryAgain(late if time.monotonic() > end else _cause(error)) from error
    finally:
      if response is not None:
        response.close()
    answer = Answer(response.status, response.headers, data)
    if answer.status == 429 or answer.status >= 500:
      after = response.headers.get("Retry-After", "")
      raise TryAgain(self.quote(answer), float(after) if after.isdecimal() else 0.0)
    return answer

  def ask(self, *paths: str, start_s: float) -> list[Answer]:
    """Asks a server, which may not be ready yet, what it has.

    Args:
      *paths: of the questions.
      start_s: seconds to wait; with 0 it must be ready now.

    Raises:
      RewardError: it does not answer, or lets nobody in.
    """
    now = time.monotonic()
    answers = []
    for path in paths:
      answer = self.until_answered(
        lambda timeout_s, path=path: self.request("GET", path, timeout_s=timeout_s),
        timeout_s=QUESTION_S,
        deadline=now + (start_s or QUESTION_S),
        retries=1000 if start_s else 0,
        started=now,
        remedy="start the server, or correct the address",
      )
      if answer.status in (401, 403):
        raise RewardError(
          f"{self.server} lets nobody in ({self.quote(answer)}): name an environment variable that"
          " has the right token with token_env=NAME"
        )
      answers.append(answer)
    return answers

  def until_answered(
    self,
    attempt: Callable[[float], _T],
    *,
    timeout_s: float,
    deadline: float,
    retries: int,
    started: float,
    remedy: str,
  ) -> _T:
    """Calls `attempt` until it returns.

    Args:
      attempt: called with the seconds that it may take; raises `TryAgain` to be called again.
      timeout_s: seconds for each call, at most.
      deadline: time (`time.monotonic`) by which to give up.
      retries: it gives up at one failure more.
      started: when the batch was started that this is a part of; what gives up on another part of
        it gives up on this one.
      remedy: what the user can do when it gives up.

    Raises:
      RewardError: it gave up.
    """
    begin, failures, cause = time.monotonic(), 0, "the deadline passed before the first try"
    while True:
      self._stop_if_given_up(started)
      left = deadline - time.monotonic()
      if left < _LAST_TRY_S or failures > retries:
        self.give_up(
          f"{self.server} failed {failures} time(s) in {time.monotonic() - begin:.3g} s (last:"
          f" {cause}): {remedy}"
        )
      try:
        result = attempt(min(timeout_s, left))
      except TryAgain as error:
        failures, cause = failures + 1, self._short(str(error))
        wait = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** min(failures - 1, 30))
        wait *= random.uniform(0.5, 1)
        # Half of what is left at most, so that the last try comes shortly before the deadline.
        wait = min(max(wait, error.after_s), (deadline - time.monotonic()) / 2)
        if failures <= retries:
          self._say_down(cause)
          with self._changed:
            self._changed.wait_for(lambda: self._gave_up[0] >= started, max(wait, 0))
      else:
        self._say_up()
        return result

  def give_up(self, message: str) -> NoReturn:
    """Raises `RewardError`, here and in all threads that are at parts of the same batch."""
    with self._changed:
      self._gave_up = (time.monotonic(), message)
      self._changed.notify_all()
    raise RewardError(message)

  def quote(self, answer: Answer) -> str:
    """'HTTP 400: what the server said', in a few words."""
    try:
      said = json.loads(answer.data)
      if isinstance(said, dict):
        said = said.get("error") or said.get("detail") or said
      said = said if isinstance(said, str) else json.dumps(said)
    except (ValueError, RecursionError):
      said = answer.data.decode(errors="replace")
    return f"HTTP {answer.status}: {self._short(said)}" if said else f"HTTP {answer.status}"

  def _short(self, text: Any) -> str:
    text = " ".join(text.split())
    if self._token:
      text = text.replace(self._token, "***")
    return text if len(text) <= _QUOTED else f"{text[: _QUOTED - 3]}..."

  def _stop_if_given_up(self, started: float) -> None:
    when, message = self._gave_up
    if when >= started:
      raise RewardError(message)

  def _say_down(self, cause: str) -> None:
    with self._changed:
      if self._down_since is None:
        self._down_since = time.monotonic()
        _log.warning("%s: %s; trying again", self.server, cause)

  def _say_up(self) -> None:
    with self._changed:
      if self._down_since is not None:
        _log.warning(
          "%s answers again after %.1f s", self.server, time.monotonic() - self._down_since
        )
        self._down_since = None


def _cause(error: BaseException) -> str:
  """What broke a connection, without urllib3's wrapping."""
  inner = [each for each in (error.__cause__, *error.args) if isinstance(each, BaseException)]
  if inner:
    return _cause(inner[0])
  return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
