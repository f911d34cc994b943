"""What the reward models learn from: scenes with their truth, and how they are spoiled."""

import jax
import numpy as np

from rlft.emoji import art, prompts, scenes, world

N_SCENES = 200
DEGRADE = jax.jit(scenes.degrade)


def test_scenes_say_what_is_where():
  batch = scenes.scenes(np.random.default_rng(3), N_SCENES, wide=True)
  again = scenes.scenes(np.random.default_rng(3), N_SCENES, wide=True)
  jax.tree.map(np.testing.assert_array_equal, batch, again)
  person = batch.tones >= 0
  np.testing.assert_array_equal(batch.classes[:, 0] == scenes.PERSON, person)
  assert np.all(batch.classes[:, 0] >= 0) and np.all(batch.classes[person, 1] == -1)
  assert np.all(batch.regions[:, 0].mean((1, 2)) > 0.002)
  both = batch.classes[:, 1] >= 0
  assert np.mean(batch.visible[both].min(1) < 0.6) > 0.5  # crowded ones
  assert np.all(batch.visible[~both, 0] > 0.99) and np.all(batch.visible[~both, 1] == 0)
  assert not np.any(batch.regions[~both, 1])
  assert np.bincount(batch.tones[person], minlength=4).min() >= 4  # uniform, unlike the world
  # Outside all regions there is the background.
  outside = ~batch.regions.any(1)
  difference = np.abs(batch.images.astype(int) - batch.backgrounds[:, None, None]).max(-1)
  assert np.mean(difference[outside] <= 6) > 0.9  # but for the soft edges of sprites


def test_only_the_given_objects_and_kinds_are_drawn():
  batch = scenes.scenes(
    np.random.default_rng(0), 40, wide=False, objects=("dog", "car"), kinds={"pair": 1.0}
  )
  names = {art.OBJECTS[k] for k in batch.classes.ravel() if k >= 0}
  assert names == {"dog", "car"} and np.all(batch.tones == -1)


def test_boxes_by_hand():
  regions = np.zeros((2, 32, 32), bool)
  regions[0, 4:10, 20:31] = True  # rows 4 to 9, columns 20 to 30
  np.testing.assert_array_equal(scenes._boxes(regions), [[20, 4, 31, 10], [0, 0, 0, 0]])


def test_boxes_follow_the_picture():
  # A black square on white, moved and scaled by whatever the damage says.
  rng = np.random.default_rng(5)
  batch = scenes.scenes(rng, 64, wide=True, kinds={"object": 1.0})
  damage = scenes.damage(rng, 64)
  batch.images[:], batch.regions[:] = 255, False
  batch.images[:, 8:24, 10:20], batch.regions[:, 0, 8:24, 10:20] = 0, True
  batch.boxes[:, 0], batch.visible[:, 0] = [10, 8, 20, 24], 1
  damage.uniform[:, 0] = 1.0  # not blended
  images, truth = DEGRADE(batch, damage)
  dark = np.asarray(images).mean(-1) < 0.5
  found = scenes._boxes(dark)
  np.testing.assert_allclose(np.asarray(truth.boxes)[:, 0] * 32, found, atol=1.3)
  assert np.abs(found - batch.boxes[:, 0]).max() > 2  # they did move


def test_spoiled_labels():
  rng = np.random.default_rng(4)
  batch, damage = scenes.scenes(rng, N_SCENES, wide=True), scenes.damage(rng, N_SCENES)
  images, truth = DEGRADE(batch, damage)
  np.testing.assert_array_equal(images, DEGRADE(batch, damage)[0])
  assert images.min() >= 0 and images.max() <= 1
  presence = np.asarray(truth.presence)
  assert presence.min() >= 0 and presence.max() <= 1
  assert np.all(presence[np.asarray(truth.classes) < 0] == 0)
  graded = np.mean((presence > 0.05) & (presence < 0.55)) / np.mean(presence > 0)
  assert 0.05 < graded < 0.5
  assert np.all(np.asarray(truth.tone_known)[batch.tones < 0] == 0)
  # A quarter seen is nothing, half is half, three quarters is all.
  np.testing.assert_allclose(
    scenes._presence(np.array([0.2, 0.25, 0.5, 0.75, 1])), [0, 0, 0.5, 1, 1]
  )


def test_quantised_blocks_by_hand():
  # A flat 0.5 has the coefficient 8 * 0.5 = 4 = 13.3 steps of 0.3, so it becomes 13 * 0.3 / 8.
  pictures = np.full((3, 32, 32, 3), 0.5, np.float32)
  pictures[2] = world.render_scene(np.random.default_rng(0), "object").image / np.float32(255)
  spoiled = jax.jit(scenes._quantised)(pictures, np.float32([0.3, 0, 0]))
  np.testing.assert_allclose(spoiled[0], 0.4875, atol=1e-6)
  np.testing.assert_allclose(spoiled[1:], pictures[1:], atol=1e-5)


def test_a_second_style_has_all_objects_and_all_tones():
  assert set(art.OBJECTS) < set(art.sprite_names("noto"))
  for occupation in art.OCCUPATIONS:
    light, dark = (
      art.resized(art.portrait_name(occupation, "person", tone), 32, "noto")[0].sum()
      for tone in (0, 4)
    )
    assert light > dark
  first, second = (
    world.render_scene(np.random.default_rng(1), "pair", style=style) for style in art.STYLES
  )
  assert first.objects == second.objects and np.any(first.image != second.image)


def test_classes_of_prompts_are_padded_to_one_shape():
  classes = prompts.object_classes(
    ["", "", ""], [{"objects": [art.OBJECTS[7], art.OBJECTS[95]]}, {"objects": "dog"}, {}]
  )
  dog = art.OBJECTS.index("dog")
  np.testing.assert_array_equal(classes, [[7, 95], [dog, -1], [-1, -1]])
  assert classes.dtype == np.int32
