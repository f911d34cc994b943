import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import models_cases
import numpy as np
import pytest
import safetensors.numpy

from rlft.models.files import diffusers_layout, pretrained, torch_layout
from rlft.types import UserError

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model():
  return models_cases.tiny_pipeline()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
  path = tmp_path_factory.mktemp("models") / "model"
  pretrained.save(path, model)
  return path


@pytest.fixture
def copy(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "model")


def rewrite(file, change):
  """Applies `change` to the dict of arrays in a safetensors file."""
  state = safetensors.numpy.load_file(file)
  change(state)
  safetensors.numpy.save_file(state, file, metadata={"format": "pt"})


def assert_same(found, expected):
  assert models_cases.fingerprint(found.params) == models_cases.fingerprint(expected.params)
  for name in ("unet", "vae", "text_encoders"):
    assert getattr(found, name) == getattr(expected, name)


def test_what_is_saved_is_loaded(model, saved):
  loaded = pretrained.load(saved)
  assert_same(loaded, model)
  assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {np.dtype(np.float32)}
  assert model.scheduler.items() <= loaded.scheduler.items()
  prompts = list(models_cases.PROMPTS)
  np.testing.assert_array_equal(loaded.tokenize(prompts)[0], model.tokenize(prompts)[0])
  assert loaded.tokenize(prompts)[0].shape == (len(prompts), 1, 16)


def test_a_model_without_tokenizers_is_described(model, tmp_path):
  """By the networks alone: weights that are random need no words."""
  names = diffusers_layout.describe(tmp_path, dataclasses.replace(model, tokenizers=()))
  assert names == ["unet", "vae", "text_encoder"]
  assert {path.name for path in tmp_path.iterdir()} == {*names, "scheduler", "model_index.json"}
  assert "tokenizer" not in json.loads((tmp_path / "model_index.json").read_text())


def test_without_weights_their_shapes_are_known(model, copy):
  for file in copy.rglob("*.safetensors"):
    file.unlink()
  loaded = pretrained.load(copy, weights=False)
  shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), one.params) for one in (loaded, model)]
  assert shapes[0] == shapes[1] and loaded.fingerprint == ""
  leaves = jax.tree.leaves(loaded.params)
  assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
  assert loaded.unet == model.unet and loaded.scheduler.items() >= model.scheduler.items()


def test_the_computation_is_chosen_when_loading(saved):
  loaded = pretrained.load(saved, dtype=jnp.bfloat16, remat=True)
  assert loaded.unet.dtype == jnp.bfloat16 and loaded.unet.remat
  assert loaded.vae.dtype == loaded.text_encoders[0].dtype == jnp.float32


def test_half_precision_files_are_half_as_large_and_loaded_as_float32(model, saved, tmp_path):
  pretrained.save(tmp_path / "half", model, dtype=np.float16)
  sizes = [(path / UNET_FILE).stat().st_size for path in (tmp_path / "half", saved)]
  assert sizes[0] < 0.55 * sizes[1]
  loaded = pretrained.load(tmp_path / "half")
  for found, exact in zip(
    jax.tree.leaves(loaded.params), jax.tree.leaves(model.params), strict=True
  ):
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, exact.astype(np.float16))


@pytest.mark.parametrize("suffix", ["", ".fp16"])
def test_files_in_shards(model, copy, suffix):
  state = safetensors.numpy.load_file(copy / UNET_FILE)
  names = sorted(state)
  weight_map = {}
  for i, part in enumerate((names[::2], names[1::2])):
    file = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
    safetensors.numpy.save_file({name: state[name] for name in part}, copy / "unet" / file)
    weight_map |= dict.fromkeys(part, file)
  (copy / UNET_FILE).unlink()
  index = copy / "unet" / f"diffusion_pytorch_model.safetensors.index{suffix}.json"
  index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  assert_same(pretrained.load(copy), model)

  (copy / "unet" / file).unlink()
  with pytest.raises(UserError, match="00002-of-00002.safetensors does not exist"):
    pretrained.load(copy)


def test_old_names_of_the_vae_attention(model, copy):
  def rename(state):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name in list(state):
      for new_part, old_part in old.items():
        if f".{new_part}." in name:
          state[name.replace(f".{new_part}.", f".{old_part}.")] = state.pop(name)

  rewrite(copy / VAE_FILE, rename)
  assert "encoder.mid_block.attentions.0.query.weight" in safetensors.numpy.load_file(
    copy / VAE_FILE
  )
  assert_same(pretrained.load(copy), model)


def test_the_position_buffer_of_older_text_encoders_is_ignored(model, copy):
  rewrite(
    copy / "text_encoder" / "model.safetensors",
    lambda state: state.update(
      {"text_model.embeddings.position_ids": np.arange(16, dtype=np.int64)[None]}
    ),
  )
  assert_same(pretrained.load(copy), model)


def test_names_of_a_few_parameters():
  for path, name in (
    ("time_embedding/linear_1/kernel", "time_embedding.linear_1.weight"),
    (
      "down_blocks_0/attentions_1/transformer_blocks_0/attn1/to_out_0/bias",
      "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0.bias",
    ),
    (
      "mid_block/attentions_0/transformer_blocks_0/ff/net_0/proj/kernel",
      "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight",
    ),
    ("up_blocks_1/upsamplers_0/conv/kernel", "up_blocks.1.upsamplers.0.conv.weight"),
    (
      "text_model/encoder/layers/3/layer_norm1/scale",
      "text_model.encoder.layers.3.layer_norm1.weight",
    ),
    (
      "decoder/mid_block/attentions_0/proj_attn/kernel",
      "decoder.mid_block.attentions.0.to_out.0.weight",
    ),
  ):
    assert torch_layout.torch_names(tuple(path.split("/")))[0] == name


def one_line(error):
  assert "\n" not in str(error.value)
  return str(error.value)


def test_a_missing_parameter(copy):
  rewrite(copy / UNET_FILE, lambda state: state.pop("conv_in.weight"))
  with pytest.raises(UserError, match=r"no conv_in.weight \(expected shape \(32, 4, 3, 3\)\)") as e:
    pretrained.load(copy)
  assert UNET_FILE in one_line(e)


def test_a_parameter_of_another_shape(copy):
  rewrite(copy / UNET_FILE, lambda state: state.update({"conv_in.bias": np.zeros(31, np.float32)}))
  with pytest.raises(
    UserError, match=r"conv_in.bias has shape \(31,\), expected \(32,\).*use the weights"
  ) as e:
    pretrained.load(copy)
  one_line(e)


def test_a_left_over_parameter(copy):
  rewrite(copy / VAE_FILE, lambda state: state.update({"loss.logvar": np.zeros(1, np.float32)}))
  with pytest.raises(UserError, match="1 left-over arrays, the first is loss.logvar") as e:
    pretrained.load(copy)
  one_line(e)


def set_json(file, **values):
  file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_models_of_another_kind(copy):
  set_json(copy / "unet" / "config.json", _class_name="UNet2DModel")
  with pytest.raises(UserError, match="'UNet2DModel', expected 'UNet2DConditionModel'"):
    pretrained.load(copy)
  set_json(copy / "model_index.json", _class_name="StableDiffusionUpscalePipeline")
  with pytest.raises(UserError, match="or 'StableDiffusionXLPipeline'; use") as e:
    pretrained.load(copy)
  one_line(e)


def test_the_scheduler_is_checked_before_the_weights_are_read(copy):
  (copy / UNET_FILE).unlink()
  config = copy / "scheduler" / "scheduler_config.json"
  set_json(config, clip_sample=True)
  with pytest.raises(UserError, match=r"/scheduler_config\.json: clip_sample is for models") as e:
    pretrained.load(copy)
  one_line(e)
  set_json(config, clip_sample=False, _class_name="EDMEulerScheduler")
  with pytest.raises(UserError, match=r"/scheduler_config\.json: EDMEulerScheduler samples"):
    pretrained.load(copy)
  set_json(config, _class_name="DDIMScheduler")
  set_json(copy / "model_index.json", scheduler=["diffusers", "LCMScheduler"])
  with pytest.raises(UserError, match=r"/model_index\.json: LCMScheduler samples"):
    pretrained.load(copy)


def test_options_stand_in_the_place_of_the_schedulers_own(copy):
  set_json(copy / "scheduler" / "scheduler_config.json", clip_sample=True)
  found = pretrained.load(copy, scheduler="clip_sample=false,steps_offset=0")
  assert not found.scheduler["clip_sample"] and found.scheduler["steps_offset"] == 0


@pytest.mark.parametrize(
  ("missing", "message"),
  [
    ("", "is not a directory: give a Stable Diffusion model"),
    ("model_index.json", "has no model_index.json"),
    ("vae/config.json", "vae/config.json does not exist"),
    (VAE_FILE, "safe_serialization=True"),
    ("tokenizer", "no CLIP tokenizer"),
    ("scheduler/scheduler_config.json", "scheduler_config.json does not exist"),
  ],
)
def test_missing_files(copy, missing, message):
  path = copy / missing
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink()
  with pytest.raises(UserError, match=message) as e:
    pretrained.load(copy)
  one_line(e)


def test_damaged_files(copy):
  (copy / UNET_FILE).write_bytes((copy / UNET_FILE).read_bytes()[:1000])
  with pytest.raises(UserError, match="cannot be read") as e:
    pretrained.load(copy)
  one_line(e)
  for content in ("{", "[]", '{"a":' * 2000):
    (copy / "vae" / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"vae/config\.json cannot be read as JSON") as e:
      pretrained.load(copy)
    one_line(e)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"_class_name": ["StableDiffusionPipeline"]}, r"_class_name is \['StableDiffusionPipeline'\]"),
    ({"scheduler": 1.5}, "scheduler is '1.5', no list"),
    ({"scheduler": {"a": 1}}, "scheduler is .*, no list"),
    ({"scheduler": ["diffusers", [1]]}, r"\[1\] samples networks"),
    ({"force_zeros_for_empty_prompt": "x"}, "force_zeros_for_empty_prompt is 'x', no bool"),
  ],
)
def test_an_index_with_values_of_other_types(copy, values, message):
  set_json(copy / "model_index.json", **values)
  with pytest.raises(UserError, match=rf"model_index\.json: {message}") as e:
    pretrained.load(copy)
  one_line(e)


def test_a_model_replaces_a_model_and_nothing_else(model, copy):
  other = dataclasses.replace(
    model, params={**model.params, "unet": jax.tree.map(np.zeros_like, model.params["unet"])}
  )
  pretrained.save(copy, other)
  assert_same(pretrained.load(copy), other)
  assert [path.name for path in copy.parent.iterdir()] == ["model"]

  (copy / "model_index.json").unlink()
  with pytest.raises(UserError, match="exists and is not a model"):
    pretrained.save(copy, model)
  with pytest.raises(UserError, match="exists and is not a model"):
    pretrained.save(copy / UNET_FILE, model)
  with pytest.raises(UserError, match="cannot be written"):
    pretrained.save(copy / UNET_FILE / "model", model)


def test_a_full_disk_leaves_the_former_model(model, copy, monkeypatch):
  def fail(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(safetensors.numpy, "save_file", fail)
  with pytest.raises(UserError, match="No space left on device.*free some space"):
    pretrained.save(copy, model)
  monkeypatch.undo()
  assert_same(pretrained.load(copy), model)
  assert [path.name for path in copy.parent.iterdir()] == ["model"]


def test_fingerprints_tell_models_apart(model):
  unet = model.params["unet"]
  assert models_cases.fingerprint(unet) == models_cases.fingerprint(jax.tree.map(jnp.asarray, unet))
  changed = jax.tree.map(np.copy, unet)
  changed["conv_in"]["bias"][0] += 1e-6
  assert models_cases.fingerprint(unet) != models_cases.fingerprint(changed)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_diffusers_loads_what_is_saved_and_the_other_way_round(model, tmp_path, dtype):
  pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  pretrained.save(tmp_path / "ours", model, dtype=dtype)
  pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "ours")
  assert type(pipe.scheduler) is diffusers.DDIMScheduler and pipe.safety_checker is None
  for name in ("unet", "vae", "text_encoder"):
    state = {k: v.numpy() for k, v in getattr(pipe, name).state_dict().items()}
    for key, array in torch_layout.to_torch(model.params[name], dtype).items():
      assert state[key].dtype == np.float32
      np.testing.assert_array_equal(state[key], array.astype(np.float32))
  pipe.save_pretrained(tmp_path / "theirs")
  assert_same(pretrained.load(tmp_path / "theirs"), pretrained.load(tmp_path / "ours"))
