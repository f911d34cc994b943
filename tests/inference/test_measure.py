"""Measuring a model that is there."""

import dataclasses
import json

from inference_cases import PROMPTS, SETTINGS, drawing, replace_sampler
import models_cases
import pytest

from rlft import catalog
from rlft.config.settings import Config, EvalConfig, ScoringSettings, TaskConfig
from rlft.inference import load as finetuned
from rlft.inference import measure as measure_lib
from rlft.models.files import pretrained
from rlft.types import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """The directory of a model with random weights."""
  path = tmp_path_factory.mktemp("inference") / "model"
  pretrained.save(path, models_cases.tiny_pipeline())
  return str(path)


@pytest.fixture(autouse=True)
def made(monkeypatch):
  return replace_sampler(monkeypatch)


@pytest.fixture
def brightness(tmp_path):
  """A metric of each image, and one of sets, in a user's file."""
  path = tmp_path / "metrics.py"
  path.write_text(
    "def mean(images, prompts, metadata):\n"
    "  return images.mean((1, 2, 3))\n"
    "def of_set(images, prompts, metadata):\n"
    "  return images.mean((1, 2, 3, 4))\n"
    "of_set.is_set = True\n"
  )
  return path


def measure(model, evals, *, how=None, **more):
  scoring = ScoringSettings(reward_timeout_s=60.0, reward_threads=2)
  return measure_lib.measure(drawing(model, **how or {}), evals, scoring=scoring, **more)


def test_measures_of_a_model(model, brightness, tmp_path):
  prompts = tmp_path / "prompts.txt"
  prompts.write_text("\n".join(PROMPTS))
  shared = {"prompts": str(prompts), "images": 12, "images_per_prompt": 3}
  evals = [
    EvalConfig(name="each", metric=f"host:{brightness}:mean", **shared),
    EvalConfig(name="sets", metric=f"host:{brightness}:of_set", **shared),
  ]
  output = tmp_path / "eval.json"
  how = {"scheduler": "steps_offset=0", "image_size": "16"}
  table = measure(model, evals, output=output, how=how)
  assert [line.split()[0] for line in table.splitlines()] == ["evaluation", "each", "sets"]
  content = json.loads(output.read_text())
  assert content["model"] == model
  assert content["settings"] == SETTINGS | how
  each, sets = content["results"]["each"], content["results"]["sets"]
  # The mean over sets of equal size is the mean over images.
  assert each["mean"] == pytest.approx(sets["mean"], abs=1e-6) and 0 < each["mean"] < 1
  assert each["images"] == sets["images"] == 12 and each["unscored"] == sets["unscored"] == 0


def test_mistakes_in_measuring(model, brightness, tmp_path):
  with pytest.raises(UserError, match="has no evaluations of its own: give --eval=emoji"):
    measure(model, [])
  spec = EvalConfig(name="a", prompts="emoji:single/test", metric=f"host:{brightness}:mean")
  with pytest.raises(UserError, match="is a directory"):
    measure(model, [spec], output=tmp_path)
  with pytest.raises(UserError, match="images=1 is out of range"):
    measure(model, [dataclasses.replace(spec, images=1)])
  with pytest.raises(UserError, match="metric=nothing: there is none of this name"):
    measure(model, [dataclasses.replace(spec, metric="nothing")])


def test_metrics_of_a_run_are_made_once_and_marked(model, brightness, monkeypatch, tmp_path):
  make, load, made = catalog.make_specs, finetuned.load, []
  metric = f"host:{brightness}:mean"
  entry = EvalConfig(name="a", prompts="emoji:single/test", metric=metric, images=2)
  task = TaskConfig(name="t", prompts="p", reward=metric, batch_size=8)
  run = Config(task=(task,), eval=(entry,))
  monkeypatch.setattr(
    finetuned, "load", lambda path, **how: dataclasses.replace(load(path, **how), config=run)
  )
  monkeypatch.setattr(catalog, "make_specs", lambda evals: made.extend(evals) or make(evals))
  for evals in ([entry], []):
    measure(model, evals, output=tmp_path / "eval.json")
    assert json.loads((tmp_path / "eval.json").read_text())["results"]["a"]["trained_on"]
  assert made == [entry, entry]


def test_prompts_of_a_run_are_found_from_another_directory(
  model, brightness, monkeypatch, tmp_path
):
  (tmp_path / "start").mkdir()
  (tmp_path / "start" / "prompts.txt").write_text("a dog\na cat")
  entry = EvalConfig(name="a", prompts="prompts.txt", metric=f"host:{brightness}:mean", images=2)
  load, started_in = finetuned.load, str(tmp_path / "start")

  def run(path, **how):
    return dataclasses.replace(
      load(path, **how), config=Config(eval=(entry,)), started_in=started_in
    )

  monkeypatch.setattr(finetuned, "load", run)
  assert "2 (2 prompts)" in measure(model, [])
  (tmp_path / "start" / "prompts.txt").unlink()
  message = "evaluations of the run in .* cannot be done here: .*prompts.txt does not exist: give a"
  with pytest.raises(UserError, match=message + ".*; or give others with --eval"):
    measure(model, [])
