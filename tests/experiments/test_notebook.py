"""The notebook, executed from top to bottom with a tiny model in the place of the miniature."""

import importlib.metadata
import pathlib
import subprocess

import experiment_cases
import pytest
import train_cases

from rlft.models.files import pretrained

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipywidgets")
pytest.importorskip("matplotlib")
ROOT = pathlib.Path(__file__).parents[2]

_SMALL = """\
--pretrained={base}
--iterations=2
--sampling_steps=2
--guidance_scale=2
--train_timesteps=1
--pretrain_weight=0
--compute_dtype=float32
--noremat
"""
_TASK = "--task=emoji-composition,batch_size=4\n"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
  """The notebook with its outputs, and the folder in which it ran."""
  folder = tmp_path_factory.mktemp("notebook")
  pretrained.save(folder / "base", train_cases.tiny_model())
  (folder / "launch").symlink_to(ROOT / "launch")
  (folder / "experiments" / "rewards").mkdir(parents=True)
  small = _SMALL.format(base=folder / "base")
  (folder / "experiments" / "rewards" / "small.flags").write_text(small)
  (folder / "experiments" / "emoji_composition.flags").write_text(small + _TASK)
  notebook = nbformat.read(ROOT / "experiments" / "emoji_colab.ipynb", as_version=4)
  for cell in notebook.cells:
    cell.source = cell.source.replace("emoji-sd", "base").replace("batch_size=32", "batch_size=4")
    cell.source = cell.source.replace("images=32", "images=4").replace("count=10", "count=2")
  with experiment_cases.script("notebook") as script, pytest.MonkeyPatch.context() as patch:
    patch.setenv("PYTHONPATH", str(ROOT))
    patch.delenv("JAX_NUM_CPU_DEVICES")  # One device is enough.
    script.run(notebook, folder / "experiments")
  return notebook, folder


def test_every_cell_ran(executed):
  notebook, folder = executed
  cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
  assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
  for name in ("notebook_before.png", "notebook/report.html", "warm/eval.json"):
    assert (folder / "runs" / name).exists(), name
  assert (folder / "runs" / "notebook_exported" / "model_index.json").exists()


def test_what_a_reader_sees(executed):
  notebook, _ = executed
  texts = [
    output.text
    for cell in notebook.cells
    for output in cell.get("outputs", [])
    if output.output_type == "stream"
  ]
  assert any("report: " in text for text in texts)
  assert not any("\r" in text or "Traceback" in text for text in texts)


@pytest.mark.parametrize("installed", [False, True])
def test_a_clone_is_installed_unless_it_is(tmp_path, monkeypatch, installed):
  """In a clone `import rlft` works without any of its dependencies: that does not count."""
  (tmp_path / "launch").mkdir()
  (tmp_path / "launch" / "train.py").touch()
  (tmp_path / "experiments").mkdir()
  monkeypatch.chdir(tmp_path / "experiments")
  here = importlib.metadata.distribution("pytest")
  monkeypatch.setattr(here.__class__, "name", "rlft" if installed else "other")
  monkeypatch.setattr(importlib.metadata, "distributions", lambda: [here])
  ran = []
  monkeypatch.setattr(subprocess, "run", lambda command, **_: ran.append(command))
  notebook = nbformat.read(ROOT / "experiments" / "emoji_colab.ipynb", as_version=4)
  exec(next(cell.source for cell in notebook.cells if cell.cell_type == "code"), {})
  assert [command[1:3] for command in ran] == ([] if installed else [["-m", "pip"]])
  assert pathlib.Path.cwd() == tmp_path


def test_kept_outputs_are_of_the_kept_cells():
  """The notebook was saved as it ran: every cell was executed, in order, without an error."""
  notebook = nbformat.read(ROOT / "experiments" / "emoji_colab.ipynb", as_version=4)
  cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
  assert any(output.get("data", {}).get("image/png") for cell in cells for output in cell.outputs)


def test_bars_are_kept_as_they_ended():
  outer, inner = "\r 0%|  |", "\n\r 50%|# |\x1b[A\r"
  text = f"a line\n{outer}{inner}\n\r100%|##|\x1b[A\r\n\r        \x1b[A\r100%|##|\ndone\n"
  with experiment_cases.script("notebook") as script:
    assert script.as_seen(text) == "a line\n100%|##|\ndone\n"
    nodes = [nbformat.v4.new_output("stream", name="stdout", text=part) for part in text]
    picture = nbformat.v4.new_output("display_data")
    found = script.joined([*nodes, picture, nodes[0].copy()])
  assert [one.output_type for one in found] == ["stream", "display_data", "stream"]
  assert found[0].text == "a line\n100%|##|\ndone\n"
