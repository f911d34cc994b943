"""Every family in the layouts in which it is published, from a directory and from a hub's cache."""

import dataclasses

from huggingface_hub import constants
import jax
import models_cases
import numpy as np
import pytest
import repository_cases as cases

from rlft.diffusion import ddim
from rlft.models.files import pretrained
from rlft.types import UserError


def rounded(params, layout):
  dtype = np.float16 if "half" in layout else np.float32
  return jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params)


def assert_same(found, expected, layout):
  assert models_cases.fingerprint(found.params) == models_cases.fingerprint(
    rounded(expected.params, layout)
  )
  for name in ("unet", "vae", "text_encoders", "zero_empty", "scheduler"):
    assert getattr(found, name) == getattr(expected, name)
  texts = ["a photo of a dog", ""]
  np.testing.assert_array_equal(found.tokenize(texts)[0], expected.tokenize(texts)[0])


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """The cache of a hub that cannot be reached."""
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  return tmp_path


@pytest.mark.parametrize(
  ("family", "layout", "today"),
  [
    ("sd1.5", "full", False),
    ("sd2", "half shards", True),
    ("sd2.1", "old half shards", False),
    ("sdxl", "shards", True),
  ],
)
def test_a_published_model(tmp_path, family, layout, today):
  expected = cases.write(tmp_path / "model", family, layout, today=today)
  assert_same(pretrained.load(tmp_path / "model"), expected, layout)


@pytest.mark.parametrize(
  ("family", "layout", "today"), [("sd1.5", "half", True), ("sdxl", "half shards", False)]
)
def test_a_model_of_a_hub(cache, family, layout, today):
  source, expected = cases.in_cache(cache, family, layout, today=today)
  assert_same(pretrained.load(source), expected, layout)


def test_what_the_cache_of_a_hub_does_not_have(cache):
  source = f"org/name@{cases.COMMIT}"
  missing = f"{source}: .* is not in the cache, and the hub cannot be reached; download it"
  for load in (pretrained.find, pretrained.load):
    with pytest.raises(UserError, match=missing):
      load(source)
  cases.in_cache(cache, "sd1.5", "half")
  (file,) = cache.rglob("vae/*.fp16.safetensors")
  file.unlink()
  with pytest.raises(UserError, match=f"{source}: vae/diffusion_pytorch_model.safetensors is not"):
    pretrained.load(source)


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ("org/name", "needs a revision, since its files may change: write org/name@<commit hash>"),
    ("org/name@main/unet", "is not a directory: give .* a hub's org/name@revision, .* or emoji-sd"),
    ("nowhere", "nowhere is not a directory: give"),
  ],
)
def test_what_names_no_model(source, message):
  with pytest.raises(UserError, match=message) as error:
    pretrained.load(source)
  assert "\n" not in str(error.value)


def test_tokens_are_padded_as_each_tokenizer_does():
  ids, cut = cases.tiny("sdxl").tokenize(["two cats", "dog " * 20])
  assert ids.shape == (2, 2, 16) and ids.dtype == np.int32 and cut == 1
  first, second = cases.tokenizers("sdxl")
  # Begin, two words, end, padding.
  np.testing.assert_array_equal(ids[0, :, :4], ids[0, :1, :4].repeat(2, axis=0))
  assert set(ids[0, 0, 4:]) == {first.end_id}
  assert set(ids[0, 1, 4:]) == {0} and second.pad_id == 0


def test_the_empty_prompt_of_sdxl(tmp_path):
  cases.write(tmp_path / "model", "sdxl")
  index = tmp_path / "model" / "model_index.json"
  index.write_text(index.read_text().replace('"force_zeros_for_empty_prompt": true', '"x": 0'))
  assert pretrained.load(tmp_path / "model").zero_empty  # The default of diffusers.
  index.write_text(index.read_text().replace('"x": 0', '"force_zeros_for_empty_prompt": false'))
  assert not pretrained.load(tmp_path / "model").zero_empty


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_what_is_written_again_draws_with_the_same_noise(tmp_path, family):
  model = cases.tiny(family)
  pretrained.save(tmp_path / "model", model)
  again = pretrained.load(tmp_path / "model")
  assert_same(again, dataclasses.replace(model, scheduler=again.scheduler), "full")
  assert again.scheduler["_class_name"] == "DDIMScheduler"
  for name in ("skip_prk_steps", "interpolation_type", "use_karras_sigmas"):
    assert name not in again.scheduler
  jax.tree.map(
    np.testing.assert_array_equal,
    ddim.make(again.scheduler, 10),
    ddim.make(model.scheduler, 10),
  )
