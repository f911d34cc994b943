"""What is exported, as diffusers and PEFT read it: the same images, and not a single warning."""

import contextlib
import dataclasses
import logging
import warnings

import numpy as np
import pytest
import repository_cases as cases

from rlft.models import lora
from rlft.models.files import lora_files, pretrained

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

FAMILIES = ("sd1.5", "sd2.1", "sdxl")
SCALE = 0.5
# What diffusers says of every adapter of a UNet alone, its own included.
_NO_TEXT_LORA = "No LoRA keys associated to CLIPTextModel"
_LIBRARIES = ("diffusers", "transformers", "peft", "huggingface_hub", "accelerate", "torch")


@pytest.fixture(scope="module", autouse=True)
def imported():
  """Warnings that importing diffusers gives are not about what it reads."""
  for name in ("DDIMScheduler", "StableDiffusionPipeline", "StableDiffusionXLPipeline"):
    getattr(diffusers, name)
  diffusers.utils.logging.disable_progress_bar()


class _Records(logging.Handler):
  def __init__(self):
    super().__init__(logging.WARNING)
    self.messages = []

  def emit(self, record):
    self.messages.append(f"{record.name}: {record.getMessage()}")


@contextlib.contextmanager
def no_warning():
  """Fails if anything is warned of or logged as a warning inside."""
  records = _Records()
  loggers = [logging.getLogger(name) for name in _LIBRARIES]
  for logger in loggers:
    logger.addHandler(records)
  try:
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter("always")
      yield
  finally:
    for logger in loggers:
      logger.removeHandler(records)
  found = [str(warning.message) for warning in caught] + records.messages
  assert [message for message in found if _NO_TEXT_LORA not in message] == []


def load(root, **settings):
  with no_warning():
    pipe = diffusers.DiffusionPipeline.from_pretrained(root, **settings)
  pipe.set_progress_bar_config(disable=True)
  return pipe


def draw(pipe):
  noise = np.random.RandomState(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
  with no_warning():
    return pipe(
      ["two cats", "a photo of a dog"],
      latents=torch.from_numpy(noise),
      height=16,
      width=16,
      num_inference_steps=4,
      guidance_scale=3.0,
      output_type="np",
    ).images


def adapter(model):
  rng = np.random.RandomState(0)
  return {
    path: {
      "a": 0.4 * rng.standard_normal((fan_in, 2)).astype(np.float32),
      "b": 0.4 * rng.standard_normal((2, fan_out)).astype(np.float32),
    }
    for path, (fan_in, fan_out) in lora.targets(model.params["unet"]).items()
  }


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
  """`base` and `merged`, both written by rlft, and the adapter in both formats."""
  folder = tmp_path_factory.mktemp(request.param)
  model = cases.tiny(request.param)
  pretrained.save(folder / "base", model)
  factors = adapter(model)
  unet = lora.merge(model.params["unet"], factors, SCALE)
  merged = dataclasses.replace(model, params={**model.params, "unet": unet})
  pretrained.save(folder / "merged", merged)
  pretrained.save(folder / "half", merged, dtype=np.float16)
  for format in lora_files.FORMATS:
    lora_files.save(folder / f"{format}.safetensors", factors, scale=SCALE, format=format)
  return folder


@pytest.fixture(scope="module")
def expected(folder):
  return draw(load(folder / "merged"))


def test_a_directory_is_read_without_a_warning(folder, expected):
  assert expected.shape == (2, 16, 16, 3) and expected.std() > 0.01
  assert type(load(folder / "merged").scheduler) is diffusers.DDIMScheduler


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_directory_in_half_precision_is_read_without_a_warning(folder, dtype):
  half, full = load(folder / "half", torch_dtype=dtype), load(folder / "merged")
  for name in (name for name in half.components if name.startswith(("unet", "vae", "text"))):
    expected = getattr(full, name).state_dict()
    for key, found in getattr(half, name).state_dict().items():
      assert found.dtype == dtype
      assert torch.equal(found, expected[key].half().to(dtype))


@pytest.mark.parametrize("format", lora_files.FORMATS)
def test_an_adapter_on_the_base_model_is_the_merged_model(folder, expected, format):
  pytest.importorskip("peft")
  pipe = load(folder / "base")
  assert np.abs(draw(pipe) - expected).max() > 0.01, "the adapter changes nothing"
  with no_warning():
    pipe.load_lora_weights(folder, weight_name=f"{format}.safetensors")
  np.testing.assert_allclose(draw(pipe), expected, atol=1e-4)
