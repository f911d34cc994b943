"""The web page on which people compare pictures.

Whatever it answers, it answers to a link with a token: a stranger is told 'Not found', whatever is
asked for. There are no cookies, so that no other site can act for a rater; pages take nothing from
elsewhere, and neither pages nor addresses say which model drew what.
"""

from collections.abc import Awaitable, Callable, Sequence
import functools
import json
import pathlib
import sqlite3
from typing import Any
import urllib.parse

import jinja2
import PIL.Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
  FileResponse,
  HTMLResponse,
  PlainTextResponse,
  RedirectResponse,
  Response,
)
from starlette.routing import Route

from rlft.rating import results
from rlft.rating.links import Links
from rlft.rating.settings import VARIETY
from rlft.rating.study import Study
from rlft.rating.votes import SIDES, TIE, Plan, Question, Votes

_BODY_BYTES = 1000  # of a form; a browser sends a tenth
_HEADERS = {
  "Content-Security-Policy": (
    "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self';"
    " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
  ),
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Resource-Policy": "same-origin",
  # Addresses hold tokens: other sites must not be told where somebody comes from.
  "Referrer-Policy": "same-origin",
  "X-Content-Type-Options": "nosniff",
  "X-Robots-Tag": "noindex",
}
_TEMPLATES = pathlib.Path(__file__).parent / "templates"
_FILES = {"page.css": "text/css", "page.js": "text/javascript"}
_PAGES = jinja2.Environment(
  loader=jinja2.FileSystemLoader(_TEMPLATES),
  autoescape=True,
  undefined=jinja2.StrictUndefined,
  trim_blocks=True,
  lstrip_blocks=True,
)
_SMALL = 96  # pixels; smaller pictures are enlarged as squares


def make_app(
  study: Study,
  votes: Votes,
  links: Links,
  plan: Plan,
  *,
  hosts: Sequence[str],
  address: str = "",
  min_consistency: float = 0.0,
) -> Starlette:
  """The application.

  Args:
    study: with all its pictures.
    votes: of the study.
    links: who may see what.
    plan: who is asked how much; as `votes` has it.
    hosts: names by which the page may be called, without ports.
    address: what links begin with; a web server before this one may call this one by another name.
    min_consistency: see `results.find`.
  """
  page = _Page(study, votes, links, plan, min_consistency)
  rater, organizer = "/r/{token}", "/o/{token}"
  routes = [
    Route(rater, page.guide),
    Route(rater + "/rate", page.rate),
    Route(rater + "/vote", page.vote, methods=["POST"]),
    Route(rater + "/undo", page.undo, methods=["POST"]),
    Route(rater + "/picture/{question}/{side}/{number}", page.picture),
    Route(rater + "/{file}", page.file),
    Route(organizer, page.outcome),
    Route(organizer + "/votes.csv", page.votes_csv),
    Route(organizer + "/results.json", page.results_json),
    Route(organizer + "/{file}", page.file),
  ]
  app = Starlette(
    routes=routes,
    middleware=[
      # Another name in the request is another site's that was pointed at this machine.
      Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
      Middleware(BaseHTTPMiddleware, dispatch=functools.partial(_guarded, _host_of(address))),
    ],
    exception_handlers={
      HTTPException: _refusal,
      ClientDisconnect: _gone,
      sqlite3.OperationalError: _busy,
    },
  )
  app.router.redirect_slashes = False  # A stranger is not told what there is with another slash.
  return app


async def _guarded(
  public: str, request: Request, call_next: Callable[[Request], Awaitable[Response]]
) -> Response:
  """Refuses forms of other sites, and says to browsers what pages may do."""
  origin = request.headers.get("origin")
  named = (request.headers.get("host"), *filter(None, [public]))
  if origin is not None and _host_of(origin) not in named:
    response: Response = PlainTextResponse("Not found", 404)
  else:
    response = await call_next(request)
  for name, value in _HEADERS.items():
    response.headers[name] = value
  response.headers.setdefault("Cache-Control", "no-store")
  return response


def _host_of(origin: str) -> str:
  try:
    return urllib.parse.urlsplit(origin).netloc
  except ValueError:
    return ""


async def _refusal(request: Request, error: Exception) -> Response:
  """The same for whatever is not there and for whatever is not allowed."""
  del request
  assert isinstance(error, HTTPException)
  code = 404 if error.status_code == 405 else error.status_code
  return PlainTextResponse("Not found" if code == 404 else error.detail, code)


async def _gone(request: Request, error: Exception) -> Response:
  """Whoever asked has left before everything was sent; nobody reads this."""
  del request, error
  return PlainTextResponse("Not whole", 400)


async def _busy(request: Request, error: Exception) -> Response:
  """The disk is full, say. The page tries again; nothing was stored."""
  del request, error
  return PlainTextResponse("Cannot be stored now", 503, {"Retry-After": "2"})


class _Page:
  """What each address answers."""

  def __init__(self, study: Study, votes: Votes, links: Links, plan: Plan, min_consistency: float):
    self._study, self._votes, self._links, self._plan = study, votes, links, plan
    self._min_consistency = min_consistency
    self._pairs = study.pairs

  # ------------------------------------------------------------------ raters

  def guide(self, request: Request) -> Response:
    """What a rater reads first."""
    rater = self._rater(request)
    asks = {entry.ask for entry in self._study.sets}
    return self._html(
      "guide.html",
      request,
      answered=len(self._votes.answered(rater)),
      questions=self._plan.questions,
      asks=asks,
      sets=any(entry.images > 1 for entry in self._study.sets),
      ties=self._study.settings.ties,
    )

  def rate(self, request: Request) -> Response:
    """The question that a rater is to answer now, or thanks."""
    rater = self._rater(request)
    more = "more" in request.query_params
    question = self._votes.next(rater, more=more)
    answered = self._votes.answered(rater)
    shared = {
      "answered": len(answered),
      "questions": max(self._plan.questions, len(answered) + (question is not None)),
      "last": answered[-1].id if answered else None,
      "more": more,
    }
    if question is None:
      return self._html("done.html", request, **shared)
    item = self._study.items[self._pairs[question.pair].item]
    entry = self._study.sets[item.set]
    return self._html(
      "question.html",
      request,
      question=question.id,
      prompt=item.text,
      images=entry.images,
      variety=entry.ask == VARIETY,
      ties=self._study.settings.ties,
      asks={entry.ask},
      sets=entry.images > 1,
      pixelated=self._is_small,
      **shared,
    )

  async def vote(self, request: Request) -> Response:
    """Stores an answer; it is on the disk before the browser hears of it."""
    rater = self._rater(request)
    form = await _form(request)
    allowed = (*SIDES, TIE) if self._study.settings.ties else SIDES
    answer = form.get("answer", "")
    if answer not in allowed:
      raise HTTPException(400, f"answer one of {', '.join(allowed)}")
    question = _number(form.get("question", ""))
    if not await run_in_threadpool(self._votes.answer, rater, question, answer):
      raise HTTPException(404)
    return _onward(request, form)

  async def undo(self, request: Request) -> Response:
    """Takes an answer back."""
    rater = self._rater(request)
    form = await _form(request)
    question = _number(form.get("question", ""))
    if not await run_in_threadpool(self._votes.undo, rater, question):
      raise HTTPException(404)
    return _onward(request, form)

  def picture(self, request: Request) -> Response:
    """A picture of a question to this rater. Its address says nothing of who drew it."""
    rater = self._rater(request)
    path = request.path_params
    question = self._votes.find(rater, _number(path["question"]))
    if question is None or path["side"] not in SIDES:
      raise HTTPException(404)
    file = self._file_of(question, path["side"], _number(path["number"]))
    # Not as a file with its time, which is earlier for the model that drew first. Browsers keep it
    # while a rater goes back and forth.
    headers = {"Cache-Control": "private, max-age=86400"}
    return Response(file.read_bytes(), media_type="image/png", headers=headers)

  def _file_of(self, question: Question, side: str, number: int) -> pathlib.Path:
    pair = self._pairs[question.pair]
    if not 0 <= number < self._study.sets[self._study.items[pair.item].set].images:
      raise HTTPException(404)
    is_first = (side == "left") != question.flipped
    return self._study.picture(pair.item, pair.first if is_first else pair.second, number)

  @functools.cached_property
  def _is_small(self) -> bool:
    with PIL.Image.open(self._study.picture(0, 0, 0)) as picture:
      return max(picture.size) < _SMALL

  # ------------------------------------------------------------------ organizer

  def outcome(self, request: Request) -> Response:
    """How far the raters are, and what they say."""
    self._organizer(request)
    found = self._found()
    two = {(one.liked, one.other): one for one in found.rates}
    return self._html(
      "results.html",
      request,
      sentences=[results.sentence(one) for one in two.values()],
      tables=[results.rates_table(found), results.raters_table(found)],
      votes=sum(one.votes for one in found.raters),
      wanted=len(self._pairs) * self._plan.raters_per_pair,
    )

  def results_json(self, request: Request) -> Response:
    """All figures."""
    self._organizer(request)
    content = json.dumps(results.to_json(self._study, self._found()), indent=1)
    return Response(content, media_type="application/json")

  def votes_csv(self, request: Request) -> Response:
    """All votes."""
    self._organizer(request)
    table = results.votes_table(self._study, self._votes.answered())
    return Response(table.csv(), media_type="text/csv")

  def _found(self) -> results.Results:
    return results.find(self._study, self._votes.answered(), min_consistency=self._min_consistency)

  # ------------------------------------------------------------------ both

  def file(self, request: Request) -> Response:
    """The style and the script; nothing else by any name."""
    token, name = request.path_params["token"], request.path_params["file"]
    known = self._links.find_rater(token) or self._links.is_organizer(token)
    if not known or name not in _FILES:
      raise HTTPException(404)
    return FileResponse(_TEMPLATES / name, media_type=_FILES[name])

  def _rater(self, request: Request) -> int:
    rater = self._links.find_rater(request.path_params["token"])
    if rater is None:
      raise HTTPException(404)
    return rater

  def _organizer(self, request: Request) -> None:
    if not self._links.is_organizer(request.path_params["token"]):
      raise HTTPException(404)

  def _html(self, template: str, request: Request, **values: Any) -> Response:
    where = "/".join(request.url.path.split("/")[:3])
    return HTMLResponse(_PAGES.get_template(template).render(where=where, **values))


def _onward(request: Request, form: dict[str, str]) -> Response:
  """Sends the browser to what is next, so that reloading the page repeats nothing."""
  where = request.url.path.rpartition("/")[0] + "/rate"
  return RedirectResponse(where + ("?more=1" if form.get("more") else ""), 303)


async def _form(request: Request) -> dict[str, str]:
  """The fields of a form, of bounded size.

  Raises:
    HTTPException: it is larger, or no text.
  """
  body = b""
  async for part in request.stream():
    body += part
    if len(body) > _BODY_BYTES:
      raise HTTPException(413, "too large")
  try:
    return dict(urllib.parse.parse_qsl(body.decode("ascii"), strict_parsing=bool(body)))
  except ValueError:
    raise HTTPException(400, "not a form") from None


def _number(text: str) -> int:
  """The id of a question; -1, which none has, for anything else."""
  return int(text) if text.isascii() and text.isdecimal() and len(text) < 18 else -1
