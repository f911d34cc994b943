"""Kept measurements are of the files that are there now."""

import dataclasses
import os

import pytest

from rlft import catalog
from rlft.evaluation.evaluate import EvalSpec
from rlft.inference import kept, runs
from rlft.inference.draw import Drawing
from rlft.models.files import pretrained
from rlft.models.files.single_file import Source
from rlft.storage import checksums
from rlft.types import Prompt, UserError


@pytest.mark.parametrize("single", [False, True])
def test_a_model_that_was_replaced_is_another(tmp_path, monkeypatch, single):
  file = tmp_path / "model.safetensors"
  file.write_bytes(b"one")
  found = Source(str(file)) if single else tmp_path
  monkeypatch.setattr(pretrained, "find", lambda model: found)
  before = kept.stamp("m")
  assert kept.stamp("m") == before
  file.write_bytes(b"two")
  os.utime(file, (1, 1))
  assert kept.stamp("m") != before


def test_a_revision_stays_as_it_is(monkeypatch):
  monkeypatch.setattr(pretrained, "find", lambda model: Source("org/name@abc/model.safetensors"))
  assert kept.stamp("m") == kept.stamp("m")
  monkeypatch.setattr(pretrained, "find", lambda model: "org/name@abc")
  assert kept.stamp("m") == "org/name@abc"


def test_a_model_whose_notes_were_edited_is_another(tmp_path, monkeypatch):
  monkeypatch.setattr(pretrained, "find", lambda model: tmp_path)
  (tmp_path / "scheduler").mkdir()
  notes = tmp_path / "scheduler" / "scheduler_config.json"
  notes.write_text("{}")
  before = kept.stamp("m")
  (tmp_path / ".cache").mkdir()
  (tmp_path / ".cache" / "lock").write_text("")
  assert kept.stamp("m") == before
  notes.write_text('{"prediction_type": "v_prediction"}')
  assert kept.stamp("m") != before


def test_a_metric_whose_folder_has_changed_is_another(tmp_path):
  folder = tmp_path / "my, folder"
  folder.mkdir()
  (folder / "a.png").write_bytes(b"1")
  name = f"kid?weights=x&real={folder}".replace(",", "%2C")
  metric = dataclasses.replace(catalog.make_reward("jpeg"), name=name)
  spec = EvalSpec("e", metric, [Prompt("p")], 1)
  before = kept._asked(spec)
  assert kept._asked(spec) == before
  (folder / "b.png").write_bytes(b"2")
  assert kept._asked(spec) != before


def test_another_run_in_the_same_place_is_another(tmp_path):
  folder = tmp_path / "checkpoints" / "iteration_3"
  folder.mkdir(parents=True)
  run = runs.TrainedRun(str(tmp_path), None, "iteration_3")
  (folder / checksums.FILE).write_text("one")
  before = run.stamp
  assert run.stamp == before
  (folder / checksums.FILE).write_text("two")
  assert run.stamp != before and run.stamp[0] == "iteration_3"


def test_a_model_that_changes_while_it_is_measured_is_refused(monkeypatch):
  now = {"model": "m", "checkpoint": ["iteration_2", "x"], "guidance_scale": 5}
  monkeypatch.setattr(kept, "about", lambda drawing: now)
  kept.check_as_before(Drawing("m"), {**now, "guidance_scale": 3})
  with pytest.raises(UserError, match="m has changed since this command began: give it again"):
    kept.check_as_before(Drawing("m"), {**now, "checkpoint": ["iteration_1", "x"]})
