"""CLIP's two towers against transformers: stored numbers, live, and the published layouts."""

import json

import jax
import numpy as np
import pytest
import towers_cases

from rlft.models import clip
from rlft.models.files import torch_layout
from rlft.types import UserError

TOLERANCE = 1e-4

CASES = ("clip_quick_gelu", "clip_gelu")


@pytest.mark.parametrize("case", CASES)
def test_numbers_and_gradients_are_those_that_pytorch_gave(case):
  found = towers_cases.flax_outputs(case)
  assert np.abs(found["gradient"]).max() > 1e-3
  assert towers_cases.largest_difference(found, towers_cases.stored(case)) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_numbers_and_gradients_are_those_that_pytorch_gives(case):
  pytest.importorskip("torch")
  found, expected = towers_cases.flax_outputs(case), towers_cases.torch_outputs(case)
  assert towers_cases.largest_difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("name", towers_cases.FULL_SIZE)
def test_every_key_of_the_published_models_has_its_place(name):
  found = towers_cases.flax_tree(towers_cases.full_size(name))
  expected = json.loads(towers_cases.TREES.read_text())[name]
  assert towers_cases.digest(found) == expected


@pytest.mark.parametrize("name", towers_cases.FULL_SIZE)
def test_the_stored_layouts_are_those_of_pytorch(name):
  pytest.importorskip("torch")
  expected = json.loads(towers_cases.TREES.read_text())[name]
  assert towers_cases.digest(towers_cases.torch_tree(name)) == expected


@pytest.mark.parametrize("case", ["clip_gelu", "owlv2"])
def test_state_dicts_go_there_and_back(case):
  module = towers_cases.MODULES[case]
  params = towers_cases.params(case)
  state = torch_layout.to_torch(params)
  assert {name: array.shape for name, array in state.items()} == towers_cases.flax_tree(module)
  back = torch_layout.from_torch(module, state)
  assert jax.tree.map(np.shape, back) == jax.tree.map(np.shape, params)
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_bfloat16_towers_give_float32_features():
  exact = towers_cases.flax_outputs("clip_quick_gelu")
  rounded = towers_cases.flax_outputs_rounded("clip_quick_gelu")
  for name, array in rounded.items():
    assert array.dtype == np.float32
    # 0.4 % a rounding, some tens of roundings in a row.
    error = np.abs(array - exact[name]).max() / np.abs(exact[name]).max()
    assert 1e-5 < error < 0.03, name


def test_what_follows_the_end_token_has_no_influence():
  ids = towers_cases.IDS[:1]
  other = np.where(np.arange(ids.shape[1]) > 3, 5, ids)
  found = towers_cases.apply(
    "clip_quick_gelu", np.concatenate([ids, other]), method="text_features"
  )
  np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_the_place_of_the_end_token():
  states = np.arange(8, dtype=np.float32).reshape(1, 8, 1)
  ids = np.array([[56, 59, 9, 57, 57, 58, 0, 0]], np.int32)
  assert clip.pool_end(states, ids, 57) == 3  # the first 57
  assert clip.pool_end(states, ids, None) == 1  # 59 is the highest
  assert clip.pool_end(states, ids, 44) == 0  # there is none


def test_images_of_another_size_and_long_texts_are_refused():
  with pytest.raises(ValueError, match=r"\(16, 12, 3\), but the image tower takes \(24, 24, 3\)"):
    towers_cases.apply("clip_gelu", np.zeros((1, 16, 12, 3)), method="image_features")
  with pytest.raises(ValueError, match="9 tokens, but the text encoder takes at most 8"):
    towers_cases.apply("clip_gelu", np.zeros((1, 9), np.int32), method="text_features")


def test_old_configs_keep_options_in_dicts_of_their_own():
  data = {
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": None,
    "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12, "dropout": 0.0},
    "vision_config": {"image_size": 336, "patch_size": 14, "hidden_act": "gelu"},
    "vision_config_dict": {"hidden_act": "quick_gelu"},
  }
  config = clip.CLIPConfig.from_dict(data)
  assert config.projection_dim == 768
  assert config.text_config == clip.CLIPTextConfig(hidden_size=768, num_attention_heads=12)
  assert config.vision_config == clip.CLIPVisionConfig(image_size=336, patch_size=14)
  assert config.vision_config.grid == 24


@pytest.mark.parametrize(
  ("data", "message"),
  [
    ({"model_type": "siglip"}, "model_type='siglip' is not supported"),
    ({"vision_config": {"hidden_act": "relu"}}, "image tower config: hidden_act='relu' must be"),
    ({"vision_config": {"patch_size": 15}}, "image_size=224 must be a multiple of patch_size=15"),
    ({"vision_config": {"num_attention_heads": 7}}, "hidden_size=768 must be a multiple of"),
    ({"text_config": {"num_attention_heads": 7}}, "text encoder config: hidden_size=512 must be"),
  ],
)
def test_configs_that_are_refused(data, message):
  with pytest.raises(UserError, match=message):
    clip.CLIPConfig.from_dict(data)
