import json
import subprocess
import sys
import time

import jax
import pytest

import rlft
from rlft.report import usage

TPUS = {
  "started": "2026-11-27T10:00:00+00:00",
  "seconds": 1800.0,
  "command": "python launch/train.py",
  "device": "TPU v6 lite",
  "devices": 8,
  "processes": 2,
  "cores": 44,
  "python": "3.12.1",
  "versions": {"rlft": "0.1"},
  "commit": "0123456789ab",
  "peak_host_bytes": 5,
  "peak_device_bytes": 7,
}
CPU = {**TPUS, "seconds": 3600.0, "device": "cpu", "devices": 2, "processes": 1, "cores": 4}


def test_a_cost_is_whole_over_all_starts():
  other = {**CPU, "commit": "abc+", "command": "again", "peak_host_bytes": 9}
  del other["peak_device_bytes"]
  got = usage.cost([TPUS, TPUS, other])
  assert (got.starts, got.seconds) == (3, 7200.0)
  assert got.device_hours == 8 * 0.5 * 2 + 2 * 1
  assert got.hardware == ("8 x TPU v6 lite, 2 processes", "2 x cpu, 4 cores")
  assert (got.peak_host_bytes, got.peak_device_bytes) == (9, 7)
  assert got.commits == ("0123456789ab", "abc+") and got.command == "again"
  assert got.versions == {"Python": "3.12.1", "rlft": "0.1"}


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_the_memory_of_the_process_that_started_it_does_not_count():
  program = (
    "import subprocess, sys; large = bytearray(2**30);"
    " asks = 'from rlft.report import usage; print(usage.peak_host_bytes())';"
    " subprocess.run([sys.executable, '-c', asks], check=True)"
  )
  said = subprocess.run(
    [sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True
  )
  assert 2**24 < int(said.stdout) < 2**29


def test_what_is_missing_is_survived():
  assert usage.cost([]) is None
  assert usage.cost([{}]).hardware == ("? x ?",)


def test_each_start_has_a_line(tmp_path):
  since = time.monotonic() - 100
  for start in (1, 2):
    with usage.Usage(tmp_path, since=since):
      # It is there from the beginning, so that a process that is killed is counted.
      written = [json.loads(line) for line in (tmp_path / "usage.jsonl").read_text().splitlines()]
    assert len(written) == start
  got = usage.read_cost(tmp_path)
  assert got.starts == 2 and 200 <= got.seconds < 260
  assert got.hardware[0].startswith(f"{jax.device_count()} x cpu, ")
  assert got.versions["jax"] == jax.__version__ and got.versions["rlft"] == rlft.__version__
  assert got.peak_host_bytes > 2**20
  assert usage.first_start(tmp_path) == written[0]["started"] != ""


def test_the_line_is_kept_up_to_date_and_a_full_disk_stops_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(usage, "_EVERY_S", 0.01)
  with usage.Usage(tmp_path, since=time.monotonic()):
    deadline = time.monotonic() + 30
    while not usage.read_cost(tmp_path).seconds and time.monotonic() < deadline:
      time.sleep(0.02)
    assert usage.read_cost(tmp_path).seconds > 0
    before = (tmp_path / "usage.jsonl").read_bytes()

    def full(path, data):
      raise usage.UserError("no space")

    monkeypatch.setattr(usage.files, "write_atomic", full)
    time.sleep(0.05)
  assert (tmp_path / "usage.jsonl").read_bytes()[:10] == before[:10]
