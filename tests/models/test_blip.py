"""ImageReward's network against transformers' BLIP: stored numbers, live, and the full size."""

import dataclasses
import json

import blip_cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import towers_cases

from rlft.models import blip, image_reward
from rlft.models.files import torch_layout
from rlft.types import UserError

TOLERANCE = 1e-4
FULL_SIZE = image_reward.ImageReward(image_reward.ImageRewardConfig())


@pytest.fixture(scope="module")
def small():
  """A jitted small network, its parameters, and inputs for 4 images."""
  rng = np.random.RandomState(2)
  pixels = rng.standard_normal((4, 16, 16, 3)).astype(np.float32)
  ids = rng.randint(5, 18, (4, 10)).astype(np.int32)
  mask = (np.arange(10) < np.array([[10], [3], [7], [1]])).astype(np.int32)
  variables = {"params": blip_cases.params("small")}
  apply = jax.jit(blip_cases.MODULES["small"].apply, static_argnames="method")
  return apply, variables, pixels, ids, mask


@pytest.mark.parametrize("case", blip_cases.CASES)
def test_scores_and_gradients_are_those_that_pytorch_gave(case):
  found = blip_cases.flax_outputs(case)
  # Both would be as good as zero of a network that ignores its images.
  assert np.ptp(found["score"]) > 0.1 and np.abs(found["gradient"]).max() > 0.01
  assert towers_cases.largest_difference(found, blip_cases.stored(case)) <= TOLERANCE


@pytest.mark.parametrize("case", blip_cases.CASES)
def test_scores_and_gradients_are_those_that_pytorch_gives(case):
  pytest.importorskip("torch")
  found, expected = blip_cases.flax_outputs(case), blip_cases.torch_outputs(case)
  assert towers_cases.largest_difference(found, expected) <= TOLERANCE


def test_every_key_of_the_published_model_has_its_place():
  found = towers_cases.flax_tree(FULL_SIZE)
  assert towers_cases.digest(found) == json.loads(blip_cases.TREES.read_text())
  # The published 447 million count the two projections that no score needs: (1024 + 768) x 256,
  # and 256 twice.
  count = sum(int(np.prod(shape)) for shape in found.values())
  assert count == 446_206_689 and round((count + 1792 * 256 + 512) / 1e6) == 447
  # A few of the names that the published file is known to have.
  for name, shape in {
    "blip.visual_encoder.cls_token": (1, 1, 1024),
    "blip.visual_encoder.pos_embed": (1, 197, 1024),
    "blip.visual_encoder.patch_embed.proj.weight": (1024, 3, 16, 16),
    "blip.visual_encoder.blocks.23.attn.qkv.bias": (3072,),
    "blip.visual_encoder.norm.weight": (1024,),
    "blip.text_encoder.embeddings.word_embeddings.weight": (30524, 768),
    "blip.text_encoder.encoder.layer.11.crossattention.self.key.weight": (768, 1024),
    "blip.text_encoder.encoder.layer.0.attention.output.LayerNorm.bias": (768,),
    "mlp.layers.0.weight": (1024, 768),
    "mlp.layers.6.weight": (16, 64),
    "mlp.layers.7.bias": (1,),
  }.items():
    assert found.pop(name) == shape
  assert not [name for name in found if "proj.weight" in name and name.startswith("blip.text")]


def test_the_stored_layout_is_that_of_pytorch():
  pytest.importorskip("torch")
  expected = blip_cases.torch_tree(FULL_SIZE.config)
  assert towers_cases.flax_tree(FULL_SIZE) == expected
  assert towers_cases.digest(expected) == json.loads(blip_cases.TREES.read_text())


def test_state_dicts_go_there_and_back_without_what_no_score_needs():
  module, params = blip_cases.MODULES["small"], blip_cases.params("small")
  state = torch_layout.to_torch(params)
  extra = {
    "blip.vision_proj.weight": np.zeros((256, 32), np.float32),
    "blip.vision_proj.bias": np.zeros(256, np.float32),
    "blip.text_proj.weight": np.zeros((256, 24), np.float32),
    "blip.text_proj.bias": np.zeros(256, np.float32),
    "blip.text_encoder.embeddings.position_ids": np.arange(12)[None],
  }
  back = torch_layout.from_torch(module, {**state, **extra}, ignore=image_reward.IGNORED)
  chex.assert_trees_all_equal(back, params)
  with pytest.raises(UserError, match=r"4 left-over arrays.*blip\.text_proj\.bias"):
    torch_layout.from_torch(module, {**state, **extra})


def test_a_head_is_one_affine_map_by_hand():
  # 2 -> 2 -> 1 without activations: (1, -2) -> (1 + 0 + .5, 0 - 2 - 1) = (1.5, -3)
  #   -> 2 x 1.5 + 1 x -3 + .25 = .25
  layers = {
    "0": {"kernel": np.eye(2, dtype=np.float32), "bias": np.array([0.5, -1], np.float32)},
    "1": {"kernel": np.array([[2], [1]], np.float32), "bias": np.array([0.25], np.float32)},
  }
  head = image_reward.Head((2,))
  x = jnp.array([[1.0, -2.0]], jnp.bfloat16)
  found = head.apply({"params": {"layers": layers}}, x)
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(found, [0.25])


def test_padding_has_no_influence(small):
  apply, variables, pixels, ids, mask = small
  exact = apply(variables, pixels, ids, mask)
  np.testing.assert_allclose(
    apply(variables, pixels, np.where(mask, ids, 0), mask), exact, atol=1e-6
  )
  # The second text has 3 tokens: the third counts.
  changed = ids.copy()
  changed[1, 2] = 4
  assert abs(apply(variables, pixels, changed, mask)[1] - exact[1]) > 1e-3


def test_images_of_one_text_share_it(small):
  apply, variables, pixels, ids, mask = small
  states = apply(variables, pixels, method="encode_images")
  assert states.shape == (4, 17, 32)
  shared = apply(variables, states, ids[:2], mask[:2], method="score")
  spread = np.repeat(ids[:2], 2, axis=0), np.repeat(mask[:2], 2, axis=0)
  np.testing.assert_allclose(shared, apply(variables, pixels, *spread), atol=1e-5)
  with pytest.raises(ValueError, match="4 images for 3 texts"):
    apply(variables, states, ids[:3], mask[:3], method="score")


def test_bfloat16_encoders_give_float32_scores(small):
  apply, variables, pixels, ids, mask = small
  exact = apply(variables, pixels, ids, mask)
  rounded = blip_cases.MODULES["small"].clone(dtype=jnp.bfloat16)
  found = jax.jit(rounded.apply)(variables, pixels, ids, mask)
  assert found.dtype == jnp.float32
  # 0.4 % a rounding, some tens of roundings in a row, scores of size 1.
  assert 1e-5 < np.abs(found - exact).max() < 0.05


def test_a_network_starts_with_scores_of_moderate_size_that_depend_on_the_image():
  module = blip_cases.MODULES["other"]
  pixels = np.random.RandomState(2).standard_normal((2, 24, 24, 3)).astype(np.float32)
  given = pixels, np.array([[2, 6, 3, 0]]), np.array([[1, 1, 1, 0]])
  start = jax.jit(module.init_with_output)
  scores, _ = start(jax.random.key(0), *given)
  assert np.abs(scores).max() < 5 and abs(scores[0] - scores[1]) > 0.01


def test_sizes_that_do_not_fit_are_refused(small):
  _, variables, pixels, ids, mask = small
  module = blip_cases.MODULES["small"]
  with pytest.raises(ValueError, match=r"\(8, 16, 3\), but the image encoder takes \(16, 16, 3\)"):
    jax.eval_shape(module.apply, variables, pixels[:, :8], ids, mask)
  ids = mask = np.ones((4, 13), np.int32)
  with pytest.raises(ValueError, match="13 tokens, but the text encoder takes at most 12"):
    jax.eval_shape(module.apply, variables, pixels, ids, mask)


def test_a_config_is_what_json_says():
  config = blip_cases.MODULES["other"].config
  data = json.loads(json.dumps(dataclasses.asdict(config)))
  assert image_reward.ImageRewardConfig.from_dict(data) == config
  part = {"_comment": "x", "vision": {"patch_size": 32}, "head_widths": [4]}
  assert image_reward.ImageRewardConfig.from_dict(part) == image_reward.ImageRewardConfig(
    vision=blip.VisionConfig(patch_size=32), head_widths=(4,)
  )


@pytest.mark.parametrize(
  ("data", "message"),
  [
    ({"visoin": {}}, "unknown option 'visoin'; use vision, text, "),
    ({"text": {"width": 3}}, "'text': unknown option 'width'; use vocab_size, "),
    ({"vision": {"patch_size": 15}}, "image_size=224 must be a multiple of patch_size=15"),
    ({"vision": {"num_attention_heads": 7}}, "image encoder config: hidden_size=1024 must be"),
    ({"text": {"num_attention_heads": 7}}, "text encoder config: hidden_size=768 must be"),
    ({"text_length": 513}, "text_length=513 must be between 1 and max_position_embeddings=512"),
    ({"head_widths": []}, "head_widths must not be empty"),
    ({"std": 0}, "std=0 must be positive"),
  ],
)
def test_a_config_that_does_not_fit_is_refused_in_one_line(data, message):
  with pytest.raises(UserError, match=message) as caught:
    image_reward.ImageRewardConfig.from_dict(data)
  assert "\n" not in str(caught.value)
