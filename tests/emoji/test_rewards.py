"""The three shipped reward models, on pictures whose content is known."""

import jax
import numpy as np
import pytest

from rlft import catalog
from rlft.emoji import detector, preference, prompts, scenes, tone, world
from rlft.types import UserError

N_PICTURES = 160


def render(kind, seed, **given):
  """A scene's image `[32, 32, 3]` float32 in [0, 1]."""
  return world.render_scene(np.random.default_rng(seed), kind, **given).image / np.float32(255)


def score(name, images, texts, metadata):
  reward = catalog.make_reward(name)
  features = reward.prepare(texts, metadata)
  return np.asarray(jax.jit(reward.score)(reward.params, np.stack(images), features))


def test_tones_of_rendered_portraits():
  drawn = scenes.scenes(np.random.default_rng(7), N_PICTURES, wide=False, kinds={"portrait": 1.0})
  probs = np.asarray(jax.jit(tone.classify)(tone.load(), scenes.clean(drawn)[0]))
  assert probs.shape == (N_PICTURES, 4)
  np.testing.assert_allclose(probs[np.isfinite(probs[:, 0])].sum(1), 1, atol=1e-5)
  assert np.mean(np.argmax(probs, axis=1) == drawn.tones) >= 0.97
  assert np.isfinite(probs).all(axis=1).mean() >= 0.97
  things = scenes.scenes(np.random.default_rng(8), N_PICTURES, wide=False, kinds={"object": 1.0})
  nobody = np.asarray(jax.jit(tone.classify)(tone.load(), scenes.clean(things)[0]))
  assert np.isnan(nobody).all(axis=1).mean() >= 0.97


def test_parity_of_rendered_sets():
  # Two of each tone, and eight of one: 0 and -sqrt(3 / 4).
  sets = [[k % 4 for k in range(8)], [3] * 8]
  images = [[render("portrait", 10 * i + k, tone=t) for k, t in enumerate(s)]
            for i, s in enumerate(sets)]  # fmt: skip
  reward = catalog.make_reward("emoji-tone-parity")
  found = jax.jit(reward.score)(reward.params, np.array(images), None).values
  np.testing.assert_allclose(found, [0, -np.sqrt(0.75)], atol=0.1)


def test_objects_tells_what_is_there_from_what_is_not():
  rng = np.random.default_rng(9)
  images, metadata, there = [], [], []
  for i in range(N_PICTURES // 2):
    first, second, third = rng.choice(prompts.SEEN_OBJECTS, 3, replace=False).tolist()
    images.append(render("pair", i, objects=[first, second], crowded=False))
    metadata.append({"objects": [first, second]})
    images.append(render("object", i, objects=[first]))
    metadata.append({"objects": np.array([third])})
    there += [True, False]
  found = score("emoji-objects", images, [""] * len(images), metadata)
  assert found.min() >= 0 and found.max() <= 1
  assert np.mean((found > 0.5) == there) >= 0.9
  # One of two is worth about half.
  pair = {"objects": ["dog", "car"]}
  half = score("emoji-objects", [render("object", s, objects=["dog"]) for s in range(16)],
               [""] * 16, [pair] * 16)  # fmt: skip
  assert 0.3 < half.mean() < 0.6


def test_transformers_loads_the_detector_and_agrees():
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  theirs = transformers.OwlViTForObjectDetection.from_pretrained(detector.DIRECTORY).float()
  ids = detector.query_ids(["dog", "car"])
  pixels = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
  with torch.no_grad():
    expected = theirs(
      pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2),
      input_ids=torch.tensor(ids).long(),
      attention_mask=torch.ones(ids.shape).long(),
    )
  found = jax.jit(lambda p: detector._MODULE.apply({"params": p}, pixels, ids))(detector.load())
  np.testing.assert_allclose(found.logits, expected.logits.numpy(), atol=1e-4)
  np.testing.assert_allclose(found.boxes, expected.pred_boxes.numpy(), atol=1e-5)


def test_preference_likes_vivid_pictures_of_what_was_asked():
  names = prompts.SEEN_OBJECTS
  texts = [world.object_caption(name) for name in names]

  def of(drawn, **washing):
    return [render("object", i, objects=[name], **washing) for i, name in enumerate(drawn)]

  def scores(images):
    return score("emoji-preference", images, texts, [{}] * len(texts))

  vivid = scores(of(names, saturation=1.0, contrast=1.0))
  assert np.mean(vivid > scores(of(names, saturation=0.45, contrast=0.7))) >= 0.85
  assert np.mean(vivid > scores(of(names[1:] + names[:1], saturation=1.0, contrast=1.0))) >= 0.9


@pytest.mark.parametrize(
  ("metadata", "message"),
  [
    ({"objects": ["unicycle"]}, "'unicycle', which the emoji world does not have"),
    ({"objects": ["dog", "cat", "car"]}, "names 3 objects: name at most 2"),
  ],
)
def test_prompts_that_the_detector_cannot_use(metadata, message):
  with pytest.raises(UserError, match=message):
    catalog.make_reward("emoji-objects").prepare(["a picture"], [metadata])


@pytest.mark.parametrize("model", [tone, detector, preference])
def test_damaged_weights_get_one_line(model, tmp_path):
  for content in (None, b"not safetensors"):
    if content:
      (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors") as caught:
      model.load(tmp_path)
    assert "\n" not in str(caught.value)
  # What was saved is what is loaded, to half precision.
  params = model.load()
  model.save(tmp_path / "copy", params)
  jax.tree.map(np.testing.assert_array_equal, params, model.load(tmp_path / "copy"))
  total = sum(path.stat().st_size for path in model.DIRECTORY.iterdir())
  assert total < 3e6
