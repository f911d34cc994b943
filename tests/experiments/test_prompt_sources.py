"""The experiment that measures prompt sources, on a thousandth of its prompts."""

import pathlib
import re

import experiment_cases
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("array_record")

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def experiment(monkeypatch):
  with experiment_cases.script("prompt_sources") as module:
    monkeypatch.setattr(module, "_DRAWN", 2)
    yield module


def test_every_source_is_made_and_measured(experiment, tmp_path):
  experiment.write(str(tmp_path), 3_000)
  said = experiment.make(str(tmp_path / "made"), str(tmp_path / "p.parquet"))
  assert re.search(r"3,000 rows read, 2,\d\d\d kept, \d+ dropped \(duplicate\)\n", said)
  for suffix in ("txt", "jsonl", "csv", "parquet"):
    assert f"p.{suffix} | 3,000 | " in experiment.measure(f"{tmp_path}/p.{suffix}", str(tmp_path))
