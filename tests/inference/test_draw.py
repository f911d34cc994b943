"""Drawing with a model that is there."""

import dataclasses
import logging

from inference_cases import GUIDANCE, PROMPTS, STEPS, drawing, drawn, replace_sampler
import jax
import models_cases
import numpy as np
import PIL.Image
import pytest

from rlft.config import fields
from rlft.config.settings import Config
from rlft.diffusion import ddim
from rlft.inference import draw as inference
from rlft.inference import load as finetuned
from rlft.models.files import pretrained
from rlft.storage import images
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


def test_grid_has_a_row_for_each_prompt(model, made, tmp_path):
  output = tmp_path / "new" / "grid.png"
  said = inference.save_grid(drawing(model), PROMPTS, output, images_per_prompt=3)
  ((policy, batch_size),) = made
  assert batch_size == 16  # A multiple of the 8 devices.
  assert policy.guidance_scale == GUIDANCE
  expected = ddim.make(pretrained.load(model).scheduler, STEPS, eta=0.5)
  jax.tree.map(np.testing.assert_array_equal, policy.process, expected)
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
  assert [batch_size for _, batch_size in made] == [8, 8, 16]


def test_settings_that_are_not_given_are_the_runs_own(model, monkeypatch):
  load = finetuned.load
  run = fields.make(Config, eval_seed=7, sampling_steps=3, guidance_scale=2.5, eta=0.25)
  monkeypatch.setattr(
    finetuned, "load", lambda path, **how: dataclasses.replace(load(path, **how), config=run)
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


def test_what_is_said_of_the_model_is_passed_on(model, monkeypatch):
  load, asked = finetuned.load, {}
  monkeypatch.setattr(finetuned, "load", lambda path, **how: asked.update(how) or load(path))
  how = {"pretrained": "base", "scheduler": "steps_offset=0", "image_size": "16", "lora": "l"}
  inference.Drawer(drawing(model, ema=False, **how))
  how["base"] = how.pop("pretrained")
  assert asked == {"ema": False, **how}
