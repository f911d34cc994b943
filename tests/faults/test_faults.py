"""A small run of experiments/faults.py, and what it would say of a run that loses something."""

import random

import experiment_cases
import pytest
import train_cases as cases


@pytest.fixture(scope="module")
def faults():
  with experiment_cases.script("faults") as module:
    yield module


def test_nothing_is_lost(faults, tmp_path):
  """Real processes: a flipped bit behind a kill, then a reward that raises."""
  kinds = [kind for kind in faults.KINDS if kind.name in ("bit flipped", "reward raises")]
  bench = faults.Bench(tmp_path, iterations=16)
  try:
    done = faults.Harness(bench, tmp_path / "results.jsonl", 0, kinds).run(2)
  finally:
    bench.kill_server()
  assert [(one.kind, one.seen, one.hung, one.traceback) for one in done] == [
    ("bit flipped", "", False, False),
    ("reward raises", "", False, False),
  ]
  assert faults.table(done, kinds).splitlines()[2:] == [
    "| bit flipped | 1 | 1 | 0 | 0 | 0 |",
    "| reward raises | 1 | 1 | 0 | 0 | 0 |",
    "| **all** | 2 | 2 | 0 | 0 | 0 |",
  ]
  # What is done already is not done again.
  again = faults.Harness(bench, tmp_path / "results.jsonl", 0, kinds).run(2)
  assert again == done


def test_each_damage_is_one(faults, tmp_path):
  for number, damage in enumerate((faults._flip, faults._truncate, faults._delete)):
    step = tmp_path / str(number)
    step.mkdir()
    content = {"_CHECKPOINT_METADATA": b"{}", "a": b"1234", "b": b"", "c": b"5"}
    for name, data in content.items():
      (step / name).write_bytes(data)
    damage(step, random.Random(number))
    found = {path.name: path.read_bytes() for path in step.iterdir()}
    assert found["_CHECKPOINT_METADATA"] == b"{}"
    assert sum(found.get(name) != data for name, data in content.items()) == 1


def test_a_lost_run_is_told(faults, tmp_path, monkeypatch):
  done = [
    faults.Fault(0, 0, "kill -9"),
    faults.Fault(1, 0, "kill -9", seen="other numbers", traceback=True),
    faults.Fault(2, 1, "SIGTERM", seen="did not go on", hung=True),
  ]
  lines = faults.table(done).splitlines()
  assert lines[2] == "| kill -9 | 2 | 1 | 1 | 0 | 1 |"
  assert lines[3] == "| SIGTERM | 1 | 0 | 1 | 1 | 0 |"
  assert lines[-1] == "| **all** | 3 | 1 | 2 | 1 | 1 |"

  bench = faults.Bench(tmp_path)
  harness = faults.Harness(bench, tmp_path / "results.jsonl", 0, faults.KINDS)

  def differs(found, expected):
    raise AssertionError("0.5 is not 0.25")

  monkeypatch.setattr(bench, "reference", lambda: tmp_path)
  monkeypatch.setattr(cases, "assert_same_run", differs)
  with pytest.raises(faults.Lost, match=r"other numbers: 0.5 is not 0.25"):
    harness._compare()
