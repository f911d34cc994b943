"""OWL-ViT and OWLv2 against transformers; the published layouts are in test_clip.py."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import towers_cases

from rlft.models import owlvit
from rlft.types import UserError

TOLERANCE = 1e-4

CASES = ("owlvit", "owlv2")


@pytest.mark.parametrize("case", CASES)
def test_numbers_and_gradients_are_those_that_pytorch_gave(case):
  found = towers_cases.flax_outputs(case)
  assert np.abs(found["gradient"]).max() > 1e-4
  assert towers_cases.largest_difference(found, towers_cases.stored(case)) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_numbers_and_gradients_are_those_that_pytorch_gives(case):
  pytest.importorskip("torch")
  found, expected = towers_cases.flax_outputs(case), towers_cases.torch_outputs(case)
  assert ("objectness" in found) == (case == "owlv2")
  assert towers_cases.largest_difference(found, expected) <= TOLERANCE


def test_queries_may_be_encoded_once_for_a_batch():
  module, variables = towers_cases.MODULES["owlvit"], {"params": towers_cases.params("owlvit")}
  given, own = towers_cases.inputs("owlvit"), towers_cases.flax_outputs("owlvit")

  @jax.jit
  def shared(pixels, ids):
    queries = module.apply(variables, ids, method="encode_queries")
    patches = module.apply(variables, pixels, method="encode_images")
    return module.apply(variables, patches, queries, method="detect")

  found = shared(given["pixels"], given["ids"][0])
  assert found.logits.shape == (2, 16, 2) and found.boxes.shape == (2, 16, 4)
  assert found.objectness is None
  confidence = jax.nn.sigmoid(found.logits)
  np.testing.assert_allclose(confidence[0], own["confidence"][0], atol=1e-5)
  np.testing.assert_allclose(found.boxes, own["boxes"], atol=1e-5)
  assert np.abs(confidence[1, :, 0] - own["confidence"][1, :, 0]).max() > 0.01  # another text


def test_padding_is_never_found():
  confidence = towers_cases.flax_outputs("owlvit")["confidence"]
  assert (confidence[1, :, 1] == 0).all()
  assert (confidence[0] > 0).all() and (confidence[1, :, 0] > 0).all()


def test_default_boxes_are_one_patch_at_its_lower_right_corner():
  bias = np.asarray(owlvit.box_bias(2))
  # logit(1/2) = 0; of 1, with the guards: log(1 + 1e-4) - log(1e-4).
  far = math.log(1 + 1e-4) - math.log(1e-4)
  np.testing.assert_allclose(
    bias, [[0, 0, 0, 0], [far, 0, 0, 0], [0, far, 0, 0], [far, far, 0, 0]], rtol=1e-3, atol=1e-6
  )


def test_bfloat16_towers_with_float32_heads():
  exact = towers_cases.flax_outputs("owlv2")
  rounded = towers_cases.flax_outputs_rounded("owlv2")
  for name, tolerance in {"confidence": 0.03, "boxes": 0.03, "objectness": 0.2}.items():
    assert rounded[name].dtype == np.float32
    assert 1e-5 < np.abs(rounded[name] - exact[name]).max() < tolerance, name


def test_defaults_are_those_of_the_published_models():
  assert owlvit.OwlViTConfig.from_dict({"model_type": "owlvit"}) == owlvit.OwlViTConfig()
  config = owlvit.OwlViTConfig.from_dict(
    {"model_type": "owlv2", "vision_config": {"image_size": 960}, "text_config": {}}
  )
  assert config.vision_config.grid == 60
  assert config.text_config.max_position_embeddings == 16


@pytest.mark.parametrize(
  ("data", "message"),
  [
    ({"model_type": "clip"}, "model_type='clip' is not supported"),
    ({}, "model_type=None is not supported"),
    ({"model_type": "owlvit", "projection_dim": 256}, "projection_dim=256 must be"),
  ],
)
def test_configs_that_are_refused(data, message):
  with pytest.raises(UserError, match=message):
    owlvit.OwlViTConfig.from_dict(data)
  with pytest.raises(UserError, match="model_type='detr' must be one of owlvit, owlv2"):
    dataclasses.replace(owlvit.OwlViTConfig(), model_type="detr")
