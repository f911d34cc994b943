"""Drawing and measuring with a model that is there."""

import dataclasses
import json
import logging

import models_cases
import numpy as np
import PIL.Image
import pytest

from rlft import catalog
from rlft.config import fields
from rlft.config.settings import Config, EvalConfig, ScoringSettings, TaskConfig
from rlft.inference import draw as inference
from rlft.inference import load as finetuned
from rlft.models.files import pretrained
from rlft.storage import images
from rlft.types import UserError

PROMPTS = list(models_cases.PROMPTS)
STEPS, GUIDANCE = 2, 2.0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """The directory of a model with random weights."""
  path = tmp_path_factory.mktemp("inference") / "model"
  pretrained.save(path, models_cases.tiny_pipeline())
  return str(path)


@pytest.fixture(autouse=True)
def made(monkeypatch):
  """Replaces the sampler, which takes long to compile; returns the arguments of those made."""
  made = []

  class Sampler:
    def __init__(self, model, **settings):
      made.append(settings)

    def __call__(self, prompts, seed, *, progress):
      return drawn(prompts, seed)

    def batches(self, prompts, seed, *, progress):
      return [drawn(prompts, seed)]

  monkeypatch.setattr(inference.sampler, "Sampler", Sampler)
  return made


def drawn(prompts, seed):
  """An image for each prompt, by (seed, place, prompt)."""
  states = (
    np.random.RandomState([seed, place, *prompt.encode()]) for place, prompt in enumerate(prompts)
  )
  return np.stack([state.uniform(size=(32, 32, 3)).astype(np.float32) for state in states])


def drawing(model, **changes):
  settings = {"seed": 5, "sampling_steps": STEPS, "guidance_scale": GUIDANCE, "eta": 0.5}
  return inference.Drawing(model=model, **settings | changes)


def test_grid_has_a_row_for_each_prompt(model, made, tmp_path):
  output = tmp_path / "new" / "grid.png"
  said = inference.save_grid(drawing(model), PROMPTS, output, images_per_prompt=3)
  # 16 images at once is a multiple of the 8 devices.
  assert made == [
    {"batch_size": 16, "sampling_steps": STEPS, "guidance_scale": GUIDANCE, "eta": 0.5}
  ]
  expected = drawn([prompt for prompt in PROMPTS for _ in range(3)], 5)
  with PIL.Image.open(output) as picture:
    found = np.asarray(picture)
  # 32 pixels are enlarged to 128.
  np.testing.assert_array_equal(found, images.grid(expected, 3, scale=4))
  assert said == (
    f"{output}: 2 prompts, 3 images each (seed 5, sampling_steps 2, guidance_scale 2, eta 0.5)"
  )


def test_grid_of_single_images_is_square(model, tmp_path):
  inference.save_grid(drawing(model), PROMPTS * 4, tmp_path / "grid.png", images_per_prompt=1)
  with PIL.Image.open(tmp_path / "grid.png") as picture:
    assert picture.size == (3 * 130 + 2, 3 * 130 + 2)  # 8 images, padded by 2 pixels


def test_batches_are_a_multiple_of_the_devices(model, made):
  for size in (1, 8, 9):
    inference.Drawer(drawing(model, batch_size=size))
  assert [settings["batch_size"] for settings in made] == [8, 8, 16]


def test_settings_that_are_not_given_are_the_runs_own(model, monkeypatch):
  load = finetuned.load
  run = fields.make(Config, eval_seed=7, sampling_steps=3, guidance_scale=2.5, eta=0.25)
  monkeypatch.setattr(
    finetuned, "load", lambda path, ema: dataclasses.replace(load(path, ema=ema), config=run)
  )
  own = inference.Drawer(inference.Drawing(model=model)).settings
  assert own == {"seed": 7, "sampling_steps": 3, "guidance_scale": 2.5, "eta": 0.25}
  given = inference.Drawer(drawing(model, seed=0, eta=0.0)).settings
  assert given == {"seed": 0, "sampling_steps": STEPS, "guidance_scale": GUIDANCE, "eta": 0.0}


def test_long_prompts_are_counted_in_a_warning(model, tmp_path, caplog):
  with caplog.at_level(logging.WARNING):
    inference.save_grid(drawing(model), ["dog " * 20], tmp_path / "grid.png", images_per_prompt=1)
  assert "1 of 1 prompts of --prompt and --prompts have more than 16 tokens" in caplog.text


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"texts": []}, "nothing to draw: give --prompt"),
    ({"output": "."}, "is a directory: give the name of a file"),
    ({"drawing": inference.Drawing(model="nowhere")}, "nowhere"),
  ],
)
def test_mistakes_in_drawing(model, tmp_path, changes, message):
  given = {"drawing": drawing(model), "texts": PROMPTS, "output": tmp_path / "grid.png"}
  with pytest.raises(UserError, match=message) as error:
    inference.save_grid(**given | changes, images_per_prompt=1)
  assert "\n" not in str(error.value)
  assert not list(tmp_path.iterdir())


def test_guidance_must_be_finite(model):
  with pytest.raises(UserError, match="--guidance_scale is not a finite number"):
    inference.Drawer(drawing(model, guidance_scale=float("nan")))


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


def measure(model, evals, **more):
  scoring = ScoringSettings(reward_timeout_s=60.0, reward_threads=2)
  return inference.measure(drawing(model), evals, scoring=scoring, **more)


def test_measures_of_a_model(model, brightness, tmp_path):
  prompts = tmp_path / "prompts.txt"
  prompts.write_text("\n".join(PROMPTS))
  shared = {"prompts": str(prompts), "images": 12, "images_per_prompt": 3}
  evals = [
    EvalConfig(name="each", metric=f"host:{brightness}:mean", **shared),
    EvalConfig(name="sets", metric=f"host:{brightness}:of_set", **shared),
  ]
  output = tmp_path / "eval.json"
  table = measure(model, evals, output=output)
  assert [line.split()[0] for line in table.splitlines()] == ["evaluation", "each", "sets"]
  content = json.loads(output.read_text())
  assert content["model"] == model
  assert content["settings"] == {
    "seed": 5, "sampling_steps": STEPS, "guidance_scale": GUIDANCE, "eta": 0.5
  }  # fmt: skip
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
  with pytest.raises(UserError, match="unknown reward 'nothing'"):
    measure(model, [dataclasses.replace(spec, metric="nothing")])


def test_metrics_of_a_run_are_made_once_and_marked(model, brightness, monkeypatch, tmp_path):
  make, load, made = catalog.make_specs, finetuned.load, []
  metric = f"host:{brightness}:mean"
  entry = EvalConfig(name="a", prompts="emoji:single/test", metric=metric, images=2)
  task = TaskConfig(name="t", prompts="p", reward=metric, batch_size=8)
  run = Config(task=(task,), eval=(entry,))
  monkeypatch.setattr(
    finetuned, "load", lambda path, ema: dataclasses.replace(load(path, ema=ema), config=run)
  )
  monkeypatch.setattr(catalog, "make_specs", lambda evals: made.extend(evals) or make(evals))
  for evals in ([entry], []):
    measure(model, evals, output=tmp_path / "eval.json")
    assert json.loads((tmp_path / "eval.json").read_text())["results"]["a"]["trained_on"]
  assert made == [entry, entry]
