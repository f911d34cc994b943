"""What export says of the model that it writes."""

import dataclasses

import hub_cases
import models_cases
import numpy as np
import pytest
import repository_cases
import safetensors.numpy

from rlft.config import fields
from rlft.config.settings import Config
from rlft.inference import export as export_lib
from rlft.inference import load as finetuned
from rlft.models.files import hub as hub_lib
from rlft.models.files import pretrained
from rlft.types import UserError


@pytest.fixture
def hub(monkeypatch):
  """The hub that is asked, and a token for it."""
  opened = hub_cases.Hub()
  monkeypatch.setattr(hub_lib.constants, "ENDPOINT", opened.endpoint)
  # The newest releases upload by another protocol where they can; the hub still has this one.
  monkeypatch.setattr(hub_lib.constants, "HF_HUB_DISABLE_XET", True)
  monkeypatch.setenv("HF_TOKEN", "hf_secret")
  yield opened
  opened.close()


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
    "  no safety checker, whatever the base model had: give diffusers' pipeline one",
    "  scheduler: timestep_spacing=trailing, as the run was told",
    "  images of 32x32 pixels, as the run was told",
  ]
  written = pretrained.load(output)
  assert written.scheduler["timestep_spacing"] == "trailing"


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_are_stored_in_the_type_that_was_asked_for(found, tmp_path, dtype):
  output = tmp_path / "model"
  export_lib.export("run", output=output, dtype=dtype)
  files = list(output.rglob("*.safetensors"))
  assert len(files) == 3
  for path in files:
    assert {x.dtype for x in safetensors.numpy.load_file(path).values()} == {np.dtype(dtype)}


@pytest.mark.parametrize("ema", [True, False])
def test_averages_are_written_only_if_asked_for(found, monkeypatch, tmp_path, ema):
  asked = []
  monkeypatch.setattr(finetuned, "load", lambda path, **how: asked.append(how["ema"]) or found)
  export_lib.export("run", output=tmp_path / "model", ema=ema)
  assert asked == [ema]


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


def test_a_model_comes_with_its_card_and_is_uploaded(found, hub, tmp_path):
  output = tmp_path / "model"
  *_, said = export_lib.export("run", output=output, push_to_hub="org/name")
  assert said == f"uploaded to {hub.endpoint}/org/name"
  assert hub.made[0]["organization"] == "org" and hub.tokens == {"Bearer hf_secret"}
  written = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
  assert {"README.md", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"} <= written
  assert hub.files.keys() == written
  for name, content in hub.files.items():
    assert content == (output / name).read_bytes()
  assert b'from_pretrained("org/name")' in hub.files["README.md"]


def test_an_adapter_alone_is_uploaded_with_a_card(found, hub, monkeypatch, tmp_path):
  adapted = dataclasses.replace(found, lora={}, lora_scale=1.0)
  monkeypatch.setattr(finetuned, "load", lambda path, ema, base: adapted)
  monkeypatch.setattr(
    export_lib.lora_files, "save", lambda path, *_, **__: path.write_bytes(b"weights")
  )
  lora = tmp_path / "lora.safetensors"
  export_lib.export("run", lora_output=lora, push_to_hub="org/name")
  assert hub.files.keys() == {"README.md", "lora.safetensors"}
  assert hub.files["lora.safetensors"] == b"weights"
  assert b'weight_name="lora.safetensors"' in hub.files["README.md"]
  assert list(tmp_path.iterdir()) == [lora]  # No card where other files may be.


@pytest.mark.parametrize(
  ("status", "message"),
  [
    (401, r"the hub refuses the token \(401\); log in with 'hf auth login', or set HF_TOKEN"),
    (403, r"the hub refuses the token \(403\)"),
    (500, "it cannot be uploaded .*500.*; what was written here is intact, try again"),
  ],
)
def test_a_hub_that_refuses_is_one_line(hub, status, message):
  hub.status = status
  with pytest.raises(UserError, match=f"--push_to_hub=org/name: {message}") as caught:
    hub_lib.upload("org/name", {"README.md": b"x"})
  assert "\n" not in str(caught.value) and not hub.files


def test_what_cannot_be_uploaded_is_said_before_anything_is_read(monkeypatch, tmp_path):
  monkeypatch.setattr(finetuned, "load", None)
  monkeypatch.setattr(hub_lib.huggingface_hub, "get_token", lambda: None)
  for repo, message in (
    ("name", "--push_to_hub=name is no name of a hub's repository: write org/name"),
    ("org/name@main", "is no name of a hub's repository"),
    ("a..b/na--me", r"is no name of a hub's repository \(.*\): write org/name"),
    ("../name", r"is no name of a hub's repository \(.*\): write org/name"),
    ("org/name", "nobody is logged in to the hub; do so with 'hf auth login', or set HF_TOKEN"),
  ):
    with pytest.raises(UserError, match=message):
      export_lib.export("run", output=tmp_path / "model", push_to_hub=repo)


def test_a_model_without_lora_has_none_to_write(found, tmp_path):
  with pytest.raises(UserError, match="run has no LoRA to write to .*: only a run with"):
    export_lib.export("run", output=tmp_path / "model", lora_output=tmp_path / "lora.safetensors")
  assert not list(tmp_path.iterdir())
