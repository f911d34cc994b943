"""Small models in the layout of the published repositories, with all that lies beside the weights.

The configs are the published ones with smaller sizes; weights are random.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import json
import pathlib
from typing import Any

import models_cases
import numpy as np
import safetensors.numpy

from rlft.models import clip, tokens, unet, vae
from rlft.models.files import torch_layout, vocabulary
from rlft.models.stable_diffusion import StableDiffusion

# A commit, as a hub's repository is pinned to.
COMMIT = "0123456789abcdef0123456789abcdef01234567"

_DOWN = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
_UP = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
_UNET_SD1 = {
  "_class_name": "UNet2DConditionModel",
  "_diffusers_version": "0.6.0",
  "act_fn": "silu",
  "attention_head_dim": 2,
  "block_out_channels": [8, 8, 8, 8],
  "center_input_sample": False,
  "cross_attention_dim": 8,
  "down_block_types": _DOWN,
  "downsample_padding": 1,
  "flip_sin_to_cos": True,
  "freq_shift": 0,
  "in_channels": 4,
  "layers_per_block": 1,
  "mid_block_scale_factor": 1,
  "norm_eps": 1e-05,
  "norm_num_groups": 4,
  "out_channels": 4,
  "sample_size": 8,
  "up_block_types": _UP,
}
_UNET_SD2 = _UNET_SD1 | {
  "_diffusers_version": "0.10.0.dev0",
  "attention_head_dim": [1, 2, 4, 4],
  "cross_attention_dim": 12,
  "dual_cross_attention": False,
  "num_class_embeds": None,
  "only_cross_attention": False,
  "upcast_attention": True,
  "use_linear_projection": True,
}
_UNET_SDXL = {
  **{key: value for key, value in _UNET_SD2.items() if key != "upcast_attention"},
  "_diffusers_version": "0.19.0.dev0",
  "addition_embed_type": "text_time",
  "addition_embed_type_num_heads": 64,
  "addition_time_embed_dim": 4,
  "attention_head_dim": [1, 2, 4],
  "block_out_channels": [8, 8, 16],
  "class_embed_type": None,
  "class_embeddings_concat": False,
  "conv_in_kernel": 3,
  "conv_out_kernel": 3,
  "cross_attention_dim": 8 + 12,
  "cross_attention_norm": None,
  "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
  "encoder_hid_dim": None,
  "encoder_hid_dim_type": None,
  "mid_block_only_cross_attention": None,
  "mid_block_type": "UNetMidBlock2DCrossAttn",
  "num_attention_heads": None,
  "projection_class_embeddings_input_dim": 6 * 4 + 10,
  "resnet_out_scale_factor": 1.0,
  "resnet_skip_time_act": False,
  "resnet_time_scale_shift": "default",
  "time_cond_proj_dim": None,
  "time_embedding_act_fn": None,
  "time_embedding_dim": None,
  "time_embedding_type": "positional",
  "timestep_post_act": None,
  "transformer_layers_per_block": [1, 2, 3],
  "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
  "upcast_attention": None,
}
_VAE = {
  "_class_name": "AutoencoderKL",
  "_diffusers_version": "0.6.0",
  "act_fn": "silu",
  "block_out_channels": [8, 8],
  "down_block_types": ["DownEncoderBlock2D"] * 2,
  "in_channels": 3,
  "latent_channels": 4,
  "layers_per_block": 1,
  "norm_num_groups": 4,
  "out_channels": 3,
  "sample_size": 16,
  "up_block_types": ["UpDecoderBlock2D"] * 2,
}
_TEXT = {
  "_name_or_path": "openai/clip-vit-large-patch14",
  "architectures": ["CLIPTextModel"],
  "attention_dropout": 0.0,
  "bos_token_id": 0,
  "dropout": 0.0,
  "eos_token_id": 2,
  "hidden_act": "quick_gelu",
  "hidden_size": 8,
  "initializer_factor": 1.0,
  "initializer_range": 0.02,
  "intermediate_size": 16,
  "layer_norm_eps": 1e-05,
  "max_position_embeddings": 16,
  "model_type": "clip_text_model",
  "num_attention_heads": 2,
  "num_hidden_layers": 2,
  "pad_token_id": 1,
  "projection_dim": 8,
  "torch_dtype": "float32",
  "transformers_version": "4.22.0.dev0",
}
_TEXT_SD2 = _TEXT | {"hidden_act": "gelu", "hidden_size": 12, "num_hidden_layers": 3}
_TEXT_SDXL = _TEXT_SD2 | {
  "architectures": ["CLIPTextModelWithProjection"],
  "projection_dim": 10,
  "torch_dtype": "float16",
}
_SCHEDULE = {
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "beta_start": 0.00085,
  "clip_sample": False,
  "num_train_timesteps": 1000,
  "set_alpha_to_one": False,
  "skip_prk_steps": True,
  "steps_offset": 1,
  "trained_betas": None,
}
_PNDM = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **_SCHEDULE}
_DDIM = _SCHEDULE | {
  "_class_name": "DDIMScheduler",
  "_diffusers_version": "0.8.0",
  "prediction_type": "v_prediction",
}
_EULER = _SCHEDULE | {
  "_class_name": "EulerDiscreteScheduler",
  "_diffusers_version": "0.19.0.dev0",
  "interpolation_type": "linear",
  "prediction_type": "epsilon",
  "sample_max_value": 1.0,
  "timestep_spacing": "leading",
  "use_karras_sigmas": False,
}


@dataclasses.dataclass(frozen=True)
class Family:
  """The published files of a family: `configs` by folder, the index without its components."""

  configs: Mapping[str, Mapping[str, Any]]
  scheduler: Mapping[str, Any]
  index: Mapping[str, Any]


_CHECKED = {
  "_class_name": "StableDiffusionPipeline",
  "_diffusers_version": "0.6.0",
  "feature_extractor": ["transformers", "CLIPImageProcessor"],
  "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
}
_UNCHECKED = _CHECKED | {"requires_safety_checker": False, "safety_checker": [None, None]}
_SDXL_INDEX = {
  "_class_name": "StableDiffusionXLPipeline",
  "_diffusers_version": "0.19.0.dev0",
  "add_watermarker": None,
  "force_zeros_for_empty_prompt": True,
}

FAMILIES = {
  "sd1.5": Family({"unet": _UNET_SD1, "vae": _VAE, "text_encoder": _TEXT}, _PNDM, _CHECKED),
  "sd2": Family(
    {
      "unet": {k: v for k, v in _UNET_SD2.items() if k != "upcast_attention"},
      "vae": _VAE,
      "text_encoder": _TEXT_SD2,
    },
    _PNDM,
    _UNCHECKED,
  ),
  "sd2.1": Family(
    {"unet": _UNET_SD2, "vae": _VAE | {"scaling_factor": 0.18215}, "text_encoder": _TEXT_SD2},
    _DDIM,
    _UNCHECKED,
  ),
  "sdxl": Family(
    {
      "unet": _UNET_SDXL,
      "vae": _VAE | {"force_upcast": True, "scaling_factor": 0.13025},
      "text_encoder": _TEXT,
      "text_encoder_2": _TEXT_SDXL,
    },
    _EULER,
    _SDXL_INDEX,
  ),
}

_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}


def tokenizers(family: str) -> tuple[tokens.Tokenizer, ...]:
  """Those of a family: the second of SDXL (and that of SD 2) pads with '!', whose id is 0."""
  first, second = models_cases.tokenizer(), models_cases.tokenizer(pad="!")
  if family == "sdxl":
    return first, second
  return (second,) if family.startswith("sd2") else (first,)


@functools.cache
def tiny(family: str, seed: int = 2) -> StableDiffusion:
  """The model that `write` writes."""
  files, words = FAMILIES[family], tokenizers(family)
  texts = [name for name in files.configs if name.startswith("text_encoder")]
  modules = {}
  for name, config in files.configs.items():
    if name == "unet":
      modules[name] = unet.UNet2DCondition(unet.UNetConfig.from_dict(config))
    elif name == "vae":
      modules[name] = vae.AutoencoderKL(vae.VAEConfig.from_dict(config))
    else:
      config = clip.CLIPTextConfig.from_dict(config | {"vocab_size": len(words[0])})
      second = name.endswith("_2")
      cls = clip.CLIPTextEncoderWithProjection if second else clip.CLIPTextEncoder
      modules[name] = cls(config)
  params = {name: models_cases.random_params(m, seed=seed) for name, m in modules.items()}
  # Guidance multiplies what a random network predicts: smaller, so that values stay moderate.
  params["unet"]["conv_out"] = {k: 0.2 * v for k, v in params["unet"]["conv_out"].items()}
  return StableDiffusion(
    unet=modules["unet"],
    vae=modules["vae"],
    text_encoders=tuple(modules[name] for name in texts),
    tokenizers=words,
    scheduler=files.scheduler,
    params=params,
    zero_empty=family == "sdxl",
  )


State = Mapping[str, np.ndarray]
# Writes the weights of a component: (folder, first part of their names, arrays).
Layout = Callable[[pathlib.Path, str, State], None]


def save(file: pathlib.Path, state: State) -> None:
  """A safetensors file as PyTorch writes it."""
  safetensors.numpy.save_file(dict(state), file, metadata={"format": "pt"})


def full(folder: pathlib.Path, stem: str, state: State) -> None:
  """Full precision, with half precision and the weights before averaging beside it."""
  save(folder / f"{stem}.safetensors", state)
  save(folder / f"{stem}.non_ema.safetensors", {k: v + 1 for k, v in state.items()})
  half(folder, stem, {k: v + 1 for k, v in state.items()})


def half(folder: pathlib.Path, stem: str, state: State) -> None:
  """Half precision alone."""
  save(folder / f"{stem}.fp16.safetensors", {k: v.astype(np.float16) for k, v in state.items()})


def shards(file: str, index: str, dtype: Any = np.float32) -> Layout:
  """Two shards `file.format(stem, 1)` and `..., 2)` and their `index.format(stem)`."""

  def write_shards(folder: pathlib.Path, stem: str, state: State) -> None:
    names, weight_map = sorted(state), {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
      shard = file.format(stem, i)
      save(folder / shard, {name: state[name].astype(dtype) for name in part})
      weight_map |= dict.fromkeys(part, shard)
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / index.format(stem)).write_text(json.dumps(content))

  return write_shards


LAYOUTS: Mapping[str, Layout] = {
  "full": full,
  "half": half,
  "shards": shards("{}-0000{}-of-00002.safetensors", "{}.safetensors.index.json"),
  "half shards": shards(
    "{}.fp16-0000{}-of-00002.safetensors", "{}.safetensors.index.fp16.json", np.float16
  ),
  "old half shards": shards(
    "{}-0000{}-of-00002.fp16.safetensors", "{}.safetensors.fp16.index.json", np.float16
  ),
}


def write(
  root: pathlib.Path, family: str, layout: str = "full", *, today: bool = False
) -> StableDiffusion:
  """Writes the repository of a family to the directory `root`, and returns what is in it.

  With `today`, tokenizers and text encoders are as transformers 5 saves them, else as published.
  """
  model, files = tiny(family), FAMILIES[family]
  index = {**files.index, "scheduler": ["diffusers", files.scheduler["_class_name"]]}
  for name, config in files.configs.items():
    folder = root / name
    folder.mkdir(parents=True)
    is_text = name.startswith("text_encoder")
    state = torch_layout.to_torch(model.params[name])
    if is_text:
      config = {**config, "vocab_size": len(model.tokenizers[0])}
      buffer = np.arange(config["max_position_embeddings"], dtype=np.int64)[None]
      state["text_model.embeddings.position_ids"] = buffer
      if today:
        config["dtype"] = config.pop("torch_dtype")
        del state["text_model.embeddings.position_ids"]
        if name == "text_encoder":
          state = {key.removeprefix("text_model."): array for key, array in state.items()}
    (folder / "config.json").write_text(json.dumps(config))
    stem = _STEMS.get(name, "model")
    LAYOUTS[layout](folder, stem, state)
    # Other formats of the same, which are not to be opened.
    for junk in (f"{stem}.bin", f"{stem}.fp16.bin", "flax_model.msgpack", "model.onnx"):
      (folder / junk).write_bytes(b"junk")
    library = "transformers" if is_text else "diffusers"
    index[name] = [library, _CLASSES.get(name) or config["architectures"][0]]
  for name, words in zip(("tokenizer", "tokenizer_2"), model.tokenizers, strict=False):
    vocabulary.write_clip(root / name, words)
    if today:
      _modernise(root / name)
    index[name] = ["transformers", "CLIPTokenizer"]
  (root / "scheduler").mkdir()
  (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(files.scheduler))
  (root / "model_index.json").write_text(json.dumps(index))
  for name in ("safety_checker", "feature_extractor"):
    if index.get(name, [None])[0]:
      (root / name).mkdir()
      (root / name / "config.json").write_text("{}")
  for junk in ("README.md", "v1-5-pruned-emaonly.safetensors", "v1-inference.yaml"):
    (root / junk).write_bytes(b"junk")
  return model


def _modernise(folder: pathlib.Path) -> None:
  """Leaves of a tokenizer what transformers 5 writes."""
  for name in ("vocab.json", "merges.txt"):
    (folder / name).unlink()
  file = folder / "tokenizer_config.json"
  config = json.loads(file.read_text())
  del config["added_tokens_decoder"]
  file.write_text(json.dumps(config | {"backend": "tokenizers"}))


def in_cache(
  cache: pathlib.Path, family: str, layout: str, *, today: bool = False
) -> tuple[str, Any]:
  """As `write`, as the cache of a hub's repository; returns what to load, and what is in it."""
  root = cache / "models--org--name" / "snapshots" / COMMIT
  return f"org/name@{COMMIT}", write(root, family, layout, today=today)
