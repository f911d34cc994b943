"""Fifty raters at once, while the server of the rating page is killed again and again.

python experiments/rating_load.py

Makes a comparison of small pictures, serves it by launch/rate.py on a port of this machine, lets
the raters answer over HTTP as browsers do, and kills the server with SIGKILL in the middle, several
times; each time it is started again. Every answer that the server acknowledged must be in the file
at the end, as it was given, and none twice; it ends with status 1 otherwise. To be printed:

    50 raters, 20 pairs each, 3 kills: 1,000 acknowledged, 0 lost, 0 changed, 0 twice

Needs the extra rating.
"""

import collections
from concurrent import futures
import json
import pathlib
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.parse

import numpy as np
import urllib3

from rlft.storage import images

ROOT = pathlib.Path(__file__).parents[1]
RATERS, PAIRS, KILLS = 50, 20, 3
LIMIT_S = 3000
_FORM = {"Content-Type": "application/x-www-form-urlencoded"}
# In the form of the answer, not in that which takes the last one back.
QUESTION = re.compile(r'id="vote">\s*<input type="hidden" name="question" value="(\d+)">')


def write_folder(folder: pathlib.Path, level: int) -> None:
  """Pictures of one brightness with a list of their prompts."""
  folder.mkdir()
  rows = []
  for place in range(PAIRS):
    images.save_png(folder / f"{place}.png", np.full((32, 32, 3), level + place, np.uint8))
    rows.append(json.dumps({"file_name": f"{place}.png", "text": f"thing {place}"}) + "\n")
  (folder / "metadata.jsonl").write_text("".join(rows))


class Server:
  """launch/rate.py in a process of its own."""

  def __init__(self, folder: pathlib.Path):
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      self._port = probe.getsockname()[1]
    self._folder, self.links = folder, []

  def start(self, *models: str) -> None:
    """Starts it, and waits for its links."""
    command = [sys.executable, ROOT / "launch" / "rate.py", *models, "--output=study"]
    command += [f"--raters={RATERS}", f"--port={self._port}"]
    self._process = subprocess.Popen(command, cwd=self._folder, stdout=subprocess.PIPE, text=True)
    self.links = []
    for line in self._process.stdout:
      if "/r/" in line:
        self.links.append(line.strip())
      if len(self.links) == RATERS:
        return
    raise SystemExit("the server did not start")

  def end(self, number: int) -> None:
    """Ends it by a signal."""
    self._process.send_signal(number)
    self._process.communicate(timeout=60)


def rate(link: str, number: int, said: list, end: float) -> None:
  """Answers all that a rater is asked; repeats what is not acknowledged, as the page does."""
  rng = random.Random(number)
  pool = urllib3.PoolManager(retries=False, timeout=30)

  def ask(method, address, fields=None):
    body = urllib.parse.urlencode(fields) if fields else None
    while time.monotonic() < end:
      try:
        answer = pool.request(method, address, body=body, headers=_FORM, redirect=False)
        if answer.status < 500:
          return answer
      except urllib3.exceptions.HTTPError:
        pass
      time.sleep(0.3)
    raise TimeoutError(link)

  while found := QUESTION.search(page(ask, link)):
    question, choice = int(found[1]), rng.choice(["left", "right", "tie"])
    if rng.random() < 0.3:
      assert ask("GET", f"{link}/picture/{question}/left/0").status == 200
    answer = ask("POST", f"{link}/vote", {"question": str(question), "answer": choice})
    assert answer.status == 303, answer.status
    said.append((number, question, choice))


def page(ask, link: str) -> str:
  """The question page."""
  answer = ask("GET", f"{link}/rate")
  assert answer.status == 200, answer.status
  return answer.data.decode()


def main() -> None:
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write_folder(folder / "one", 10)
    write_folder(folder / "two", 100)
    server = Server(folder)
    server.start("--models=one", "--models=two", f"--raters_per_pair={RATERS}", "--checks=0")
    said, end = [], time.monotonic() + LIMIT_S
    start = time.monotonic()
    with futures.ThreadPoolExecutor(RATERS) as pool:
      raters = [
        pool.submit(rate, link, number, said, end)
        for number, link in enumerate(server.links, start=1)
      ]
      for kill in range(1, KILLS + 1):
        while len(said) < kill * RATERS * PAIRS // (KILLS + 1):
          for one in raters:
            if one.done():
              one.result()  # Raises what went wrong.
          time.sleep(0.01)
        server.end(signal.SIGKILL)
        print(f"killed after {len(said)} answers", flush=True)
        links = server.links
        server.start()
        assert server.links == links
      for one in raters:
        one.result()
    seconds = time.monotonic() - start
    server.end(signal.SIGINT)
    rows = (folder / "study" / "results-votes.csv").read_text().splitlines()[1:]
    check(folder, said, rows)
    print(f"{seconds:.0f} s", flush=True)


def check(folder: pathlib.Path, said: list, rows: list[str]) -> None:
  """Compares what was acknowledged with what is in the file."""
  with sqlite3.connect(folder / "study" / "votes.sqlite") as db:
    stored = dict(db.execute("SELECT id, answer FROM questions WHERE answer IS NOT NULL"))
    twice = db.execute(
      "SELECT COUNT(*) FROM (SELECT 1 FROM questions GROUP BY rater, pair HAVING COUNT(*) > 1)"
    ).fetchone()[0]
  lost = sum(question not in stored for _, question, _ in said)
  changed = sum(stored.get(question, choice) != choice for _, question, choice in said)
  each = collections.Counter(number for number, *_ in said)
  print(
    f"{len(each)} raters, {PAIRS} pairs each, {KILLS} kills: {len(said):,} acknowledged,"
    f" {lost} lost, {changed} changed, {twice} twice"
  )
  whole = len(said) == len(stored) == len(rows) == RATERS * PAIRS and set(each.values()) == {PAIRS}
  if lost or changed or twice or not whole:
    raise SystemExit(1)


if __name__ == "__main__":
  main()
