"""What export says of the model that it writes."""

import dataclasses

import models_cases
import pytest
import repository_cases

from rlft.config import fields
from rlft.config.settings import Config
from rlft.inference import export as export_lib
from rlft.inference import load as finetuned
from rlft.models.files import pretrained
from rlft.types import UserError


@pytest.fixture
def found(monkeypatch):
  """What is exported: a model that came with PNDM, of a run that was told other options."""
  model = models_cases.tiny_pipeline()
  scheduler = {**model.scheduler, "_class_name": "PNDMScheduler", "timestep_spacing": "trailing"}
  config = fields.make(Config, scheduler="timestep_spacing=trailing", image_size="32")
  found = finetuned.Finetuned(dataclasses.replace(model, scheduler=scheduler), config)
  monkeypatch.setattr(finetuned, "load", lambda path, ema, base: found)
  return found


def test_what_is_not_as_in_the_base_model_is_said(found, tmp_path):
  output = tmp_path / "model"
  assert export_lib.export("run", output=output) == [
    f"wrote {output}",
    "  scheduler: DDIM, which rlft samples with, in the place of PNDMScheduler; same noise",
    "  scheduler: timestep_spacing=trailing, as the run was told",
    "  images of 32x32 pixels, as the run was told",
  ]
  written = pretrained.load(output)
  assert written.scheduler["timestep_spacing"] == "trailing"


def test_a_size_that_the_pipeline_of_xl_does_not_find_is_said(found, monkeypatch, tmp_path):
  config = fields.make(Config, image_size="8x16")
  model = dataclasses.replace(repository_cases.tiny("sdxl"), scheduler={})
  unet = dataclasses.replace(model.unet.config, sample_size=(4, 8))
  model = dataclasses.replace(model, unet=model.unet.clone(config=unet))
  monkeypatch.setattr(finetuned, "load", lambda path, ema, base: finetuned.Finetuned(model, config))
  assert export_lib.export("run", output=tmp_path / "model")[1:] == [
    "  images of 8x16 pixels, as the run was told",
    "  diffusers' pipeline of XL has to be given height=8 and width=16",
  ]


def test_a_model_without_lora_has_none_to_write(found, tmp_path):
  with pytest.raises(UserError, match="run has no LoRA to write to .*: only a run with"):
    export_lib.export("run", output=tmp_path / "model", lora_output=tmp_path / "lora.safetensors")
  assert not list(tmp_path.iterdir())
