"""Fifty raters at once, while the server of the rating page is killed again and again.

python experiments/rating_load.py --raters=50 --pairs=20 --kills=3

Makes a comparison of small pictures, serves it by launch/rate.py on a port of this machine, and
lets raters answer over HTTP as browsers do: they read pages, look at pictures, vote, now and then
take a vote back, and now and then send something hostile. The server is killed with SIGKILL in the
middle, several times, and started again on the same port; raters repeat what was not acknowledged.
After each kill and at the end the votes in the file must be those that were acknowledged, none
lost, changed or twice, and whatever is hostile must be refused; otherwise this fails. How long
requests took is printed; experiments/rating_load.md has what this printed.

Needs the extra rating.
"""

import collections
from collections.abc import Mapping, Sequence
from concurrent import futures
import dataclasses
import json
import pathlib
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse

from absl import app, flags
import numpy as np
import urllib3

from rlft.evaluation.tables import Table
from rlft.storage import images

_RATERS = flags.DEFINE_integer("raters", 50, "at once", lower_bound=2)
_PAIRS = flags.DEFINE_integer("pairs", 20, "that each rater compares", lower_bound=1)
_KILLS = flags.DEFINE_integer("kills", 3, "of the server", lower_bound=0)
_THINK = flags.DEFINE_float(
  "think_s", 0.0, "mean of a rater's pause before a vote, in seconds; 0: as fast as possible", 0.0
)
_SEED = flags.DEFINE_integer("seed", 0, "of what raters do")

_ROOT = pathlib.Path(__file__).parents[1]
_UNDONE = 0.1  # share of votes that are taken back
_HOSTILE = 0.2  # share of votes before which something hostile is sent
_LOOKED_AT = 0.3  # share of votes before which the pictures are fetched: browsers keep them
_RETRY_S = 0.3
_PATIENCE_S = 600.0  # without an answer, or until the server is up
_SCRIPT = "<script>alert(1)</script>"
# In the form of the vote, not in that which takes the last one back.
_QUESTION = re.compile(r'id="vote">\s*<input type="hidden" name="question" value="(\d+)">')
_PNG = b"\x89PNG"

Answers = Mapping[int, str | None]  # by question; None where there is no answer, or none any more


class Server:
  """launch/rate.py in a process of its own, always on the same port."""

  def __init__(self, folder: pathlib.Path, raters: int):
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      self._port = probe.getsockname()[1]
    self._folder, self._raters = folder, raters
    self.links: list[str] = []
    self.log = folder / "server.log"

  def start(self, *arguments: str) -> float:
    """Starts it, and waits for its links; the seconds that took."""
    begun = time.monotonic()
    command = [sys.executable, _ROOT / "launch" / "rate.py", "--output=study", *arguments]
    command += [f"--raters={self._raters}", f"--port={self._port}"]
    with self.log.open("a") as log:
      self._process = subprocess.Popen(
        command, cwd=self._folder, stdout=subprocess.PIPE, stderr=log, text=True
      )
    links = []
    for line in self._process.stdout:
      if "/r/" in line:
        links.append(line.strip())
      if len(links) == self._raters:
        break
    else:
      raise SystemExit(f"the server did not start: {self.log.read_text()}")
    if self.links and links != self.links:
      raise SystemExit("the links are others than before")
    self.links = links
    return time.monotonic() - begun

  def end(self, number: int) -> None:
    """Ends it by a signal, and waits until it is gone."""
    self._process.send_signal(number)
    self._process.communicate(timeout=_PATIENCE_S)


class Record:
  """What raters sent and heard, written by all their threads.

  Attributes:
    acknowledged: of each question, the answer that the server acknowledged last.
    waiting: of each question, what was sent and is not acknowledged yet.
    votes, undone, hostile, repeated: how many votes and undone ones were acknowledged, hostile
      requests refused, attempts repeated.
    seconds: how long each attempt that was answered took, by what was asked.
    stop: set to let the raters end.
  """

  def __init__(self):
    self.acknowledged: dict[int, str | None] = {}
    self.waiting: dict[int, str | None] = {}
    self.votes = self.undone = self.hostile = self.repeated = 0
    self.seconds = collections.defaultdict(list)
    self.stop = threading.Event()
    self._lock = threading.Lock()

  def sent(self, question: int, answer: str | None) -> None:
    """Notes an answer, or None that takes one back, before it is sent."""
    with self._lock:
      self.waiting[question] = answer

  def heard(self, question: int) -> None:
    """Notes that what was sent is acknowledged."""
    with self._lock:
      answer = self.acknowledged[question] = self.waiting.pop(question)
      if answer is None:
        self.undone += 1
      else:
        self.votes += 1

  def took(self, what: str, seconds: float) -> None:
    """Notes how long an attempt took."""
    with self._lock:
      self.seconds[what].append(seconds)

  def count(self, what: str) -> None:
    """Adds one to `hostile` or `repeated`."""
    with self._lock:
      setattr(self, what, getattr(self, what) + 1)

  def copy(self) -> tuple[Answers, Answers]:
    """What is acknowledged, and what waits."""
    with self._lock:
      return dict(self.acknowledged), dict(self.waiting)


class Rater:
  """A rater with a browser."""

  def __init__(self, number: int, links: Sequence[str], record: Record, seed: int, think_s: float):
    self._link, self._others = links[number], [*links[:number], *links[number + 1 :]]
    self._record, self._think_s = record, think_s
    self._rng = random.Random(f"{seed}/{number}")
    self._pool = urllib3.PoolManager(retries=False, timeout=30)

  def rate(self) -> None:
    """Answers all that is asked.

    Raises:
      AssertionError: the server did what it must not do.
      TimeoutError: it does not answer.
    """
    rng = self._rng
    while question := self._question():
      if rng.random() < _LOOKED_AT:
        for side in ("left", "right"):
          shown = self._ask("picture", "GET", f"{self._link}/picture/{question}/{side}/0")
          assert shown.status == 200 and shown.data.startswith(_PNG), shown.status
      if self._think_s:
        time.sleep(rng.expovariate(1 / self._think_s))
      if rng.random() < _HOSTILE:
        self._attack(question)
      self._send("vote", question, rng.choice(("left", "right", "tie")))
      if rng.random() < _UNDONE:
        self._send("undo", question, None)
        assert self._question() == question, "what was taken back does not come again"

  def _question(self) -> int | None:
    answer = self._ask("page", "GET", f"{self._link}/rate")
    assert answer.status == 200, answer.status
    text = answer.data.decode()
    assert _SCRIPT not in text, "a prompt has become part of the page"
    found = _QUESTION.search(text)
    return int(found[1]) if found else None

  def _send(self, what: str, question: int, answer: str | None) -> None:
    fields = {"question": question} | ({"answer": answer} if answer else {})
    self._record.sent(question, answer)
    got = self._ask(what, "POST", f"{self._link}/{what}", fields)
    assert got.status == 303, f"{what}: {got.status}"
    self._record.heard(question)

  def _attack(self, question: int) -> None:
    """Sends one hostile request; it must be refused, and its answer must not repeat it."""
    rng, link, other = self._rng, self._link, self._rng.choice(self._others)
    token = link.rpartition("/")[2]
    forged = f"{token.partition('-')[0]}-{other.rpartition('-')[2]}"
    method, address, fields, headers = rng.choice(
      [
        ("POST", f"{other}/vote", {"question": question, "answer": "left"}, {}),
        ("POST", f"{other}/undo", {"question": question}, {}),
        ("GET", f"{other}/picture/{question}/left/0", None, {}),
        (
          "POST",
          link.replace(token, forged) + "/vote",
          {"question": question, "answer": "tie"},
          {},
        ),
        ("GET", link.replace(token, forged) + "/rate", None, {}),
        ("GET", link.replace(f"/r/{token}", f"/o/{token}"), None, {}),
        ("POST", f"{link}/vote", {"question": f"{question} OR 1=1", "answer": "left"}, {}),
        ("POST", f"{link}/vote", {"question": question, "answer": "'; DROP TABLE questions"}, {}),
        ("POST", f"{link}/vote", {"question": question, "answer": _SCRIPT}, {}),
        ("GET", f"{link}/picture/{question}/left/..%2f..%2f..%2fvotes.sqlite", None, {}),
        ("GET", f"{link}/picture/{question}/..%2f..%2fkey/0", None, {}),
        ("GET", f"{link}/..%2f..%2fkey", None, {}),
        (
          "POST",
          f"{link}/vote",
          {"question": question, "answer": "left"},
          {"Origin": "http://elsewhere.example"},
        ),
      ]
    )
    answer = self._ask("hostile", method, address, fields, headers)
    sent = f"{method} {address} {fields} {headers}"
    assert answer.status in (400, 404) and len(answer.data) < 50, f"{sent}: {answer.status}"
    assert _SCRIPT.encode() not in answer.data, sent
    self._record.count("hostile")

  def _ask(self, what, method, address, fields=None, headers=()):
    """Asks until there is an answer, as the page does."""
    body = urllib.parse.urlencode(fields) if fields else None
    headers = {"Content-Type": "application/x-www-form-urlencoded", **dict(headers)}
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end and not self._record.stop.is_set():
      begun = time.monotonic()
      try:
        answer = self._pool.request(method, address, body=body, headers=headers, redirect=False)
      except urllib3.exceptions.HTTPError:
        answer = None
      if answer is not None and answer.status != 503:  # Which asks to be repeated.
        self._record.took(what, time.monotonic() - begun)
        return answer
      self._record.count("repeated")
      time.sleep(_RETRY_S)
    raise TimeoutError(address)


@dataclasses.dataclass(frozen=True)
class Differences:
  """How the file differs from what was acknowledged.

  Attributes:
    lost: questions whose acknowledged answer is not there.
    changed: questions with another answer than was acknowledged, or with one that was taken back.
    ahead: questions of which the file has what was sent and not acknowledged yet, which is right.
  """

  lost: int
  changed: int
  ahead: int


def compare(stored: Answers, acknowledged: Answers, waiting: Answers) -> Differences:
  """Compares the answers in the file with those that raters know of."""
  lost = changed = ahead = 0
  for question in {*stored, *acknowledged, *waiting}:
    there, known = stored.get(question), acknowledged.get(question)
    if there == known:
      continue
    if question in waiting and there == waiting[question]:
      ahead += 1
    elif there is None:
      lost += 1
    else:
      changed += 1
  return Differences(lost, changed, ahead)


def read(study: pathlib.Path) -> Answers:
  """The answers in the file as a killed server left it, which is not touched.

  Raises:
    SystemExit: the file is damaged, or has a vote twice.
  """
  with tempfile.TemporaryDirectory() as name:
    for path in study.glob("votes.sqlite*"):
      shutil.copy(path, name)
    db = sqlite3.connect(pathlib.Path(name) / "votes.sqlite")
    state = db.execute("PRAGMA integrity_check").fetchone()[0]
    rows = db.execute("SELECT id, rater, pair, again, answer FROM questions").fetchall()
    db.close()
  pairs = collections.Counter(row[1:4] for row in rows)
  if state != "ok" or any(count > 1 for count in pairs.values()):
    raise SystemExit(f"the file of votes: {state}, {pairs.most_common(1)}")
  return {question: answer for question, *_, answer in rows if answer is not None}


def write_folder(folder: pathlib.Path, level: int, pairs: int) -> None:
  """Pictures of one brightness with a list of their prompts, which are hostile."""
  folder.mkdir()
  rows = []
  for place in range(pairs):
    images.save_png(folder / f"{place}.png", np.full((32, 32, 3), level, np.uint8))
    text = f"{_SCRIPT} {place}' OR 1=1; DROP TABLE questions -- {{{{ 7 * 7 }}}} ../../key"
    rows.append(json.dumps({"file_name": f"{place}.png", "text": text}) + "\n")
  (folder / "metadata.jsonl").write_text("".join(rows))


def load(
  folder: pathlib.Path, *, raters: int, pairs: int, kills: int, think_s: float, seed: int
) -> Record:
  """Lets raters rate while the server is killed.

  Args:
    folder: empty; for everything.
    raters: at once.
    pairs: that each compares.
    kills: of the server, spread evenly over the votes.
    think_s: see the flag.
    seed: of what raters do.

  Returns:
    What they sent and heard.

  Raises:
    SystemExit: a vote is lost, changed or twice.
    AssertionError, TimeoutError: see `Rater.rate`.
  """
  for name, level in (("one", 10), ("two", 100)):
    write_folder(folder / name, level, pairs)
  server, record = Server(folder, raters), Record()
  fresh = ("--models=one", "--models=two", f"--raters_per_pair={raters}", "--checks=0")
  server.start(*fresh)
  try:
    with futures.ThreadPoolExecutor(raters) as pool:
      given = [Rater(k, server.links, record, seed, think_s) for k in range(raters)]
      rating = [pool.submit(one.rate) for one in given]
      try:
        for kill in range(1, kills + 1):
          while record.votes < kill * raters * pairs // (kills + 1):
            _raise_failures(rating)
            time.sleep(0.005)
          server.end(signal.SIGKILL)
          check(f"killed after {record.votes:,} votes", folder / "study", record)
          print(f"  up again after {server.start():.1f} s", flush=True)
        for one in futures.as_completed(rating):
          one.result()
      finally:
        record.stop.set()
  finally:
    server.end(signal.SIGINT)
  check("at the end", folder / "study", record)
  rows = (folder / "study" / "results-votes.csv").read_text().splitlines()[1:]
  if not len(record.acknowledged) == len(rows) == raters * pairs:
    raise SystemExit(f"{len(rows)} votes were exported, of {len(record.acknowledged)}")
  if "Traceback" in (log := server.log.read_text()):
    raise SystemExit(log)
  return record


def check(when: str, study: pathlib.Path, record: Record) -> None:
  """Prints how the file of votes compares with what was acknowledged.

  Raises:
    SystemExit: a vote is lost or changed.
  """
  acknowledged, waiting = record.copy()
  found = compare(read(study), acknowledged, waiting)
  print(
    f"{when}: {found.lost} lost, {found.changed} changed, {found.ahead} stored of those not yet"
    " acknowledged",
    flush=True,
  )
  if found.lost or found.changed:
    raise SystemExit(1)


def _raise_failures(rating: Sequence[futures.Future]) -> None:
  for one in rating:
    if one.done():
      one.result()


def latencies(seconds: Mapping[str, Sequence[float]]) -> Table:
  """How long attempts took that were answered, in milliseconds."""
  rows = []
  for what in sorted(seconds):
    figures = [*np.percentile(seconds[what], [50, 95]), max(seconds[what])]
    rows.append([what, f"{len(seconds[what]):,}", *(f"{1000 * figure:.0f}" for figure in figures)])
  return Table(["request", "answered", "median ms", "p95 ms", "longest ms"], rows)


def main(_: Sequence[str]) -> None:
  begun = time.monotonic()
  with tempfile.TemporaryDirectory() as name:
    record = load(
      pathlib.Path(name),
      raters=_RATERS.value,
      pairs=_PAIRS.value,
      kills=_KILLS.value,
      think_s=_THINK.value,
      seed=_SEED.value,
    )
  print(
    f"{_RATERS.value} raters, {_PAIRS.value} pairs each, {_KILLS.value} kills:"
    f" {record.votes:,} votes acknowledged, {record.undone} taken back,"
    f" {len(record.acknowledged):,} in the file, each once, 0 lost; {record.hostile} hostile"
    f" requests refused, {record.repeated:,} attempts repeated, {time.monotonic() - begun:.0f} s\n"
  )
  print(latencies(record.seconds).markdown())


if __name__ == "__main__":
  app.run(main)
