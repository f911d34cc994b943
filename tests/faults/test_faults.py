"""A small run of experiments/faults.py, and what it would say of a run that loses something."""

import random

import experiment_cases
import pytest
import train_cases as cases


@pytest.fixture(scope="module")
def faults():
  with experiment_cases.script("faults") as module:
    yield module


class _Bench:
  """No run."""

  chain, workdir = 0, None


def test_nothing_is_lost(faults, tmp_path):
  """Real processes: a flipped bit behind a kill, then a reward that raises."""
  kinds = [kind for kind in faults.KINDS if kind.name in ("bit flipped", "reward raises")]
  bench = faults.Bench(tmp_path, iterations=10)
  try:
    done = faults.Harness(bench, tmp_path, 0, kinds).run(2)
  finally:
    bench.close()
  assert [(one.kind, one.seen, one.hung, one.traceback) for one in done] == [
    ("bit flipped", "", False, False),
    ("reward raises", "", False, False),
  ]
  table = (tmp_path / "table.md").read_text()
  assert table == faults.table(done, kinds) + "\n"
  assert [line.rpartition(" | ")[0] for line in table.splitlines()[2:]] == [
    "| bit flipped | 1 | 1 | 0 | 0 | 0",
    "| reward raises | 1 | 1 | 0 | 0 | 0",
    "| **all** | 2 | 2 | 0 | 0 | 0",
  ]
  # What is done already is not done again.
  assert faults.Harness(bench, tmp_path, 0, kinds).run(2) == done


def test_a_run_of_two_processes_has_its_own_faults(faults, tmp_path):
  harness = faults.Harness(_Bench(), tmp_path, 0, faults.KINDS)
  *alone, shared = harness._turns
  assert len(alone) == 7 and all(kinds == alone[0] for kinds in alone)
  assert {kind.name for kind in shared} == {
    "kill -9 of one of two",
    "SIGTERM to one of two",
    "one of two frozen",
    "reward raises on one of two",
  }
  assert len(alone[0]) + len(shared) == len(faults.KINDS)


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
    faults.Fault(2, 1, "SIGTERM", seen="did not go on", seconds=7.4, hung=True),
  ]
  lines = faults.table(done).splitlines()
  assert lines[2] == "| kill -9 | 2 | 1 | 1 | 0 | 1 | 0 s |"
  assert lines[3] == "| SIGTERM | 1 | 0 | 1 | 1 | 0 | 7 s |"
  assert lines[-1] == "| **all** | 3 | 1 | 2 | 1 | 1 | 7 s |"

  def differs(found, expected):
    raise AssertionError("0.5 is not 0.25")

  harness = faults.Harness(_Bench(), tmp_path, 0, faults.KINDS)
  monkeypatch.setattr(cases, "assert_same_run", differs)
  with pytest.raises(faults.Lost, match=r"other numbers: 0.5 is not 0.25"):
    harness._compare(tmp_path)
