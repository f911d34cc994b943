"""Stable Diffusion in one file: the same model as in diffusers' directory, and nothing but it."""

from huggingface_hub import constants
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import models_cases
import numpy as np
import pipeline_cases
import pytest
import repository_cases
import single_file_cases as cases
import torch_files

from rlft.models import architectures, scheduler_config
from rlft.models.files import arrays, pretrained, single_file, torch_layout, vocabulary
from rlft.types import UserError

SD1, SD2 = "cond_stage_model.transformer.", "cond_stage_model.model."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """With the tokenizer of all tiny models."""
  folder = tmp_path_factory.mktemp("files")
  vocabulary.write_clip(folder / "tokenizer", models_cases.tokenizer())
  return folder


def save(folder, state, **metadata):
  """What a user writes for a file of these arrays."""
  file = folder / "model.safetensors"
  cases.save(file, state, **metadata)
  return f"{file}?tokenizer={folder / 'tokenizer'}"


def load(folder, family, **settings):
  """Writes the tiny model of a family and reads it."""
  source = save(folder, cases.original(family))
  return pretrained.load(source, scheduler=cases.SCHEDULERS[family], **settings)


def read(source, scheduler=""):
  return single_file.read(single_file.parse(source), scheduler_config.parse(scheduler))


def zeros(*names):
  return {name: np.zeros(1, np.float32) for name in names}


def assert_same_params(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def refused(source, match):
  """Both where it is looked for before a run and where it is read."""
  for read in (pretrained.find, pretrained.load):
    with pytest.raises(UserError, match=match) as error:
      read(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_a_file_is_the_model_that_it_was_made_from(family, folder):
  found, expected = load(folder, family, image_size=cases.IMAGES), cases.tiny(family)
  assert_same_params(found, expected)
  assert found.unet == expected.unet
  assert (found.vae, found.text_encoders) == (expected.vae, expected.text_encoders)
  assert (found.scheduler, found.zero_empty) == (expected.scheduler, expected.zero_empty)
  prompts = ["a photo of a dog!", ""]
  np.testing.assert_array_equal(found.tokenize(prompts)[0], expected.tokenize(prompts)[0])


@pytest.mark.parametrize("family", ["sd1.5", "sd2.1", "sdxl-base"])
def test_it_draws_what_diffusers_draws(family, folder):
  pytest.importorskip("torch")
  pytest.importorskip("diffusers")
  found = pipeline_cases.flax_outputs_of(load(folder, family, image_size=cases.IMAGES))
  expected = pipeline_cases.torch_outputs_of(cases.tiny(family))
  assert expected["latents"].std() > 0.1
  np.testing.assert_array_equal(found["timesteps"], expected["timesteps"])
  np.testing.assert_allclose(found["latents"], expected["latents"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["sd1.5", "sd2.1", "sdxl-base"])
@pytest.mark.parametrize("size", ["tiny", "published"])
def test_diffusers_makes_the_same_arrays_of_it(family, size):
  torch = pytest.importorskip("torch")
  pytest.importorskip("diffusers")
  if size == "tiny":
    model = cases.tiny(family)
    expected = {part: torch_layout.to_torch(params) for part, params in model.params.items()}
    given = {name: torch.from_numpy(np.array(a)) for name, a in cases.original(family).items()}
  else:
    model = architectures.abstract(family)
    expected = {part: models_cases.torch_tree(m) for part, m in cases.networks(model).items()}
    shapes = cases.original_shapes(family)
    given = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
  found = cases.converted(family, model, given)
  assert found.keys() == expected.keys()
  for part, state in expected.items():
    # Of small towers, the converter does not know which layer is not run.
    assert found[part].keys() == state.keys() or size == "tiny"
    for name, array in state.items():
      if size == "tiny":
        np.testing.assert_array_equal(found[part][name], array)
      else:
        assert tuple(found[part][name].shape) == array, name


@pytest.mark.parametrize(
  ("name", "pads"), [("sd1.5", [49407]), ("sd2.1", [0]), ("sdxl-base", [49407, 0])]
)
def test_every_array_of_the_published_models_has_its_place(name, pads, tmp_path):
  file = tmp_path / "model.safetensors"
  cases.save_empty(file, cases.original_shapes(name))
  cases.save_tokenizer(tmp_path, tokens=49408)
  found, base = (
    read(f"{file}?tokenizer={tmp_path}", cases.SCHEDULERS[name]),
    architectures.get(name),
  )
  configs = {part: module.config for part, module in found.modules.items()}
  texts = zip(("text_encoder", "text_encoder_2"), base.texts, strict=False)
  assert configs == {"unet": base.unet, "vae": base.vae, **dict(texts)}
  assert [tokenizer.pad_id for tokenizer in found.tokenizers] == pads
  assert {tokenizer.length for tokenizer in found.tokenizers} == {77}
  assert found.scheduler == base.scheduler


def test_shards_of_half_precision_are_read_from_where_they_are(folder, monkeypatch):
  half = {name: array.astype(np.float16) for name, array in cases.original("sd2-base").items()}
  source = save(folder, half)
  axis = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((2,), ("fsdp",), axis_types=axis, devices=jax.devices()[:2])

  def place(path, shape):
    axes = [axis for axis, size in enumerate(shape) if size % 2 == 0]
    spec = P(*[None] * axes[sum(map(len, path)) % len(axes)], "fsdp") if axes else P()
    return NamedSharding(mesh, spec)

  read = {}
  read_part = arrays._Safetensors.read_part

  def counted(state, name, index):
    part = read_part(state, name, index)
    read[name] = read.get(name, 0) + part.size
    return part

  monkeypatch.setattr(arrays._Safetensors, "read_part", counted)
  found = pretrained.load(source, place=place, scheduler=cases.SCHEDULERS["sd2-base"])
  expected = cases.tiny("sd2-base").params
  rounded = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), expected)
  jax.tree.map(np.testing.assert_array_equal, found.params, rounded)
  # Every number once, except of the layer and the projection that are not run.
  sizes = {name: array.size for name, array in half.items() if name in read}
  assert read == sizes and len(half) - len(sizes) == 12 + 1


def test_what_else_is_in_many_files_is_left_out(folder):
  state = cases.original("sd1.5")
  bare = {name.replace(f"{SD1}text_model.", SD1): array for name, array in state.items()}
  more = zeros(
    *("betas", "alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "posterior_mean_coef1"),
    *("model_ema.decay", "model_ema.num_updates", "model_ema.diffusion_modelout2bias"),
    *("cond_stage_model.logit_scale", f"{SD1}text_projection.weight"),
  )
  more[f"{SD1}embeddings.position_ids"] = np.arange(16)[None]
  assert_same_params(pretrained.load(save(folder, bare | more)), cases.tiny("sd1.5"))
  more = zeros("denoiser.sigmas", "conditioner.embedders.1.model.logit_scale")
  assert read(save(folder, cases.original("sdxl-base") | more)).zero_empty


def test_a_tower_without_the_layer_that_is_not_run(folder):
  state, expected = cases.original("sd2-base"), load(folder, "sd2-base")
  last = f"{SD2}transformer.resblocks.{expected.text_encoders[0].config.num_hidden_layers}."
  extra = [name for name in state if name.startswith((last, f"{SD2}text_projection"))]
  assert len(extra) == 12 + 1
  cut = {name: array for name, array in state.items() if name not in extra}
  # In the names of Stability's later code.
  later = {name.replace(SD2, "conditioner.embedders.0.model."): a for name, a in state.items()}
  for state in (cut, later):
    found = pretrained.load(save(folder, state), scheduler=cases.SCHEDULERS["sd2-base"])
    assert found.text_encoders == expected.text_encoders
    assert_same_params(found, expected)


def test_a_file_of_torch(folder):
  torch_files.save(folder / "model.ckpt", cases.original("sd1.5"), key="state_dict")
  found = pretrained.load(f"{folder / 'model.ckpt'}?tokenizer={folder / 'tokenizer'}")
  assert_same_params(found, cases.tiny("sd1.5"))


def test_what_it_is_is_also_what_is_saved(folder, tmp_path):
  found = load(folder, "sdxl-base")
  pretrained.save(tmp_path / "model", found)
  again = pretrained.load(tmp_path / "model")
  assert_same_params(again, found)
  assert (again.unet, again.vae, again.text_encoders) == (
    found.unet,
    found.vae,
    found.text_encoders,
  )
  prompts = ["two cats!", ""]
  np.testing.assert_array_equal(again.tokenize(prompts)[0], found.tokenize(prompts)[0])


@pytest.mark.parametrize(
  ("family", "given", "more", "metadata", "expected"),
  [
    ("sd1.5", "", {}, {}, ("epsilon", "nothing in it says otherwise")),
    ("sd1.5", "prediction_type=v_prediction", {}, {}, ("v_prediction", "--scheduler says")),
    ("sdxl-base", "", zeros("v_pred"), {}, ("v_prediction", "its key v_pred says")),
    ("sdxl-base", "prediction_type=epsilon", zeros("v_pred"), {}, ("epsilon", "--scheduler says")),
    ("sd2-base", "", {}, {"modelspec.prediction_type": "v"}, ("v_prediction", "_type says")),
    ("sd2-base", "", {}, {"modelspec.predict_key": "epsilon"}, ("epsilon", "predict_key says")),
  ],
)
def test_what_it_predicts_is_known_and_said(
  folder, caplog, family, given, more, metadata, expected
):
  source = save(folder, cases.original(family) | more, **metadata)
  found = read(source, given)
  assert found.scheduler["prediction_type"] == expected[0]
  (record,) = caplog.records
  assert f"predicts {expected[0]}, as " in record.message and expected[1] in record.message
  # Of the second generation, those for 768 pixels are those with v-prediction.
  name = "sd2.1" if family == "sd2-base" and expected[0] == "v_prediction" else family
  assert found.modules["unet"].config.sample_size == architectures.get(name).unet.sample_size


def test_zero_terminal_snr_is_kept(folder):
  marked = cases.original("sdxl-base") | zeros("v_pred", "ztsnr")
  scheduler = read(save(folder, marked), "steps_offset=0").scheduler
  assert scheduler["rescale_betas_zero_snr"] and scheduler["timestep_spacing"] == "trailing"
  assert scheduler["steps_offset"] == 0
  del marked["v_pred"]
  with pytest.raises(UserError, match="with rescale_betas_zero_snr, .*=prediction_type=v_pred"):
    read(save(folder, marked))


UNET, VAE = "model.diffusion_model.", "first_stage_model."
_FIRST, _LAST = f"{UNET}input_blocks.0.0.weight", f"{UNET}out.2.weight"


def channels(count):
  parts = {_FIRST: np.zeros((8, count, 3, 3)), _LAST: np.zeros((4, 8, 3, 3))}
  return parts | zeros(f"{VAE}quant_conv.bias", f"{SD1}text_model.x")


@pytest.mark.parametrize(
  ("state", "message"),
  [
    (zeros("lora_unet_down_blocks_0.lora_up.weight"), "is a LoRA: give the model it is for"),
    (zeros("unet.down_blocks.0.attn.to_q.lora_A.weight"), "is a LoRA: give the model it is for"),
    (zeros(f"{UNET}out.2.bias", "control_model.x"), "is a ControlNet"),
    (zeros("emb_params"), "is an embedding of textual inversion"),
    (zeros(f"{UNET}joint_blocks.0.x"), "is Stable Diffusion 3"),
    (zeros("double_blocks.0.img_attn.norm.key_norm.scale"), "is FLUX"),
    (zeros(_FIRST, "edm_mean"), "is a model with the noise schedule of EDM"),
    (zeros("down_blocks.0.resnets.0.conv1.bias"), "is one network of the diffusers layout"),
    (zeros("model_ema.diffusion_modelout2bias"), r"has averaged weights \(model_ema.*\) alone"),
    (zeros("input_blocks.0.0.weight"), r"has no model\.diffusion_model\.\*, so it is no whole"),
    (zeros(_FIRST), "has a UNet, but no text encoder of Stable Diffusion"),
    (zeros(_FIRST, f"{SD1}x"), r"has a UNet, but no VAE \(first_stage_model"),
    (
      zeros(f"{UNET}label_emb.0.0.weight", f"{VAE}x", "conditioner.embedders.0.model.x"),
      "is the refiner of SDXL",
    ),
    (channels(9), "is a model for inpainting: its UNet takes 9 channels"),
    (channels(5), "is a model for depth"),
    (channels(16), "is a model for another use"),
  ],
)
def test_other_models_are_refused_by_name(folder, state, message):
  refused(save(folder, state), f"{message}.*; use a Stable Diffusion 1.x, 2.x or SDXL base")


def without(part):
  return lambda state: {name: a for name, a in state.items() if not name.startswith(part)}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda s: s | zeros("thing.x"),
      "of 1 arrays without a place in a model like sd1.5, the first is thing.x",
    ),
    (
      lambda s: s | zeros(f"{UNET}time_embed.cond_proj.weight"),
      "without a place .*time_embed.cond_proj",
    ),
    (
      lambda s: s | zeros(f"{UNET}output_blocks.2.1.conv.weight"),
      "output_blocks.2.1.conv.weight has shape",
    ),
    (without(f"{UNET}output_blocks.4.1.norm"), "no array for up_blocks.1.attentions.1.norm"),
    (without(f"{UNET}middle_block.1"), "has no mid_block.attentions.0.transformer_blocks.0.attn2"),
    (without(f"{VAE}encoder.mid.attn_1.q.b"), "no array for encoder.mid_block.attentions.0.to_q.b"),
    (lambda s: s | {f"{VAE}quant_conv.bias": np.zeros(3)}, r"quant_conv.bias has shape \(3,\), ex"),
  ],
)
def test_files_that_lack_something_or_have_more(folder, change, message):
  source = save(folder, change(cases.original("sd1.5")))
  with pytest.raises(UserError, match=f"{message}.*; use a Stable Diffusion 1.x") as error:
    pretrained.load(source)
  assert "\n" not in str(error.value)


def test_what_a_user_has_to_add(folder):
  file = save(folder, cases.original("sd2-base")).partition("?")[0]
  refused(file, f"has no tokenizer in it: give one, as {file}.tokenizer=FOLDER, a folder with")
  refused(f"{file}?tokeniser=x", r"'\?tokeniser=x' is no option: write \?tokenizer=FOLDER")
  refused(f"{file}?tokenizer=", r"'\?tokenizer=' is no option: write \?tokenizer=FOLDER")
  refused("nowhere.ckpt?tokenizer=x", "nowhere.ckpt does not exist: give a file, or a hub's")
  with pytest.raises(UserError, match="--scheduler=prediction_type=v_pred.* or --scheduler=pred"):
    pretrained.load(f"{file}?tokenizer=x")
  with pytest.raises(UserError, match="x does not exist"):
    pretrained.load(f"{file}?tokenizer={folder}%2Fx", scheduler=cases.SCHEDULERS["sd2.1"])
  cases.save_tokenizer(folder, tokens=300)
  with pytest.raises(UserError, match="has 300 tokens, but the network takes 202; use"):
    pretrained.load(f"{file}?tokenizer={folder}", scheduler=cases.SCHEDULERS["sd2.1"])


def test_a_file_of_a_hub(tmp_path, monkeypatch):
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  commit = repository_cases.COMMIT
  models, clip = (tmp_path / f"models--org--{name}/snapshots/{commit}" for name in ("sd", "clip"))
  (models / "v1").mkdir(parents=True)
  cases.save(models / "v1" / "model.safetensors", cases.original("sd1.5"))
  vocabulary.write_clip(clip, models_cases.tokenizer())
  file = f"org/sd@{commit}/v1/model.safetensors"
  found = pretrained.load(f"{file}?tokenizer=org/clip@{commit}")
  assert_same_params(found, cases.tiny("sd1.5"))
  refused(f"org/sd@{commit}/v2.safetensors", "v2.safetensors is not in the cache, and the hub can")
  refused("org/sd/v1/model.safetensors", "does not exist: give a file, or a hub's org/name@rev")
