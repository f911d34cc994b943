"""The training of reward models: the loop, and what each recipe computes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.emoji import (
  art,
  detector,
  measures,
  preference,
  prompts,
  reward_training,
  scenes,
  tone,
  world,
)
from rlft.emoji.reward_training import RewardConfig
from rlft.types import UserError


def config(path, **changes):
  given = {"reward": "emoji-tone", "steps": 4, "batch_size": 8, "held_out": 16}
  return RewardConfig(workdir=str(path), checkpoint_every=2, **given | changes)


def test_resumed_training_equals_uninterrupted(tmp_path, monkeypatch, capsys):
  # What it draws with emoji-sd is measured elsewhere; here it would take a minute.
  portraits = np.random.default_rng(0).random((16, 32, 32, 3)).astype(np.float32)
  monkeypatch.setattr(tone, "generated_portraits", lambda seed, n: portraits)
  reward_training.run(config(tmp_path / "whole"))
  assert "rendered: tone " in capsys.readouterr().out
  report = json.loads((tmp_path / "whole" / "held_out.json").read_text())
  assert set(report) == {"rendered", "spoiled", "noto", "generated"}
  lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["iteration"] for line in lines] == [4]

  draw, calls = scenes.scenes, []

  def interrupted(*args, **kwargs):
    calls.append(args)
    if len(calls) == 4:
      raise KeyboardInterrupt
    return draw(*args, **kwargs)

  stopped = config(tmp_path / "stopped")
  monkeypatch.setattr(scenes, "scenes", interrupted)
  with pytest.raises(KeyboardInterrupt):
    reward_training.fit(stopped, reward_training.make_recipe(stopped))
  monkeypatch.setattr(scenes, "scenes", draw)
  reward_training.run(stopped)
  assert len(calls) == 4
  whole, again = (
    (tmp_path / name / "emoji-tone" / "model.safetensors").read_bytes()
    for name in ("whole", "stopped")
  )
  assert whole == again
  other = dataclasses.replace(stopped, learning_rate=0.5)
  with pytest.raises(UserError, match="was begun with other settings"):
    reward_training.fit(other, reward_training.make_recipe(other))


def test_mistakes_get_one_line(tmp_path):
  with pytest.raises(UserError, match="--reward=emoji-tune is not known: did you mean emoji-tone"):
    reward_training.make_recipe(config(tmp_path, reward="emoji-tune"))
  one = config(tmp_path, batch_size=jax.device_count() + 1)
  with pytest.raises(UserError, match="cannot be spread over .* devices"):
    reward_training.fit(one, reward_training.make_recipe(one))


def test_initial_weights():
  shapes = {
    "dense": {"kernel": jax.ShapeDtypeStruct((400, 50), jnp.float32)},
    "norm": {n: jax.ShapeDtypeStruct((3,), jnp.float32) for n in ("scale", "bias")},
  }
  params = reward_training.initialise(shapes, np.random.default_rng(0))
  assert abs(params["dense"]["kernel"].std() - 0.05) < 0.002  # 400 ** -0.5
  np.testing.assert_array_equal(params["norm"]["scale"], 1)
  np.testing.assert_array_equal(params["norm"]["bias"], 0)


# ---------------------------------------------------------------------------- the detector


def test_box_errors_by_hand():
  # Edges (.2, .2, .6, .6) against (.4, .4, .8, .8): shared .04, union .28, hull .36.
  found = jnp.array([[0.4, 0.4, 0.4, 0.4], [0.5, 0.5, 0.2, 0.4]])
  true = jnp.array([[0.4, 0.4, 0.8, 0.8], [0.4, 0.3, 0.6, 0.7]])
  distance, overlap = detector._box_errors(found, true)
  np.testing.assert_allclose(distance, [0.8, 0], atol=1e-6)
  np.testing.assert_allclose(overlap, [1 - (0.04 / 0.28 - 0.08 / 0.36), 0], atol=1e-4)


def test_average_precision_by_hand():
  # Two pictures with one thing each. Right at .9, a false one at .8, the other right at .7, and a
  # second box on the first thing that is dropped.
  boxes = np.array(
    [
      [[0.5, 0.5, 0.4, 0.4], [0.52, 0.5, 0.4, 0.4], [0.1, 0.1, 0.1, 0.1]],
      [[0.3, 0.3, 0.2, 0.2], [0.9, 0.9, 0.1, 0.1], [0.1, 0.9, 0.1, 0.1]],
    ]
  )
  scores = np.array([[0.9, 0.85, 0.8], [0.7, 0.1, 0.1]])
  truth = np.array([[[0.3, 0.3, 0.7, 0.7]], [[0.2, 0.2, 0.4, 0.4]]])
  there = np.ones((2, 1), bool)
  found = detector.average_precision(scores, boxes, truth, there, overlap=0.5)
  # Precision 1 up to recall 1/2, then 2/3.
  np.testing.assert_allclose(found, 0.5 + 0.5 * 2 / 3)


def test_detector_loss_prefers_the_truth():
  rng = np.random.default_rng(0)
  drawn = scenes.scenes(rng, 16, wide=True, objects=prompts.SEEN_OBJECTS)
  images, truth = scenes.clean(drawn)
  ids = detector.query_ids(detector.NAMES)
  loss = jax.jit(detector.loss)
  params = detector.load()
  right = float(loss(params, ids, images, truth))
  moved = dataclasses.replace(truth, boxes=jnp.clip(truth.boxes + 0.3, 0, 1))
  assert float(loss(params, ids, images, moved)) > right + 0.3
  renamed = dataclasses.replace(truth, classes=jnp.roll(truth.classes, 1, axis=0))
  assert float(loss(params, ids, images, renamed)) > right + 0.3
  # What an untrained network says is nothing: it starts near the loss of silence.
  assert right < float(loss(detector.init(0), ids, images, truth))


# ---------------------------------------------------------------------------- the preferences


def comparisons(count=4, seed=0):
  # As many objects and pairs as fit, and a portrait, which comes last.
  texts = prompts.prompts("pair", "train")[: count - 1] + prompts.prompts("portrait", "train")[:1]
  rng = np.random.default_rng(seed)
  generated = rng.integers(0, 256, (count, 2, 32, 32, 3)).astype(np.uint8)
  return texts, preference._comparisons(rng, texts, generated, wide=True)


def test_the_raters_follow_the_formula():
  texts, batch = comparisons()
  images, liked = jax.jit(preference._pictures)(batch)
  assert images.shape == (16, 32, 32, 3) and liked.shape == (4, 4)
  # The two generated pictures of the second prompt stand after its two rendered ones.
  np.testing.assert_allclose(images[6:8] * 255, batch.generated[2:4], atol=1e-4)
  known = [p.text for p in texts], [p.metadata for p in texts]
  asked = prompts.object_classes(*known), prompts.occupations(*known)
  expected = jax.jit(measures.preference)(
    images, *(np.repeat(x, 4, axis=0) for x in asked), measures.preference_params()
  )
  np.testing.assert_allclose(liked.ravel(), expected, atol=1e-5)


def test_the_loss_by_hand(monkeypatch):
  _, batch = comparisons(count=1)
  liked, scores = jnp.array([[0.9, 0.5, 0.5, 0.1]]), jnp.array([[1.0, 0.0, 0.0, -1.0]])
  others = []
  monkeypatch.setattr(preference, "_pictures", lambda batch: (None, liked))
  monkeypatch.setattr(preference, "_scores", lambda *_, **__: (scores, others))
  # Chances of the pairs 01 02 03 12 13 23: 1 / (1 + e^-5), the same, nearly 1, 1/2, ...
  batch = dataclasses.replace(batch, uniform=np.float32([[0.5, 0.999, 0.5, 0.6, 0.5, 0.5]]))

  def log_sigmoid(x):
    return -np.log1p(np.exp(-x))

  # The second answer is a mistake (0.999 > 0.9933), the fourth a toss-up between equal scores.
  pairs = [log_sigmoid(1), log_sigmoid(-1), log_sigmoid(2), log_sigmoid(0), log_sigmoid(1)]
  preferred = -np.mean([*pairs, log_sigmoid(1)])
  np.testing.assert_allclose(preference.loss(None, batch), preferred, atol=1e-6)
  # Another text scores as much, or is the same one. The second picture shows something else.
  batch = dataclasses.replace(batch, right=np.array([True, False]))
  others += [scores.at[0, 1].set(50.0), jnp.full((1, 4), -jnp.inf)]
  matched = preference._MATCHING_WEIGHT * np.log(2)
  np.testing.assert_allclose(preference.loss(None, batch), preferred + matched, atol=1e-6)


def test_words_are_tokens_as_in_the_reward():
  from rlft.rewards import image_reward

  texts = [p.text for p in prompts.prompts("preference", "test")[:50]]
  ids, mask = preference.tokenize(texts)
  tokenizer = image_reward.open_tokenizer(str(preference.DIRECTORY), preference.CONFIG)
  found = image_reward.tokenize(tokenizer, texts)
  np.testing.assert_array_equal(found["ids"], ids)
  np.testing.assert_array_equal(found["mask"], mask)
  # Of withheld things it was taught no name.
  unknown = np.any(ids == preference.VOCABULARY.index("[UNK]"), axis=1)
  named = [prompt.metadata for prompt in prompts.prompts("preference", "test")[:50]]
  withheld = [
    bool({*known.get("objects", ())} & {*art.WITHHELD_OBJECTS})
    or known.get("occupation") in art.WITHHELD_OCCUPATIONS
    for known in named
  ]
  np.testing.assert_array_equal(unknown, withheld)
  assert 0 < unknown.sum() < 50


def test_rendered_pictures_show_the_prompt_or_are_wrong_now_and_then():
  rng = np.random.default_rng(0)
  prompt = next(p for p in prompts.prompts("pair", "train"))
  drawn = [preference._render(rng, prompt, True) for _ in range(300)]
  shown = [set(scene.objects) == set(prompt.metadata["objects"]) for scene, _ in drawn]
  assert shown == [right for _, right in drawn]
  wrong = 1 - np.mean(shown)
  hidden = np.mean([scene.visible.min() < 0.9 for scene, _ in drawn])
  assert abs(wrong - preference._WRONG_SHARE) < 0.06 and abs(hidden - world.CROWDED_SHARE) < 0.1
  assert {name for scene, _ in drawn for name in scene.objects} <= set(prompts.SEEN_OBJECTS)


def test_every_batch_has_as_many_portraits():
  assert preference._counts(16) == {"single": 4, "pair": 8, "portrait": 4}
  assert preference._counts(5) == {"single": 2, "pair": 2, "portrait": 1}
