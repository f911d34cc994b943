"""What raters were asked and what they answered, in SQLite."""

from collections.abc import Iterator
import contextlib
import dataclasses
import os
import random
import sqlite3
import threading
import time

from rlft.storage import files
from rlft.types import UserError

SIDES = ("left", "right")
TIE = "tie"

_OPEN_S = 3600  # after which others are asked what somebody has not answered
_SCHEMA = """
CREATE TABLE IF NOT EXISTS questions (
  id INTEGER PRIMARY KEY,
  rater INTEGER NOT NULL,
  place INTEGER NOT NULL,
  pair INTEGER NOT NULL,
  flipped INTEGER NOT NULL,
  again INTEGER NOT NULL,
  shown_at REAL NOT NULL,
  answer TEXT CHECK (answer IN ('left', 'right', 'tie')),
  answered_at REAL,
  UNIQUE (rater, place),
  UNIQUE (rater, pair, again)
) STRICT;
CREATE INDEX IF NOT EXISTS by_pair ON questions (again, pair);
"""


@dataclasses.dataclass(frozen=True)
class Question:
  """A pair as one rater is shown it.

  Attributes:
    id: of the question, never used for another.
    rater: from 1.
    place: in the rater's order, from 0.
    pair: which.
    flipped: whether the first of the pair is on the right.
    again: whether the rater has been shown the pair before.
    answer: 'left', 'right' or 'tie'; None as long as there is none.
    seconds: from the last time it was shown to the answer; None as long as there is none.
  """

  id: int
  rater: int
  place: int
  pair: int
  flipped: bool
  again: bool
  answer: str | None
  seconds: float | None

  @property
  def value(self) -> float:
    """1 if the second of the pair was preferred, 0 if the first, 0.5 for a tie."""
    return 0.5 if self.answer == TIE else float((self.answer == "right") != self.flipped)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Who is asked how much.

  Attributes:
    pairs: how many there are.
    raters: among whom they are shared out.
    raters_per_pair: how many compare each pair.
    checks: share of a rater's pairs that are shown a second time.
    seed: of orders and sides.
  """

  pairs: int
  raters: int
  raters_per_pair: int
  checks: float
  seed: int

  @property
  def share(self) -> int:
    """Different pairs of each rater."""
    return min(self.pairs, -(-self.pairs * self.raters_per_pair // self.raters))

  def repeats(self, pairs: int) -> int:
    """Repetitions that belong to so many pairs."""
    return int(self.checks * pairs + 1e-9)

  @property
  def questions(self) -> int:
    """What each rater is asked in all."""
    return self.share + self.repeats(self.share)


class Votes:
  """The questions and answers of a comparison.

  An answer is on the disk when `answer` returns: a server that is killed loses none. Several
  threads and several processes may use one file.
  """

  def __init__(self, path: str | os.PathLike[str], plan: Plan):
    """Opens the file, which is made where it is missing.

    Raises:
      UserError: it cannot be opened, or is no such file.
    """
    self._plan, self._lock = plan, threading.Lock()
    with files.writing(path):
      os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    try:
      self._db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
      self._db.execute("PRAGMA journal_mode=WAL")
      self._db.execute("PRAGMA synchronous=FULL")
      self._db.executescript(_SCHEMA)
    except sqlite3.Error as error:
      raise UserError(f"{path} holds no votes ({error}): move the file away") from error

  def close(self) -> None:
    """Closes the file."""
    self._db.close()

  def next(self, rater: int, *, more: bool = False) -> Question | None:
    """What a rater is to answer now; None if that is all.

    Args:
      rater: from 1.
      more: beyond the rater's share, what others have left.
    """
    with self._writing() as db:
      row = db.execute(
        "SELECT id FROM questions WHERE rater = ? AND answer IS NULL ORDER BY place LIMIT 1",
        (rater,),
      ).fetchone()
      if row:
        db.execute("UPDATE questions SET shown_at = ? WHERE id = ?", (time.time(), row[0]))
        return self._find("id = ?", row[0])[0]
      asked = self._find("rater = ?", rater)
      chosen = self._choose(rater, asked, more)
      if chosen is None:
        return None
      pair, again, flipped = chosen
      new = (rater, len(asked), pair, flipped, again, time.time())
      cursor = db.execute(
        "INSERT INTO questions (rater, place, pair, flipped, again, shown_at)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        new,
      )
      return self._find("id = ?", cursor.lastrowid)[0]

  def answer(self, rater: int, question: int, answer: str) -> bool:
    """Stores an answer, in the place of an earlier one to the same question.

    Args:
      rater: who answers.
      question: its id.
      answer: 'left', 'right' or 'tie'.

    Returns:
      Whether it is a question to that rater.
    """
    with self._writing() as db:
      cursor = db.execute(
        "UPDATE questions SET answer = ?, answered_at = ? WHERE id = ? AND rater = ?",
        (answer, time.time(), question, rater),
      )
      return cursor.rowcount == 1

  def undo(self, rater: int, question: int) -> bool:
    """Takes an answer back, so that the question comes again.

    Returns:
      Whether it is a question to that rater.
    """
    with self._writing() as db:
      cursor = db.execute(
        "UPDATE questions SET answer = NULL, answered_at = NULL WHERE id = ? AND rater = ?",
        (question, rater),
      )
      return cursor.rowcount == 1

  def find(self, rater: int, question: int) -> Question | None:
    """A question to a rater; None if there is none of this id."""
    with self._lock:
      return next(iter(self._find("id = ? AND rater = ?", question, rater)), None)

  def answered(self, rater: int | None = None) -> list[Question]:
    """What has been answered, of all raters or of one, in the order of questions."""
    with self._lock:
      if rater is None:
        return self._find("answer IS NOT NULL")
      return self._find("answer IS NOT NULL AND rater = ?", rater)

  def _choose(self, rater: int, asked: list[Question], more: bool) -> tuple[int, bool, bool] | None:
    """A pair, whether it comes again, and whether it is flipped; None if there is none."""
    rng = random.Random(f"{self._plan.seed}/{rater}/{len(asked)}")
    flipped = rng.random() < 0.5
    fresh = [question.pair for question in asked if not question.again]
    repeated = {question.pair for question in asked if question.again}
    if len(repeated) < self._plan.repeats(len(fresh)):
      # Some that were seen longest ago.
      older = [pair for pair in fresh[: (len(fresh) + 1) // 2] if pair not in repeated]
      older = older or [pair for pair in fresh if pair not in repeated]
      return rng.choice(older), True, flipped
    if len(fresh) >= self._plan.share and not more:
      return None
    counts = self._counts()
    seen = set(fresh)
    wanted = [
      pair
      for pair in range(self._plan.pairs)
      if pair not in seen and counts.get(pair, 0) < self._plan.raters_per_pair
    ]
    if not wanted:
      return None
    fewest = min(counts.get(pair, 0) for pair in wanted)
    return rng.choice([pair for pair in wanted if counts.get(pair, 0) == fewest]), False, flipped

  def _counts(self) -> dict[int, int]:
    """How many compare each pair: have done so, or were asked to and may still do it."""
    rows = self._db.execute(
      "SELECT pair, COUNT(*) FROM questions WHERE again = 0"
      " AND (answer IS NOT NULL OR shown_at > ?) GROUP BY pair",
      (time.time() - _OPEN_S,),
    )
    return dict(rows.fetchall())

  def _find(self, where: str, *values: int) -> list[Question]:
    rows = self._db.execute(
      "SELECT id, rater, place, pair, flipped, again, answer, answered_at - shown_at"
      f" FROM questions WHERE {where} ORDER BY rater, place",
      values,
    )
    return [
      Question(*ids, flipped=bool(flipped), again=bool(again), answer=answer, seconds=seconds)
      for *ids, flipped, again, answer, seconds in rows.fetchall()
    ]

  @contextlib.contextmanager
  def _writing(self) -> Iterator[sqlite3.Connection]:
    """A transaction, alone among threads and processes; on the disk at its end."""
    with self._lock:
      self._db.execute("BEGIN IMMEDIATE")
      try:
        yield self._db
        self._db.execute("COMMIT")
      except BaseException:
        if self._db.in_transaction:
          self._db.execute("ROLLBACK")
        raise
