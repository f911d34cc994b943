"""The reward 'image-reward': words, files, images of any size; the published scores."""

import dataclasses
import json
import os
import pathlib

import blip_cases
import chex
import jax
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy

from rlft.models.files import torch_layout
from rlft.rewards import image_reward, preprocess
from rlft.types import UserError

GOLDEN = pathlib.Path(
  os.environ.get("RLFT_GOLDEN", pathlib.Path(__file__).parents[3] / "shared" / "golden")
)
# As the README of the published model gives them.
GOLDEN_PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
GOLDEN_SCORES = (0.58116, 0.27453, -1.41318, -2.02957)
# PIL rounds to 8 bits after each pass of its resampling; this port does not.
GOLDEN_TOLERANCE = 0.05


@pytest.fixture
def model(tmp_path):
  """A directory with the small model as ImageReward is published, with config and vocabulary."""
  state = torch_layout.to_torch(blip_cases.params("small"))
  state["blip.vision_proj.weight"] = np.zeros((4, 32), np.float32)
  state["blip.text_proj.bias"] = np.zeros(4, np.float32)
  safetensors.numpy.save_file(state, tmp_path / "ImageReward.safetensors")
  config = dataclasses.asdict(blip_cases.MODULES["small"].config)
  (tmp_path / "config.json").write_text(json.dumps(config))
  blip_cases.write_vocabulary(tmp_path / "vocab.txt")
  return tmp_path


def test_words_become_pieces_by_hand():
  # The 10 places hold [CLS] two cat ##s play ##ing , in the [SEP]; the third text is empty.
  found = image_reward.tokenize(blip_cases.tokenizer(), blip_cases.PROMPTS)
  assert {key: array.dtype for key, array in found.items()} == {"ids": np.int32, "mask": np.int32}
  np.testing.assert_array_equal(
    found["ids"],
    [
      [2, 5, 6, 3, 0, 0, 0, 0, 0, 0],
      [2, 8, 9, 7, 10, 11, 15, 12, 13, 3],
      [2, 3, 0, 0, 0, 0, 0, 0, 0, 0],
      [2, 6, 7, 3, 0, 0, 0, 0, 0, 0],
    ],
  )
  np.testing.assert_array_equal(found["mask"].sum(axis=1), [4, 10, 2, 4])
  np.testing.assert_array_equal(found["mask"], np.sort(found["mask"], axis=1)[:, ::-1])
  unknown = image_reward.tokenize(blip_cases.tokenizer(), ["A zebra"])
  np.testing.assert_array_equal(unknown["ids"][0, :5], [2, 5, 1, 3, 0])


def test_the_reward_from_files_scores_as_the_network_does(model):
  reward = image_reward.image_reward(str(model))
  assert reward.name == "image-reward" and not reward.is_set
  expected = blip_cases.reward("small")
  chex.assert_trees_all_equal(reward.params, expected.params)
  features = reward.prepare(blip_cases.PROMPTS, [{}] * 4)
  chex.assert_trees_all_equal(features, expected.prepare(blip_cases.PROMPTS, [{}] * 4))
  programs = [
    str(jax.make_jaxpr(made.score)(made.params, blip_cases.images("reduced"), features))
    for made in (reward, expected)
  ]
  assert programs[0] == programs[1]


def test_weights_as_pytorch_saves_them(model):
  torch = pytest.importorskip("torch")
  file = model / "ImageReward.safetensors"
  state = safetensors.numpy.load_file(file)
  torch.save({k: torch.from_numpy(v) for k, v in state.items()}, model / "ImageReward.pt")
  file.unlink()
  expected = blip_cases.params("small")
  chex.assert_trees_all_equal(image_reward.image_reward(str(model)).params, expected)


def test_an_image_that_cannot_be_scored_is_nan_and_the_others_are_not():
  exact = blip_cases.flax_outputs("reduced")["score"]
  images = blip_cases.images("reduced")
  images[1, 5, 5, 1] = np.nan
  found = blip_cases.flax_outputs("reduced", x=images)["score"]
  assert np.isnan(found[1])
  np.testing.assert_array_equal(np.delete(found, 1), np.delete(exact, 1))


def test_weights_config_and_vocabulary_may_be_named_one_by_one(model):
  elsewhere = model / "elsewhere"
  elsewhere.mkdir()
  (model / "vocab.txt").rename(elsewhere / "words.txt")
  weights = str(model / "ImageReward.safetensors")
  with pytest.raises(UserError, match="no vocab.txt or tokenizer.json in it .* tokenizer=<path>"):
    image_reward.image_reward(weights)
  reward = image_reward.image_reward(weights, str(elsewhere / "words.txt"), "bfloat16")
  assert reward.prepare(["a dog"], [{}])["ids"].tolist() == [[2, 5, 6, 3, 0, 0, 0, 0, 0, 0]]
  (elsewhere / "words.txt").rename(elsewhere / "vocab.txt")
  named = image_reward.load("emoji", weights, str(elsewhere), dtype="float32")
  assert named.name == "emoji"
  with pytest.raises(UserError, match=r"missing.txt does not exist"):
    image_reward.image_reward(weights, str(elsewhere / "missing.txt"))


def test_without_a_config_of_its_own_the_weights_must_be_the_published_model(model):
  # What bert-base-uncased, where the vocabulary comes from, has beside it.
  (model / "config.json").write_text('{"model_type": "bert", "hidden_size": 768}')
  vocabulary = "\n".join([*blip_cases.VOCABULARY, *(f"[unused{i}]" for i in range(30522 - 18))])
  (model / "vocab.txt").write_text(vocabulary + "\n")
  with pytest.raises(UserError, match=r"no blip\.text_encoder.*layer\.10.*of another model than"):
    image_reward.image_reward(str(model))


@pytest.mark.parametrize(
  ("lines", "message"),
  [
    (blip_cases.VOCABULARY[1:], r"has no \[PAD\]; give a BERT vocabulary"),
    ((), r"has no \[PAD\]"),
    (blip_cases.VOCABULARY[:-1], "has 17 tokens, but the model has 20; give the vocabulary of"),
  ],
)
def test_a_vocabulary_that_is_not_the_models_is_refused(model, lines, message):
  (model / "vocab.txt").write_text("\n".join(lines))
  with pytest.raises(UserError, match=message) as caught:
    image_reward.image_reward(str(model))
  assert "\n" not in str(caught.value)


def test_a_vocabulary_may_hold_any_character_and_may_not_be_binary(tmp_path):
  path = tmp_path / "vocab.txt"
  path.write_text("\n".join([*blip_cases.VOCABULARY, "\u2028", "\x85"]), encoding="utf-8")
  config = blip_cases.MODULES["small"].config
  assert len(image_reward.open_tokenizer(str(path), config)) == 20
  path.write_bytes(b"\xff\xfe\x00")
  with pytest.raises(UserError, match="cannot be read"):
    image_reward.open_tokenizer(str(path), config)


def test_weights_that_lack_something_are_refused_by_its_name(model):
  state = safetensors.numpy.load_file(model / "ImageReward.safetensors")
  del state["mlp.layers.7.bias"]
  safetensors.numpy.save_file(state, model / "ImageReward.safetensors")
  with pytest.raises(UserError, match=r"no mlp\.layers\.7\.bias \(expected shape \(1,\)\)"):
    image_reward.image_reward(str(model))


def test_the_published_scores():
  weights = os.environ.get("RLFT_IMAGE_REWARD")
  if not weights:
    pytest.skip(
      "set RLFT_IMAGE_REWARD to ImageReward.pt (1.8 GB, THUDM/ImageReward on the hub), with"
      " bert-base-uncased's vocab.txt beside it or named by RLFT_BERT_VOCAB"
    )
  files = [GOLDEN / f"imagereward_{i}.webp" for i in range(1, 5)]
  if not all(file.exists() for file in files):
    pytest.skip(f"set RLFT_GOLDEN to a directory with {files[0].name} to {files[-1].name}")
  reward = image_reward.image_reward(weights, os.environ.get("RLFT_BERT_VOCAB"))
  pictures = [Image.open(file).convert("RGB") for file in files]
  features = reward.prepare([GOLDEN_PROMPT], [{}])
  score = jax.jit(reward.score)
  images = np.stack([np.asarray(picture, np.float32) / 255 for picture in pictures])
  np.testing.assert_allclose(
    score(reward.params, images, features), GOLDEN_SCORES, atol=GOLDEN_TOLERANCE
  )
  # With the resampling left to PIL, as in the original, what remains is the network.
  small = [picture.resize((224, 224), Image.Resampling.BICUBIC) for picture in pictures]
  images = np.stack([np.asarray(picture, np.float32) / 255 for picture in small])
  np.testing.assert_allclose(score(reward.params, images, features), GOLDEN_SCORES, atol=5e-3)


def test_the_golden_images_are_resized_as_pil_does_within_its_rounding():
  files = [GOLDEN / f"imagereward_{i}.webp" for i in range(1, 5)]
  if not all(file.exists() for file in files):
    pytest.skip(f"set RLFT_GOLDEN to a directory with {files[0].name} to {files[-1].name}")
  for file in files:
    picture = Image.open(file).convert("RGB")
    assert picture.size == (512, 512)
    expected = np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC), np.float32)
    image = np.asarray(picture, np.float32)[None] / 255
    found = 255 * np.asarray(preprocess.short_side_crop(image, 224, centre="round"))[0]
    difference = np.abs(found - expected)
    assert difference.max() <= 1.2 and difference.mean() <= 0.3
