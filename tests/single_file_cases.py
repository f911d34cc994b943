"""Small models in one file, in the layout of Stable Diffusion's authors.

The names are made from those of diffusers, in the direction opposite to the library's; the tests
hand what comes out to diffusers' own converters.
"""

from collections.abc import Mapping
import dataclasses
import functools
import json
import math
import pathlib
import re
import struct
from typing import Any

import models_cases
import numpy as np
import safetensors.numpy

from rlft.models import architectures, shapes
from rlft.models.files import torch_layout
from rlft.models.stable_diffusion import StableDiffusion

FAMILIES = ("sd1.5", "sd2-base", "sd2.1", "sdxl-base")
TOWERS = {
  "sd1.5": ("cond_stage_model.transformer.",),
  "sd2-base": ("cond_stage_model.model.",),
  "sd2.1": ("cond_stage_model.model.",),
  "sdxl-base": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}
# What a user has to say of the scheduler of each.
SCHEDULERS = {
  "sd1.5": "",
  "sd2-base": "prediction_type=epsilon",
  "sd2.1": "prediction_type=v_prediction",
  "sdxl-base": "",
}
# Of what `tiny` is made for; a file tells neither.
LATENTS, IMAGES = 8, "16"


def _small(name: str) -> architectures.Architecture:
  """The published architecture with few and narrow layers; heads have 64 features."""
  base = architectures.get(name)
  xl, first = len(base.texts) > 1, base.texts[0]
  vocabulary = {"vocab_size": len(models_cases.tokenizer()), "max_position_embeddings": 16}
  width = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 1}
  texts = [dataclasses.replace(first, **vocabulary, **width, num_hidden_layers=2)]
  if xl:
    width |= {"hidden_size": 128, "num_attention_heads": 2, "projection_dim": 32}
    texts.append(dataclasses.replace(base.texts[1], **vocabulary, **width, num_hidden_layers=3))
  unet = {"sample_size": LATENTS, "cross_attention_dim": sum(text.hidden_size for text in texts)}
  if name == "sd1.5":
    unet |= {
      "block_out_channels": (32, 64),
      "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
      "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
  elif xl:
    unet |= {
      "block_out_channels": (64, 64, 128),
      "attention_head_dim": (1, 1, 2),
      "transformer_layers_per_block": (1, 1, 2),
      "layers_per_block": 1,
      "addition_time_embed_dim": 8,
      "projection_class_embeddings_input_dim": 6 * 8 + 32,
    }
  else:
    unet |= {
      "block_out_channels": (64, 128),
      "attention_head_dim": (1, 2),
      "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
      "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
      "layers_per_block": 1,
    }
  levels = {"down_block_types": base.vae.down_block_types[:2], "block_out_channels": (32, 64)}
  levels |= {"up_block_types": base.vae.up_block_types[:2], "layers_per_block": 1}
  return dataclasses.replace(
    base,
    unet=dataclasses.replace(base.unet, **unet),
    vae=dataclasses.replace(base.vae, **levels),
    texts=tuple(texts),
  )


@functools.cache
def tiny(name: str) -> StableDiffusion:
  """A whole model with random weights."""
  model = architectures.build(_small(name))
  modules = networks(model)
  params = {name: models_cases.random_params(m, seed=2) for name, m in modules.items()}
  # Guidance multiplies what a random network predicts: smaller, so that values stay moderate.
  params["unet"]["conv_out"] = {k: 0.2 * v for k, v in params["unet"]["conv_out"].items()}
  ends = [prefix.endswith("transformer.") for prefix in TOWERS[name]]
  words = tuple(models_cases.tokenizer(**({} if end else {"pad": "!"})) for end in ends)
  return dataclasses.replace(model, params=params, tokenizers=words)


def networks(model: StableDiffusion) -> dict[str, Any]:
  """The modules by the names of their parameters."""
  texts = zip(("text_encoder", "text_encoder_2"), model.text_encoders, strict=False)
  return {"unet": model.unet, "vae": model.vae, **dict(texts)}


def save(file: pathlib.Path, state: Mapping[str, np.ndarray], **metadata: str) -> None:
  """A safetensors file as PyTorch writes it, with more in its head."""
  state = {name: np.ascontiguousarray(array) for name, array in state.items()}
  safetensors.numpy.save_file(state, file, metadata={"format": "pt"} | metadata)


@functools.cache
def original(name: str) -> dict[str, np.ndarray]:
  """The arrays of `tiny(name)` under the authors' names."""
  model = tiny(name)
  states = {part: torch_layout.to_torch(params) for part, params in model.params.items()}
  return _original(name, networks(model), states, np.concatenate)


def original_shapes(name: str) -> dict[str, tuple[int, ...]]:
  """Name and shape of each array of the published model."""
  modules = networks(architectures.abstract(name))
  states = {part: _shapes(module) for part, module in modules.items()}
  found = _original(name, modules, states, lambda parts: _Shape((3 * parts[0][0], *parts[0][1:])))
  return {key: tuple(shape) for key, shape in found.items()}


class _Shape(tuple):
  """A shape that can be treated as the array."""

  @property
  def T(self):
    return _Shape(self[::-1])

  def __getitem__(self, index):
    if isinstance(index, tuple):  # new axes
      return _Shape((*self, 1, 1))
    return super().__getitem__(index)


def _shapes(module: Any) -> dict[str, _Shape]:
  from flax import traverse_util

  leaves = traverse_util.flatten_dict(shapes.param_shapes(module))
  axes = {path: torch_layout.torch_axes(path, leaf.ndim) for path, leaf in leaves.items()}
  return {
    torch_layout.torch_names(path)[0]: _Shape(leaf.shape[axis] for axis in axes[path])
    for path, leaf in leaves.items()
  }


def _original(
  family: str, modules: Mapping[str, Any], states: Mapping[str, Mapping[str, Any]], concatenate: Any
) -> dict[str, Any]:
  """Arrays under the authors' names; `states` are by those of diffusers."""
  found = {}
  for name, array in states["unet"].items():
    found[f"model.diffusion_model.{unet_name(name, modules['unet'].config)}"] = array
  levels = len(modules["vae"].config.block_out_channels)
  for name, array in states["vae"].items():
    convolved = ".attentions.0.to_" in name and name.endswith("weight")
    array = array[:, :, None, None] if convolved else array
    found[f"first_stage_model.{vae_name(name, levels)}"] = array
  for part, prefix in zip(("text_encoder", "text_encoder_2"), TOWERS[family], strict=False):
    state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in states[part].items()}
    projection = state.pop("text_model.text_projection.weight", None)
    if prefix.endswith("transformer."):
      found |= {prefix + name: array for name, array in state.items()}
      continue
    for name, array in state.items():
      if re.search(r"\.[kv]_proj\.", name):
        continue
      if ".q_proj." in name:
        array = concatenate([state[name.replace(".q_", f".{letter}_")] for letter in "qkv"])
      found[prefix + open_clip_name(name)] = array
    if projection is None:
      # Files of Stable Diffusion 2 hold all of OpenCLIP's tower, with what follows the states that
      # are used: another layer and the projection.
      layers = modules[part].config.num_hidden_layers
      last, following = (f"{prefix}transformer.resblocks.{i}." for i in (layers - 1, layers))
      found |= {k.replace(last, following): a for k, a in found.items() if k.startswith(last)}
      projection = state["text_model.encoder.layers.0.self_attn.out_proj.weight"]
    found[f"{prefix}text_projection"] = projection.T
  return found


def unet_name(name: str, config: Any) -> str:
  """The authors' name of an array of the UNet."""
  per_level = config.layers_per_block + 1
  resnet = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
  }
  ends = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
  }
  if match := re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name):
    way, level, kind, i, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    block = per_level * level + (1 if way == "down" else 0)
    attend = (
      "CrossAttn" in (config.down_block_types if way == "down" else config.up_block_types)[level]
    )
    begin = {"down": "input_blocks", "up": "output_blocks"}[way]
    if kind == "downsamplers":
      return f"{begin}.{block + per_level - 1}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
      return f"{begin}.{block + per_level - 1}.{2 if attend else 1}.{rest}"
    if kind == "attentions":
      return f"{begin}.{block + i}.1.{rest}"
    inner, _, leaf = rest.rpartition(".")
    return f"{begin}.{block + i}.0.{resnet[inner]}.{leaf}"
  begin = next(begin for begin in ends if name.startswith(f"{begin}."))
  rest = name.removeprefix(begin)
  if "resnets" in begin:
    _, inner, leaf = rest.split(".")
    rest = f".{resnet[inner]}.{leaf}"
  return ends[begin] + rest


def vae_name(name: str, levels: int) -> str:
  """The authors' name of an array of the VAE."""
  inner = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
  if match := re.fullmatch(r"(.+)\.mid_block\.attentions\.0\.(.+)\.(\w+)", name):
    return f"{match[1]}.mid.attn_1.{inner[match[2]]}.{match[3]}"
  if match := re.fullmatch(r"(.+)\.mid_block\.resnets\.(\d)\.(.+)", name):
    name = f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
  if match := re.fullmatch(r"encoder\.down_blocks\.(\d)\.(.+)", name):
    name = f"encoder.down.{match[1]}.{match[2]}"
  if match := re.fullmatch(r"decoder\.up_blocks\.(\d)\.(.+)", name):
    name = f"decoder.up.{levels - 1 - int(match[1])}.{match[2]}"
  for old, new in (
    ("resnets.", "block."),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
  ):
    name = name.replace(old, new)
  return name


def open_clip_name(name: str) -> str:
  """OpenCLIP's name of an array of a text encoder; that of 'q_proj' is of all three."""
  for old, new in (
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("layer_norm", "ln_"),
    ("self_attn.q_proj.", "attn.in_proj_"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
  ):
    name = name.replace(old, new)
  return name


def save_tokenizer(folder: pathlib.Path, tokens: int) -> None:
  """A CLIP tokenizer with so many tokens, most of which no text has."""
  letters = [chr(code) for code in range(33, 127)]
  words = [*letters, *(f"{letter}</w>" for letter in letters)]
  words += [f"word{i}</w>" for i in range(tokens - len(words) - 2)]
  words += ["<|startoftext|>", "<|endoftext|>"]
  (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
  (folder / "merges.txt").write_text("#version: 0.2\n")


def save_empty(file: pathlib.Path, found: Mapping[str, tuple[int, ...]]) -> None:
  """A safetensors file in half precision of these shapes, all zeros, that takes no disk."""
  head, end = {}, 0
  for name, shape in found.items():
    start, end = end, end + 2 * math.prod(shape)
    head[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
  text = json.dumps(head).encode()
  with file.open("wb") as out:
    out.write(struct.pack("<Q", len(text)) + text)
    out.truncate(8 + len(text) + end)


def converted(family: str, model: StableDiffusion, state: Mapping[str, Any]) -> dict[str, Any]:
  """What diffusers' converters make of a file's tensors, by network."""
  from diffusers.loaders import single_file_utils as utils

  modules = networks(model)
  configs = {name: dataclasses.asdict(modules[name].config) for name in ("unet", "vae")}
  found = {
    "unet": utils.convert_ldm_unet_checkpoint(state, configs["unet"]),
    "vae": utils.convert_ldm_vae_checkpoint(state, configs["vae"]),
  }
  for name, prefix in zip(("text_encoder", "text_encoder_2"), TOWERS[family], strict=False):
    if prefix.endswith("transformer."):
      found[name] = utils.convert_ldm_clip_checkpoint(state)
    else:
      # Of the model, the converter looks at the config alone.
      found[name] = utils.convert_open_clip_checkpoint(modules[name], state, prefix=prefix)
  return found
