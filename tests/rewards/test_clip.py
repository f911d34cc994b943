"""The rewards on CLIP against transformers and open_clip: stored numbers, and live."""

import dataclasses
import functools
import json
import shutil

import clip_reward_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch_files

from rlft.catalog import make_reward
from rlft.models import clip
from rlft.models.files import clip_weights, sources, torch_layout
from rlft.rewards import aesthetic
from rlft.rewards import clip as clip_reward
from rlft.types import UserError

TOLERANCE = 1e-4
need_heads = pytest.mark.skipif(
  not (cases.HEADS / "sac+logos+ava1-l14-linearMSE.pth").exists(),
  reason="LAION's heads are not in the repository: set RLFT_HEADS to a directory that has them",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  directory = tmp_path_factory.mktemp("clip")
  cases.write(directory)
  return directory


@pytest.fixture(scope="module")
def flax_scores(files):
  """`(name, number of the size) -> scores and gradient`, computed once."""

  @functools.cache
  def run(name, number):
    reward = make_reward(cases.SPECS[name].format(files))
    features = reward.prepare(cases.PROMPTS, [{}] * 3) if reward.prepare else None

    def total(images):
      scores = reward.score(reward.params, images, features)
      return scores @ jnp.array([1.0, 2.0, 3.0]), scores

    compiled = jax.jit(jax.grad(total, has_aux=True))
    gradient, scores = compiled(cases.images(cases.SIZES[number]))
    return {"scores": np.asarray(scores), "gradient": np.asarray(gradient)}

  return run


def assert_near(found, expected):
  assert found.keys() == expected.keys()
  for key, value in expected.items():
    assert found[key].shape == value.shape and found[key].dtype == np.float32
    assert np.abs(value).max() > 0.01, key
    assert np.abs(found[key] - value).max() <= TOLERANCE, key


def one_line(function, *arguments, match, **keywords):
  with pytest.raises(UserError, match=match) as error:
    function(*arguments, **keywords)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "number"), cases.CASES)
def test_scores_and_gradients_are_those_that_pytorch_gave(flax_scores, name, number):
  with np.load(cases.NUMBERS) as stored:
    expected = {key: stored[f"{name}/{number}/{key}"] for key in ("scores", "gradient")}
  assert_near(flax_scores(name, number), expected)


@pytest.mark.parametrize(("name", "number"), cases.CASES)
def test_scores_and_gradients_are_those_that_pytorch_gives(flax_scores, name, number):
  pytest.importorskip("torch")
  if name == "hpsv2":
    pytest.importorskip("open_clip")
  assert_near(flax_scores(name, number), cases.torch_scores(name, cases.SIZES[number]))


def test_half_precision_towers_and_the_divisor(files, flax_scores):
  spec = f"{cases.SPECS['pickscore'].format(files)}&divisor=2&dtype=bfloat16"
  reward = make_reward(spec)
  assert reward.name == spec and {x.dtype for x in jax.tree.leaves(reward.params)} == {
    np.dtype(np.float32)
  }
  ids = reward.prepare(cases.PROMPTS, [{}] * 3)
  score = jax.jit(reward.score)
  scores = score(reward.params, cases.images(cases.SIZES[0]), ids)
  exact = flax_scores("pickscore", 0)["scores"] / 2
  assert scores.dtype == np.float32
  # bfloat16 has 8 bits; exp(logit_scale) = 3.3.
  assert 1e-4 < np.abs(scores - exact).max() < 0.05


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"vocab_size": 50}, "takes 50 and expects"),
    ({"eos_token_id": 7}, "and expects 7: give the tokenizer of the same model"),
  ],
)
def test_the_tokenizer_of_another_model(change, message):
  config = dataclasses.replace(cases.CONFIG.text_config, **change)
  one_line(clip_reward.check_tokenizer, cases.WORDS, config, match=message)
  for eos in (2, None, cases.WORDS.end_id):
    config = dataclasses.replace(cases.CONFIG.text_config, eos_token_id=eos)
    clip_reward.check_tokenizer(cases.WORDS, config)


def test_features_of_images(files):
  embed, params = clip_reward.image_embedder(f"{files}/hf")
  assert set(params) == {"vision_model", "visual_projection", "logit_scale"}
  images = cases.images(cases.SIZES[0])
  features = jax.jit(embed)(params, images)
  assert features.shape == (3, cases.FEATURES) and features.dtype == np.float32
  np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-6)
  # The same features in another reward: V1 is linear in them.
  expected = features @ cases.V1["weight"][0] + cases.V1["bias"]
  with np.load(cases.NUMBERS) as stored:
    np.testing.assert_allclose(expected, stored["aesthetic-v1/0/scores"], atol=TOLERANCE)


def test_both_layouts_are_the_same_weights():
  state = cases.hf_state()
  assert clip_weights.from_open_clip(state) is state
  for given in (cases.to_open_clip(state), custom_text(cases.to_open_clip(state))):
    found = clip_weights.from_open_clip(given)
    assert set(found) == set(state) and len(found) == len(state)
    for name, array in state.items():
      np.testing.assert_array_equal(found[name], array)
  assert "logit_bias" in clip_weights.from_open_clip(given | {"logit_bias": np.zeros(())})


def custom_text(state):
  """open_clip's other layout, in which the text tower is a module of its own."""
  return {
    name if name.startswith(("visual.", "logit_")) else f"text.{name}": array
    for name, array in state.items()
  }


def test_the_config_in_open_clips_terms():
  found = clip_weights.open_clip_config({"model_cfg": cases.OPEN_CLIP})
  text, vision = cases.CONFIG.text_config, cases.CONFIG.vision_config
  for config, ours in ((found.text_config, text), (found.vision_config, vision)):
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name in (*same, "hidden_act"):
      assert getattr(config, name) == getattr(ours, name)
  assert found.text_config.eos_token_id == 2 and found.projection_dim == cases.FEATURES
  assert found.vision_config.image_size == 16 and found.vision_config.patch_size == 8
  quick = clip_weights.open_clip_config(cases.OPEN_CLIP | {"quick_gelu": True})
  assert quick.text_config.hidden_act == quick.vision_config.hidden_act == "quick_gelu"
  huge = {
    "embed_dim": 1024,
    "vision_cfg": {
      "image_size": 224,
      "layers": 32,
      "width": 1280,
      "head_width": 80,
      "patch_size": 14,
    },
    "text_cfg": {
      "context_length": 77,
      "vocab_size": 49408,
      "width": 1024,
      "heads": 16,
      "layers": 24,
    },
  }
  found = clip_weights.open_clip_config(huge)
  # `projection_dim` of a tower is not used, that of the model is.
  assert dataclasses.replace(found, text_config=clip_weights.VIT_H_14.text_config) == (
    clip_weights.VIT_H_14
  )
  assert found.text_config == clip_weights.VIT_H_14.text_config
  for part, option in (("vision_cfg", "timm_model_name"), ("text_cfg", "hf_model_name")):
    changed = cases.OPEN_CLIP | {part: {option: "x"}}
    one_line(clip_weights.open_clip_config, changed, match=f"'{option}' of {part} is not supported")
  one_line(clip_weights.open_clip_config, {"multimodal_cfg": {}}, match="'multimodal_cfg' of the")


def test_every_key_of_the_full_size_network_of_hpsv2():
  state = cases.vit_h_14_state()
  given = cases.to_open_clip(state)
  expected = json.loads(cases.OPEN_CLIP_KEYS.read_text())["ViT-H-14"]
  assert cases.digest(cases.key_lines(given)) == expected
  found = clip_weights.from_open_clip(given)
  assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in state.items()}


def test_every_key_that_open_clip_has_at_full_size():
  pytest.importorskip("torch")
  pytest.importorskip("open_clip")
  assert cases.open_clip_vit_h_14() == cases.key_lines(cases.to_open_clip(cases.vit_h_14_state()))


def test_files_that_do_not_fit(files, tmp_path, monkeypatch):
  hf, hps = files / "hf", files / "hps"
  one_line(make_reward, f"clip-score?weights={files}/v1.pth", match="no config.json or open_clip_c")
  one_line(make_reward, f"clip-score?weights={hps}/HPS_v2.1_compressed.pt", match="no CLIP tokeniz")
  spec = f"hpsv2?weights={hps}/HPS_v2.1_compressed.pt&tokenizer={hf}&version=2.0"
  one_line(make_reward, spec, match="is of version 2.1: write version=2.1")
  one_line(
    make_reward, f"hpsv2?weights={hf}&tokenizer={hf}", match="none of HPS_v2.1_compressed.pt"
  )
  one_line(make_reward, f"pickscore?weights={hf}&divisor=0", match="divisor=0 gives no score")
  one_line(
    make_reward, f"clip-score?weights={hf}&formula=plain", match="formula=plain is not known"
  )

  # The weights of HPSv2 without a config are those of ViT-H-14, of which one layer is enough here.
  towers = {
    name: dataclasses.replace(getattr(clip_weights.VIT_H_14, name), num_hidden_layers=1)
    for name in ("text_config", "vision_config")
  }
  shallow = dataclasses.replace(clip_weights.VIT_H_14, **towers)
  monkeypatch.setattr(clip_weights, "VIT_H_14", shallow)
  weights_only = tmp_path / "HPS_v2.1_compressed.pt"
  weights_only.write_bytes((hps / weights_only.name).read_bytes())
  spec = f"hpsv2?weights={weights_only}&tokenizer={hf}"
  one_line(make_reward, spec, match="16 left-over arrays.*of another model than")

  (tmp_path / "config.json").write_text((hf / "config.json").read_text())
  state = safetensors.numpy.load_file(hf / "model.safetensors")
  del state["logit_scale"]
  safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
  one_line(
    make_reward,
    f"clip-score?weights={tmp_path}&tokenizer={hf}",
    match=r"no logit_scale \(expected shape \(\)\)",
  )


def test_heads_that_do_not_fit(files, tmp_path):
  hf = files / "hf"
  spec = f"{{}}?weights={hf}&head={{}}"
  match = "a head of aesthetic-v2, not of aesthetic-v1: write aesthetic-v2"
  one_line(make_reward, spec.format("aesthetic-v1", files / "v2.pth"), match=match)
  match = "a head of aesthetic-v1, not of aesthetic-v2: write aesthetic-v1"
  one_line(make_reward, spec.format("aesthetic-v2", files / "v1.pth"), match=match)
  path = tmp_path / "head.pth"

  def refused(state, match):
    torch_files.save(path, state)
    one_line(make_reward, spec.format("aesthetic-v2", path), match=match)

  refused({"linear.weight": np.zeros((1, 24))}, "has 1 arrays, the first is linear.weight, expect")
  refused({}, "has 0 arrays, the first is none")
  refused(cases.V2 | {"layers.2.bias": np.zeros(3)}, r"layers.2.weight has shape .* \(3,\), expect")
  short = cases.V2["layers.2.weight"][:, :9]
  refused(cases.V2 | {"layers.2.weight": short}, "do not end in one: download it again")
  wide = np.zeros((16, 30), np.float32)
  refused(
    cases.V2 | {"layers.0.weight": wide}, "takes 30 features, but .*hf gives 24: use the head"
  )


def _golden(name, head, tower):
  layers = aesthetic.read_head(name, sources.open_weights(cases.HEADS / head), what=head)
  files = [cases.HEADS / f"laion_{tower}_rating{i}.npy" for i in range(10)]
  return aesthetic.rate(layers, np.stack([np.load(file).reshape(-1) for file in files])), layers


@need_heads
def test_the_real_head_of_v2():
  found, layers = _golden("aesthetic-v2", "sac+logos+ava1-l14-linearMSE.pth", "vit_l_14")
  expected = [1.655, 2.359, 3.070, 3.672, 4.238, 4.701, 5.073, 5.365, 5.577, 5.747]
  np.testing.assert_allclose(found, expected, atol=6e-4)
  ((matrix, bias),) = layers
  assert matrix.shape == (768, 1)
  np.testing.assert_allclose(np.linalg.norm(matrix), 17.9956, atol=1e-4)
  np.testing.assert_allclose(bias, [5.23665], atol=1e-5)


@need_heads
@pytest.mark.parametrize(
  ("tower", "expected"),
  [
    ("vit_l_14", [-2.458, -0.138, 1.895, 3.585, 5.100, 6.470, 7.787, 9.048, 10.226, 11.304]),
    ("vit_b_32", [-1.470, 0.273, 1.990, 3.611, 5.087, 6.393, 7.668, 8.915, 9.917, 11.006]),
  ],
)
def test_the_real_heads_of_v1(tower, expected):
  found, _ = _golden("aesthetic-v1", f"sa_0_4_{tower}_linear.pth", tower)
  np.testing.assert_allclose(found, expected, atol=6e-4)


@need_heads
@pytest.mark.parametrize("name", ["ava+logos-l14-linearMSE.pth", "ava+logos-l14-reluMSE.pth"])
def test_the_other_heads_of_v2_as_pytorch_computes_them(name):
  torch = pytest.importorskip("torch")
  found, layers = _golden("aesthetic-v2", name, "vit_l_14")
  relu = "relu" in name
  assert len(layers) == (5 if relu else 1)
  x = torch.stack(
    [
      torch.from_numpy(np.load(cases.HEADS / f"laion_vit_l_14_rating{i}.npy").reshape(-1))
      for i in range(10)
    ]
  ).float()
  state = list(torch.load(cases.HEADS / name, map_location="cpu", weights_only=True).values())
  for i in range(0, len(state), 2):
    x = torch.relu(x) if relu and i else x
    x = x @ state[i].T + state[i + 1]
  np.testing.assert_allclose(found, x[:, 0], atol=1e-4)


def test_a_clip_model_is_read_from_either_layout(files):
  module, params = clip_weights.load(files / "hf")
  assert module == clip.CLIPModel(cases.CONFIG)
  other, same = clip_weights.load(files / "hps", names=("HPS_v2.1_compressed.pt",))
  assert other.config.text_config.eos_token_id == 2  # open_clip's rule: the highest id
  jax.tree.map(np.testing.assert_array_equal, params, same)
  expected = torch_layout.from_torch(module, cases.hf_state())
  jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("preprocessor_config.json", {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.5, 0.1]}),
    (
      "open_clip_config.json",
      {
        "model_cfg": cases.OPEN_CLIP,
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.5, 0.1]},
      },
    ),
  ],
)
def test_images_are_normalised_as_the_model_says(files, tmp_path, name, content):
  shutil.copytree(files / "hf", tmp_path / "own")
  (tmp_path / "own" / name).write_text(json.dumps(content))
  module, params = clip_weights.load(tmp_path / "own")
  images = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
  found = clip_reward.image_features(module, params, images, lambda x, size: x)
  pixels = (images - np.float32([0.5, 0.4, 0.3])) / np.float32([0.2, 0.5, 0.1])
  expected = module.apply({"params": params}, pixels, method="image_features")
  expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
  np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ({"image_mean": [0.5, 0.5]}, r"image_mean=\[0.5, 0.5\] is not three numbers"),
    ({"image_mean": [0.5] * 3, "image_std": [1, 0, 1]}, "image_std=.* is not three numbers"),
    ({"do_center_crop": False}, "do_center_crop=False is not supported: use a CLIP model"),
    ({"do_normalize": False}, "do_normalize=False is not supported"),
  ],
)
def test_other_ways_to_prepare_images_are_refused(files, tmp_path, content, message):
  shutil.copytree(files / "hf", tmp_path / "own")
  (tmp_path / "own" / "preprocessor_config.json").write_text(json.dumps(content))
  one_line(clip_weights.load, tmp_path / "own", match=message)
