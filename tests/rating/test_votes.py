"""Who is asked what, and that answers stay."""

from concurrent import futures
import sqlite3
import time

import pytest

from rlft.rating.votes import Plan, Votes
from rlft.types import UserError


def plan(pairs=6, raters=3, raters_per_pair=2, checks=0.0, seed=0):
  return Plan(pairs, raters, raters_per_pair, checks, seed)


@pytest.fixture
def make(tmp_path):
  opened = []

  def make(given, name="votes.sqlite"):
    opened.append(Votes(tmp_path / name, given))
    return opened[-1]

  yield make
  for votes in opened:
    votes.close()


def answer_all(votes, rater, answer="left", **more):
  asked = []
  while question := votes.next(rater, **more):
    asked.append(question)
    assert votes.answer(rater, question.id, answer)
  return asked


def test_shares():
  # 6 pairs x 2 raters / 3 people = 4 each; a repetition for every second one makes 6.
  assert (plan().share, plan(checks=0.5).questions) == (4, 6)
  assert plan(raters=1).share == 6  # Nobody sees a pair twice to make up for others.
  assert plan(raters=5).share == 3  # 12 / 5, rounded up.
  assert plan(checks=0.1).repeats(10) == 1 and plan(checks=0.3).repeats(10) == 3


def test_every_pair_gets_its_raters(make):
  votes = make(plan())
  for rater in (1, 2, 3):
    pairs = [question.pair for question in answer_all(votes, rater)]
    assert len(pairs) == len(set(pairs)) == 4
  counts = [sum(vote.pair == pair for vote in votes.answered()) for pair in range(6)]
  assert counts == [2] * 6
  assert votes.next(1) is None and votes.next(1, more=True) is None


def test_who_wants_more_gets_what_others_left(make):
  votes = make(plan())
  assert len(answer_all(votes, 1)) == 4
  assert len(answer_all(votes, 1, more=True)) == 2
  assert votes.next(1, more=True) is None


def test_orders_and_sides_are_random_and_the_same_again(make):
  given = plan(pairs=40, raters=2)
  one, other = answer_all(make(given), 1), answer_all(make(given, "other"), 1)
  assert [(q.pair, q.flipped) for q in one] == [(q.pair, q.flipped) for q in other]
  second = answer_all(make(given), 2)
  assert [q.pair for q in one] != [q.pair for q in second] != list(range(40))
  assert sorted(q.pair for q in one) == list(range(40))
  # 40 fair coins leave this range once in 10,000 times.
  assert 8 <= sum(q.flipped for q in one) <= 32


def test_pairs_that_come_again(make):
  votes = make(plan(pairs=10, raters=2, checks=0.3))
  asked = answer_all(votes, 1)
  again = [question for question in asked if question.again]
  assert (len(asked), len(again)) == (13, 3)
  for question in again:
    (first,) = [q for q in asked if q.pair == question.pair and not q.again]
    assert question.place >= first.place + 2


def test_a_rater_goes_on_where_it_stopped(make):
  votes = make(plan())
  first = votes.next(1)
  assert votes.next(1).id == first.id
  votes.answer(1, first.id, "tie")
  second = votes.next(1)
  votes.close()
  assert make(plan()).next(1).id == second.id


def test_undo_brings_the_question_back(make):
  votes = make(plan())
  first = votes.next(1)
  votes.answer(1, first.id, "left")
  second = votes.next(1)
  assert votes.undo(1, first.id) and votes.undo(1, first.id)  # Sent twice, it does the same.
  assert votes.next(1).id == first.id and votes.answered() == []
  votes.answer(1, first.id, "right")
  assert votes.next(1).id == second.id
  assert [vote.answer for vote in votes.answered()] == ["right"]


def test_nobody_answers_for_others(make):
  votes = make(plan())
  mine = votes.next(1)
  assert not votes.answer(2, mine.id, "left") and not votes.undo(2, mine.id)
  assert votes.find(2, mine.id) is None and votes.find(1, mine.id).pair == mine.pair
  assert votes.answered() == []


def test_no_other_answers_are_stored(make):
  votes = make(plan())
  question = votes.next(1)
  with pytest.raises(sqlite3.IntegrityError):
    votes.answer(1, question.id, "left'; DROP TABLE questions; --")
  assert votes.next(1).id == question.id  # The transaction was taken back.


@pytest.mark.parametrize(
  ("answer", "flipped", "value"),
  [
    ("left", False, 0),
    ("right", False, 1),
    ("left", True, 1),
    ("right", True, 0),
    ("tie", True, 0.5),
  ],
)
def test_value(make, answer, flipped, value):
  votes = make(plan(pairs=40, raters=2))
  while (question := votes.next(1)).flipped != flipped:
    votes.answer(1, question.id, "tie")
  votes.answer(1, question.id, answer)
  assert votes.answered()[-1].value == value


def test_what_is_open_too_long_is_given_to_others(make, monkeypatch):
  votes = make(plan(pairs=1, raters=2, raters_per_pair=1))
  votes.next(1)
  assert votes.next(2) is None
  now = time.time()
  monkeypatch.setattr("rlft.rating.votes.time.time", lambda: now + 3601)
  assert votes.next(2).pair == 0


def test_many_raters_at_once(make):
  given = plan(pairs=20, raters=10, raters_per_pair=5)
  several = [make(given), make(given)]  # As two servers would have it.
  with futures.ThreadPoolExecutor(10) as pool:
    asked = list(pool.map(lambda r: len(answer_all(several[r % 2], r)), range(1, 11)))
  assert len(several[0].answered()) == sum(asked)
  # Whose share was cut short has seen what was left; others take it.
  for rater in range(1, 11):
    answer_all(several[0], rater, more=True)
  votes = several[1].answered()
  assert {sum(vote.pair == pair for vote in votes) for pair in range(20)} == {5}


def test_a_file_of_something_else(tmp_path):
  (tmp_path / "votes.sqlite").write_text("no database, but long enough to be taken for one" * 9)
  with pytest.raises(UserError, match="holds no votes .*: move the file away"):
    Votes(tmp_path / "votes.sqlite", plan())
