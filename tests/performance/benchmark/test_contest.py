"""Contests: who takes turns, what is timed, the table."""

import pytest

from rlft.performance.benchmark import contest


def recorded(log, name):
  def make():
    log.append(f"make {name}")
    return contest.Side(
      lambda: log.append(name), compile_s=2.0, close=lambda: log.append(f"close {name}")
    )

  return make


def missing():
  raise contest.Unavailable("no c")


def measured(log, flops=0.0):
  sides = {"a": recorded(log, "a"), "c": missing, "b": recorded(log, "b")}
  held = contest.Contest("x", "4 images", 4, 10**9, 5 * 10**9, sides, flops)
  ticks = []
  result = contest.hold(held, dtype="float32", repeats=2, tick=ticks.append)
  assert sum(ticks) == 9  # 3 calls of each side, made or not
  return result


@pytest.mark.parametrize(
  ("memory", "expected", "note"),
  [
    (15e9, ["make a", "make b", *"ababab", "close b", "close a"], ""),
    (
      14e9,
      ["make a", *"aaa", "close a", "make b", *"bbb", "close b"],
      "one after the other, to save memory",
    ),
  ],
)
def test_sides_take_turns_if_there_is_memory(monkeypatch, memory, expected, note):
  monkeypatch.setattr(contest, "_memory", lambda: memory)
  log = []
  result = measured(log)
  assert log == expected and result.note == note
  assert list(result.sides) == ["a", "c", "b"]
  assert len(result.sides["a"].seconds) == len(result.sides["b"].seconds) == 2
  assert result.sides["a"].compile_s >= 2.0 and result.sides["c"].note == "no c"


def test_work_is_compared_with_matrix_products(monkeypatch):
  monkeypatch.setattr(contest, "_PEAK_SIZES", {"cpu": 16})
  result = measured([], flops=1e9)
  assert result.peak > 0 and set(result.sides) == {"a", "b", "c"}


def test_what_a_first_call_takes_longer_is_compilation(monkeypatch):
  clock = iter([0.0, 5.0, 10.0, 11.0, 20.0, 23.0])  # calls of 5, 1 and 3 seconds
  monkeypatch.setattr(contest.time, "perf_counter", lambda: next(clock))
  sides = {"a": lambda: contest.Side(lambda: None, compile_s=0.5)}
  held = contest.Contest("x", "", 1, 1, 1, sides)
  result = contest.hold(held, dtype="float32", repeats=2, tick=lambda count: None)
  assert result.sides["a"].seconds == (1.0, 3.0)
  assert result.sides["a"].compile_s == 0.5 + 5.0 - 2.0


def test_the_table():
  timing = contest.Timing
  results = [
    contest.Result(
      "one",
      "",
      4,
      8_849_182,
      {"rlft": timing((2.0, 8.0, 4.0), 1.25), "torch": timing((1.0, 2.0, 4.0))},
      flops=6e12,
      peak=4e12,
    ),
    contest.Result(
      "second",
      "",
      4,
      986_109_441,
      {"rlft": timing((40.0,), 12.0), "torch": timing(note="no torch")},
    ),
  ]
  # Medians of 4 and 2 seconds for 4 images, of 1.5 and 3 TFLOP/s where 4 are possible.
  assert contest.table(results, "images") == (
    "        parameters  side            images/s  rlft is  GFLOP/s  of peak  compile\n"
    "one        8.849 M  rlft                   1   1.00 x     1500      38%    1.2 s\n"
    "                    torch                  2   0.50 x     3000      75%    0.0 s\n"
    "                    matrix product         -        -     4000     100%        -\n"
    "second     986.1 M  rlft                 0.1   1.00 x        -        -   12.0 s\n"
    "                    torch                  -        -        -        -        -  no torch"
  )
