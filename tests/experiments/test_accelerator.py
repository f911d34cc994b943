"""The script that measures an accelerator: its parts at a tiny scale, its budget, its table."""

import json
import os
import subprocess
import sys
import time

import experiment_cases
import jax
import pytest

from rlft.performance.accelerator import checks, speed
from rlft.performance.accelerator.measuring import Found, Say
from rlft.performance.accelerator.scales import TINY


@pytest.fixture(scope="module")
def experiment():
  with experiment_cases.script("accelerator") as module:
    yield module


def found(path):
  return {line["what"]: line for line in map(json.loads, path.read_text().splitlines())}


def test_without_packages_that_a_rented_machine_lacks(tmp_path):
  """A part in a process of its own, and what happens to one that fails."""
  output = tmp_path / "found.md"
  (tmp_path / "tensorboardX.py").write_text("raise ImportError('not here')\n")
  (tmp_path / "diffusers.py").write_text("raise ImportError('not here')\n")
  command = [sys.executable, experiment_cases.ROOT / "experiments" / "accelerator.py"]
  done = subprocess.run(
    [*command, "--scale=tiny", "--parts=kernels", f"--output={output}"],
    env=os.environ | {"PYTHONPATH": f"{tmp_path}:{experiment_cases.ROOT}"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert "| kernels | attention 64 x 64, 2 heads of 16: chosen | xla |" in output.read_text()
  assert output.read_text() in done.stdout
  assert found(output.with_suffix(".jsonl"))["the whole part"]["unit"] == "s"


def test_kernels_beside_xla(tmp_path, monkeypatch):
  """Here what is chosen is XLA's, too; and a shape that fails costs itself."""
  compiled = checks._compile

  def compile_one(images, queries, keys, *others):
    if keys != queries:
      raise jax.errors.JaxRuntimeError("INTERNAL: no plan\nand more")
    return compiled(images, queries, keys, *others)

  monkeypatch.setitem(checks._FUSED, "cpu", "")  # Every program has it.
  monkeypatch.setattr(checks, "_compile", compile_one)
  checks.kernels(TINY, Say("kernels", tmp_path / "lines"))
  lines = found(tmp_path / "lines")
  square, other = "attention 64 x 64, 2 heads of 16", "attention 64 x 7, 2 heads of 16"
  assert lines[f"{square}: chosen"]["value"] == "fused"
  for what in ("output", "gradients"):
    assert lines[f"{square}: {what}, error"]["ok"]
    assert 1e-4 < lines[f"{square}: {what}, error"]["value"] < 2e-2  # Of bfloat16.
  assert lines[f"{square}: forward and backward"]["value"] > 0
  assert not lines[other]["ok"] and lines[other]["note"] == "INTERNAL: no plan"


def test_agreement(tmp_path):
  checks.agreement(TINY, Say("agreement", tmp_path / "lines"))
  lines = found(tmp_path / "lines")
  assert all(line["ok"] for line in lines.values()), lines
  assert lines["bf16: |ratio - 1| at the first update"]["value"] <= 1e-5
  for name in ("encode", "sample", "update"):
    assert lines[f"{name}: compilations in two iterations"]["value"] == 1
  assert lines["update: arrays of the old state that are left"]["value"] == 0


def test_speed(tmp_path):
  speed.large(TINY, Say("large", tmp_path / "lines"))
  lines = found(tmp_path / "lines")
  for what in ("sampling", "update", "iteration"):
    assert lines[what]["value"] > 0 and "of the products' rate" in lines[what]["note"]
  for name in ("encode", "sample", "update"):
    assert lines[f"{name}: memory predicted"]["value"] > 0


def test_what_a_part_leaves_goes_to_the_next(experiment):
  assert experiment.deadlines({"a": 0.1, "b": 0.3}, 100) == {"a": 25, "b": 100}
  shares = {name: part.share for name, part in experiment.PARTS.items()}
  assert sum(shares.values()) == pytest.approx(1)


def test_a_part_that_fails_or_takes_too_long_costs_itself(experiment, tmp_path, monkeypatch):
  lines = tmp_path / "lines.jsonl"
  monkeypatch.setattr(experiment, "__file__", str(tmp_path / "part.py"))
  (tmp_path / "part.py").write_text(
    "import sys, time\n"
    "if '--part=kernels' in sys.argv: raise ValueError('no such kernel')\n"
    "time.sleep(60)\n"
  )
  experiment.flags.FLAGS.mark_as_parsed()
  for name, seconds in (("kernels", 60), ("large", 0.5), ("levers", 0)):
    experiment._run_all({name: time.monotonic() + seconds}, tmp_path, lines)
  failed, late, never = map(json.loads, lines.read_text().splitlines())
  assert not failed["ok"] and "no such kernel" in failed["note"]
  assert late["value"] == "not finished" and late["ok"] is None
  assert never["value"] == "not begun" and "--parts=levers" in never["note"]


def test_table(experiment):
  lines = experiment.table(
    [
      Found("kernels", "device", "NVIDIA"),
      Found("kernels", "chosen", "fused", ok=True),
      Found("kernels", "|error|", 0.12345678, ok=False, note="a | b"),
      Found("trace", "convolutions", 0.417, "share"),
      Found("trace", "the whole part", note="after 3 s: ValueError", ok=False),
    ]
  ).splitlines()
  assert lines[2:] == [
    "| kernels | chosen | fused, as it should |  |",
    "|  | \\|error\\| | **0.1235: wrong** | a \\| b |",
    "| trace | convolutions | 42% |  |",
    "|  | the whole part | **failed** | after 3 s: ValueError |",
  ]


def test_an_unknown_part_is_refused(experiment):
  with pytest.raises(experiment.UserError, match="--parts=kernel is not known: did you mean ker"):
    experiment._chosen(["kernel"])
