"""Serves the page until it is stopped."""

from collections.abc import Callable
import socket
import urllib.parse

import uvicorn

from rlft.rating.app import make_app
from rlft.rating.links import Links
from rlft.rating.settings import PageSettings
from rlft.rating.study import Study
from rlft.rating.votes import Plan, Votes
from rlft.types import UserError

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def serve(
  study: Study,
  votes: Votes,
  links: Links,
  plan: Plan,
  settings: PageSettings,
  say: Callable[[str], None],
) -> None:
  """Serves the page until SIGINT or SIGTERM.

  Args:
    study: with all its pictures.
    votes: of the study.
    links: who may see what.
    plan: who is asked how much.
    settings: where to listen.
    say: takes the links, a line each.

  Raises:
    UserError: the address is taken.
  """
  listening = _listen(settings.host, settings.port)
  address = _address(settings, listening.getsockname()[1])
  host = urllib.parse.urlsplit(address).hostname or ""
  app = make_app(
    study,
    votes,
    links,
    plan,
    hosts=(*_LOOPBACK, f"[{host}]" if ":" in host else host),
    address=address,
    min_consistency=settings.min_consistency,
  )
  say(f"Results so far: {address}/o/{links.organizer()}")
  say(f"{plan.questions} questions for each of {plan.raters} raters, a link for each:")
  for number in range(1, plan.raters + 1):
    say(f"{address}/r/{links.rater(number)}")
  say("Ctrl-C ends; the same command goes on.")
  # No log of addresses, which hold tokens.
  config = uvicorn.Config(
    app, log_level="warning", access_log=False, server_header=False, proxy_headers=False
  )
  try:
    uvicorn.Server(config).run(sockets=[listening])
  except KeyboardInterrupt:  # uvicorn raises it again when it has ended.
    pass
  finally:
    listening.close()


def _listen(host: str, port: int) -> socket.socket:
  try:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((host, port), family=family, backlog=512)
  except (OSError, UnicodeError) as error:
    raise UserError(
      f"cannot listen at --host={host} --port={port} ({error}): give another, or --port=0 for a"
      " free one"
    ) from error


def _address(settings: PageSettings, port: int) -> str:
  """What the links begin with."""
  if settings.address:
    return settings.address.rstrip("/")
  host = settings.host
  if host in ("0.0.0.0", "::"):
    host = socket.getfqdn()
  return f"http://{f'[{host}]' if ':' in host else host}:{port}"
