"""The load on the rating page: its bookkeeping on literals, and a small form of it."""

import experiment_cases
import pytest

pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def experiment():
  with experiment_cases.script("rating_load") as module:
    yield module


@pytest.mark.parametrize(
  ("stored", "acknowledged", "waiting", "found"),
  [
    ({1: "left"}, {1: "left", 2: None}, {}, (0, 0, 0)),
    ({}, {1: "left"}, {}, (1, 0, 0)),
    ({1: "tie"}, {1: "left"}, {}, (0, 1, 0)),
    ({1: "left"}, {1: None}, {}, (0, 1, 0)),  # Taken back, and there again.
    ({7: "left"}, {}, {}, (0, 1, 0)),  # Nobody said so.
    ({1: "left"}, {}, {1: "left"}, (0, 0, 1)),
    ({}, {}, {1: "left"}, (0, 0, 0)),
    ({}, {1: "left"}, {1: None}, (0, 0, 1)),
    ({1: "tie"}, {1: "left"}, {1: None}, (0, 1, 0)),
  ],
)
def test_what_is_lost_or_changed_is_found(experiment, stored, acknowledged, waiting, found):
  assert experiment.compare(stored, acknowledged, waiting) == experiment.Differences(*found)


def test_five_raters_and_a_kill(experiment, tmp_path, capsys):
  record = experiment.load(tmp_path, raters=5, pairs=4, kills=1, think_s=0, seed=0)
  assert (record.votes, record.undone, record.hostile) == (23, 3, 9)
  assert record.repeated  # The kill was felt.
  said = capsys.readouterr().out
  assert said.count("0 lost, 0 changed") == 2 and "up again after" in said
  table = experiment.latencies(record.seconds)
  assert [row[0] for row in table.rows] == ["hostile", "page", "picture", "undo", "vote"]
