"""The rewards of OWL-ViT and OWLv2: against PyTorch from the same images, and how they are made."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import owlvit_reward_cases as cases
import pytest
import safetensors.numpy
import towers_cases

from rlft import catalog
from rlft.models.files import torch_layout, vocabulary
from rlft.rewards import named, owlvit
from rlft.types import UserError

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """A directory with a published detector of each kind, as transformers saves them."""
  root = tmp_path_factory.mktemp("detectors")
  for kind in cases.KINDS:
    module, params = cases.detector(kind)
    (root / kind).mkdir()
    safetensors.numpy.save_file(
      torch_layout.to_torch(params), root / kind / "model.safetensors", metadata={"format": "pt"}
    )
    config = json.dumps(dataclasses.asdict(module.config))
    (root / kind / "config.json").write_text(config, encoding="utf-8")
  vocabulary.write_clip(root / "owlvit", cases.tokenizer())
  return root


@pytest.mark.parametrize("size", cases.SIZES)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_score_and_gradient_are_those_that_pytorch_gave(kind, size):
  found = cases.reward_outputs(kind, size)
  expected = cases.stored(kind, size)
  assert np.ptp(expected["score"]) > 0.01 and np.abs(expected["gradient"]).max() > 1e-3
  assert towers_cases.largest_difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("size", cases.SIZES)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_score_and_gradient_are_those_that_pytorch_gives(kind, size):
  pytest.importorskip("torch")
  pytest.importorskip("scipy")
  found = cases.reward_outputs(kind, size)
  expected = cases.torch_reward_outputs(kind, size)
  assert towers_cases.largest_difference(found, expected) <= TOLERANCE


def test_confidence_is_that_of_the_best_patch():
  logits = jnp.array([[[0.0, 5.0], [2.0, 1.0], [-1.0, 0.0]]])
  # 1 / (1 + e^-2), 1 / (1 + e^-5)
  np.testing.assert_allclose(owlvit.confidence(logits), [[0.880797, 0.993307]], atol=1e-6)
  gradient = jax.grad(lambda x: owlvit.confidence(x).sum())(logits)
  np.testing.assert_array_equal(gradient != 0, [[[0, 1], [1, 0], [0, 0]]])


def test_mean_over_what_is_named():
  confidences = jnp.array([[0.2, 0.6, 0.9], [0.4, 0.5, 0.5], [0.1, 0.1, 0.1]])
  present = jnp.array([[True, True, False], [True, False, False], [False, False, False]])
  np.testing.assert_allclose(named.mean(confidences, present), [0.4, 0.4, np.nan], atol=1e-6)
  gradient = jax.grad(lambda x: jnp.nansum(named.mean(x, present)))(confidences)
  np.testing.assert_allclose(gradient, [[0.5, 0.5, 0], [1, 0, 0], [0, 0, 0]])


def test_queries_are_tokens_of_the_template_padded_to_one_shape():
  reward = cases.reward("owlvit", template="a {}", max_objects=2)
  words = cases.tokenizer()
  ids = reward.prepare(
    ["", "", ""], [{"objects": np.array(["dog", "two cats"])}, {}, {"objects": "dog"}]
  )
  assert ids.shape == (3, 2, 12) and ids.dtype == np.int32
  dog = words.encode("a dog")
  assert dog[0] == words.begin_id and dog[-1] == words.end_id == ids.max()
  np.testing.assert_array_equal(ids[0, 0], dog + [0] * (12 - len(dog)))
  np.testing.assert_array_equal(ids[2], [ids[0, 0], [0] * 12])
  assert not ids[1].any()


def test_long_names_are_cut_and_keep_the_end_token():
  reward = cases.reward("owlvit")
  ids = reward.prepare(["", ""], [{"objects": "xyzxyzxyzxyzxyz"}, {"objects": []}])
  assert ids[0, 0, -1] == cases.tokenizer().end_id


def test_weights_are_read_from_files_and_nothing_named_is_nan(files):
  made = catalog.make_reward(f"owlvit?weights={files / 'owlvit'}")
  assert not made.is_set
  ids = made.prepare([""] * 3, [*cases.NAMED[:2], {}])
  score = jax.jit(made.score)
  found = score(made.params, cases.images("small"), ids)
  expected = cases.reward_outputs("owlvit", "small")["score"]
  np.testing.assert_allclose(found, [*expected[:2], np.nan], atol=1e-5)


def test_bfloat16_towers_and_a_tokenizer_from_elsewhere(files):
  spec = f"owlv2?weights={files / 'owlv2'}&tokenizer={files / 'owlvit'}&dtype=bfloat16"
  made = catalog.make_reward(spec)
  ids = made.prepare([""] * 3, cases.NAMED)
  score = jax.jit(made.score)
  found = score(made.params, cases.images("small"), ids)
  assert found.dtype == jnp.float32
  expected = cases.reward_outputs("owlv2", "small")["score"]
  assert 0 < np.abs(found - expected).max() < 0.03


def test_images_may_be_spread_over_a_mesh():
  made = cases.reward("owlvit")
  ids = made.prepare([""] * 3, cases.NAMED)[[0, 1, 2, 0]]
  images = cases.images("small")[[0, 1, 2, 0]]
  mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
  over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  given = jax.device_put((images, ids), over)
  found = jax.jit(made.score)(made.params, *given)
  assert len(found.sharding.device_set) == 4
  expected = cases.reward_outputs("owlvit", "small")["score"][[0, 1, 2, 0]]
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_mistakes(files, tmp_path):
  with pytest.raises(UserError, match="names 3 objects: name at most 2, or raise"):
    cases.reward("owlvit", max_objects=2).prepare(["x"], [{"objects": ["a", "b", "c"]}])
  with pytest.raises(UserError, match="template='a photo' has no place for the object"):
    cases.reward("owlvit", template="a photo")
  with pytest.raises(UserError, match="max_objects=0 must be at least 1"):
    cases.reward("owlvit", max_objects=0)
  with pytest.raises(UserError, match="is of owlv2: use the reward 'owlv2'"):
    catalog.make_reward(f"owlvit?weights={files / 'owlv2'}")
  with pytest.raises(UserError, match="add \\?weights=..."):
    catalog.make_reward("owlv2")
  config = json.loads(pathlib.Path(files, "owlvit", "config.json").read_text(encoding="utf-8"))
  config["vision_config"]["num_hidden_layers"] = 2
  (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
  (tmp_path / "model.safetensors").symlink_to(files / "owlvit" / "model.safetensors")
  with pytest.raises(UserError, match="no owlvit.vision_model.encoder.layers.1.layer_norm1"):
    catalog.make_reward(f"owlvit?weights={tmp_path}&tokenizer={files / 'owlvit'}")
