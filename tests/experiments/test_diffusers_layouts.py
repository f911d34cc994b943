"""The exchange of models with diffusers: rlft's part, and all of it where diffusers is."""

import pathlib

import experiment_cases
import numpy as np
import pytest
import train_cases

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def experiment():
  with experiment_cases.script("diffusers_layouts") as module:
    yield module


def test_latents_are_drawn_from_its_noise(experiment):
  found = experiment.draw_with_rlft(train_cases.tiny_model())
  assert found.shape == (2, 8, 8, 4) and np.isfinite(found).all()


def test_differences(experiment, capsys):
  assert experiment.differ("a", np.float32([1, 2]), np.float32([1, 2.00001]))
  assert not experiment.differ("b", np.float32([1, 2]), np.float32([1, 2.001]))
  assert not experiment.differ("c", np.array([1, 2]), np.array([1, 3]))
  assert capsys.readouterr().out.splitlines()[1] == "b: 0.001: TOO MUCH"


def test_models_are_exchanged(experiment, monkeypatch, tmp_path):
  pytest.importorskip("torch")
  pytest.importorskip("diffusers")
  monkeypatch.setattr(experiment, "PIPELINES", {"sd1-fp16": experiment.PIPELINES["sd1-fp16"]})
  experiment.save(tmp_path)
  assert experiment.compare(tmp_path)
  assert experiment.read(tmp_path)
