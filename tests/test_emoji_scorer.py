"""The trained scorer: accuracy of the shipped weights, its training data, and resuming."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from rlft.emoji import art, scorer, scorer_data, scorer_train, world
from rlft.types import UserError

DOG, CAR = (art.OBJECTS.index(name) for name in ("dog", "car"))
N_SCENES = 300


@pytest.fixture(scope="module")
def params():
  return scorer.load()[1]


def render(kind, *, seed=0, **given):
  """A scene's image `[32, 32, 3]` float32 in [0, 1]."""
  scene = world.render_scene(np.random.default_rng(seed), kind, **given)
  return scene.image.astype(np.float32) / 255


def look(params, images):
  """Scores of up to 300 images; filled up, so that all tests share one compilation."""
  empty = np.zeros((N_SCENES - len(images), *images.shape[1:]), np.float32)
  scores = jax.jit(scorer.predict)(params, np.concatenate([images, empty]))
  return jax.tree.map(lambda values: np.asarray(values)[: len(images)], scores)


def test_accuracy_on_fresh_scenes(params):
  accuracy = scorer_train.measure(params, 41, N_SCENES)
  assert accuracy["f1"] >= 0.95 and accuracy["f1_single"] >= 0.95 and accuracy["f1_pair"] >= 0.95
  assert accuracy["absent"] <= 0.002
  assert accuracy["tone"] >= 0.97 and accuracy["skin"] >= 0.98
  assert accuracy["vividness_mae"] <= 0.06


def test_accuracy_on_spoiled_scenes(params):
  accuracy = scorer_train.measure(params, 42, N_SCENES, degraded=True)
  assert accuracy["f1"] >= 0.85
  assert accuracy["confidence_mae"] <= 0.2


def test_shapes_ranges_and_other_sizes(params):
  images = np.random.default_rng(0).random((60, 32, 32, 3)).astype(np.float32)
  images[-1] = render("object", objects=["dog"])
  scores = look(params, images)
  shapes = {name: value.shape for name, value in vars(scores).items()}
  assert shapes == {
    "object_probs": (60, 60), "tone_probs": (60, 4), "skin_prob": (60,), "vividness": (60,),
  }  # fmt: skip
  for value in vars(scores).values():
    assert value.dtype == np.float32 and value.min() >= 0 and value.max() <= 1
  np.testing.assert_allclose(scores.tone_probs.sum(1), 1, atol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, scores, look(params, images))
  large = jax.jit(scorer.predict)(params, images[-1:].repeat(2, axis=1).repeat(3, axis=2))
  assert scores.object_probs[-1, DOG] > 0.8 and large.object_probs[0, DOG] > 0.8
  # Noise is nothing that it knows.
  assert scores.object_probs[:-1].max() < 0.5 and np.mean(scores.skin_prob[:-1] < 0.5) > 0.9


def test_confidence_grades_what_fades(params):
  cars = [
    render("object", seed=s, objects=["car"], saturation=0.8, contrast=0.9) for s in range(20)
  ]
  images = [share * car + (1 - share) * car[0, 0] for share in (1, 0.5, 0.1) for car in cars]
  confidence = look(params, np.stack(images)).object_probs[:, CAR].reshape(3, 20).mean(1)
  assert confidence[0] > confidence[1] + 0.1 and confidence[1] > confidence[2] + 0.1


def test_vividness_ranks_versions_of_a_scene(params):
  levels = ((1.0, 1.0), (0.7, 0.85), (0.4, 0.65))
  images = [
    render(("object", "pair")[seed % 2], seed=seed, saturation=s, contrast=c)
    for s, c in levels
    for seed in range(20)
  ]
  values = np.asarray(look(params, np.stack(images)).vividness).reshape(3, 20)
  assert np.mean(values[0] > values[1]) >= 0.95 and np.mean(values[1] > values[2]) >= 0.95


def test_vividness_by_hand():
  # The floor is 0.4 * 0.65 = 0.26; 0.9 * 0.7 = 0.63 is halfway to 1.
  values = [scorer_data.vividness(*pair) for pair in ((0.4, 0.65), (0.9, 0.7), (1, 1), (1.1, 1))]
  np.testing.assert_allclose(values, [0, 0.5, 1, 1], atol=1e-6)


def test_scenes_say_what_is_where():
  batch = scorer_data.scenes(np.random.default_rng(3), 200, wide=True)
  again = scorer_data.scenes(np.random.default_rng(3), 200, wide=True)
  jax.tree.map(np.testing.assert_array_equal, batch, again)
  person = batch.tones >= 0
  assert np.all(batch.objects[person] == -1) and np.all(batch.objects[~person, 0] >= 0)
  assert np.all(batch.regions[:, 0].mean((1, 2)) > 0.02)
  both = batch.objects[:, 1] >= 0
  assert not np.any(batch.regions[both, 0] & batch.regions[both, 1])
  assert np.bincount(batch.tones[person], minlength=4).min() > 5  # uniform, unlike the world
  # Outside all regions there is the background.
  outside = ~batch.regions.any(1)
  difference = np.abs(batch.images.astype(int) - batch.backgrounds[:, None, None])
  assert difference[outside].max() <= 6


def test_degraded_labels():
  rng = np.random.default_rng(4)
  batch, damage = scorer_data.scenes(rng, N_SCENES, wide=True), scorer_data.damage(rng, N_SCENES)
  images, targets = jax.jit(scorer_data.degrade)(batch, damage)
  again, _ = jax.jit(scorer_data.degrade)(batch, damage)
  np.testing.assert_array_equal(images, again)
  assert images.min() >= 0 and images.max() <= 1
  labels = np.asarray(targets.objects)
  assert labels.min() >= 0 and labels.max() <= 1
  # At most two objects of the scene and two of the one it is blended with.
  assert (labels > 0).sum(1).max() <= 4
  graded = np.mean((labels > 0.05) & (labels < 0.55)) / np.mean(labels > 0)
  assert 0.05 < graded < 0.5
  assert np.all(np.asarray(targets.tone_weights)[batch.tones < 0] == 0)
  # A quarter seen is nothing, half is half, three quarters is all.
  np.testing.assert_allclose(
    scorer_data._presence(np.array([0.2, 0.25, 0.5, 0.75, 1])), [0, 0, 0.5, 1, 1]
  )


def test_quantised_blocks_by_hand():
  # A flat 0.5 has the coefficient 8 * 0.5 = 4 = 13.3 steps of 0.3, so it becomes 13 * 0.3 / 8.
  pictures = np.full((3, 32, 32, 3), 0.5, np.float32)
  pictures[2] = render("object")
  spoiled = jax.jit(scorer_data._quantised)(pictures, np.float32([0.3, 0, 0]))
  np.testing.assert_allclose(spoiled[0], 0.4875, atol=1e-6)
  np.testing.assert_allclose(spoiled[1:], pictures[1:], atol=1e-5)


def test_resumed_training_equals_uninterrupted(tmp_path, monkeypatch, capsys):
  config = scorer_train.ScorerConfig(
    workdir=str(tmp_path / "whole"), steps=4, batch_size=8, test_scenes=N_SCENES, checkpoint_every=2
  )
  scorer_train.run(config)
  assert "held-out, clean: f1 " in capsys.readouterr().out
  report = json.loads((tmp_path / "whole" / "accuracy.json").read_text())
  assert set(report) == {"clean", "degraded"}

  stopped = dataclasses.replace(config, workdir=str(tmp_path / "stopped"))
  render_scenes, calls = scorer_data.scenes, []

  def interrupted(*args, **kwargs):
    calls.append(args)
    if len(calls) == 4:
      raise KeyboardInterrupt
    return render_scenes(*args, **kwargs)

  monkeypatch.setattr(scorer_data, "scenes", interrupted)
  with pytest.raises(KeyboardInterrupt):
    scorer_train.fit(stopped)
  monkeypatch.setattr(scorer_data, "scenes", render_scenes)
  compiled = scorer_train._update._cache_size()
  scorer_train.run(stopped)
  assert scorer_train._update._cache_size() == compiled
  files = [
    (tmp_path / name / scorer_train.WEIGHTS_NAME).read_bytes() for name in ("whole", "stopped")
  ]
  assert files[0] == files[1]
  with pytest.raises(UserError, match="has 4 steps already"):
    scorer_train.fit(dataclasses.replace(config, steps=3))


def test_mistakes_get_one_line(tmp_path):
  with pytest.raises(UserError, match="--workdir is missing"):
    scorer_train.run(scorer_train.ScorerConfig())
  with pytest.raises(UserError, match="--batch_size=1 is too small: give 2 or more"):
    scorer_train.run(scorer_train.ScorerConfig(workdir=str(tmp_path), batch_size=1))
  path = tmp_path / "weights.safetensors"
  with pytest.raises(UserError, match="cannot read the scorer's weights"):
    scorer.load(path)
  path.write_bytes(b"not safetensors")
  with pytest.raises(UserError, match="cannot read the scorer's weights"):
    scorer.load(path)
  path.write_bytes(safetensors.numpy.save({"a": np.zeros(3)}))
  with pytest.raises(UserError, match="another network"):
    scorer.load(path)
