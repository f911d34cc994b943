"""Small CLIP models as files, in both layouts, and their scores by PyTorch.

Shared by the tests of the rewards on CLIP. Writes what they compare with where PyTorch is not
installed:

    python tests/clip_reward_cases.py     (needs torch, torchvision and open-clip-torch)
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from typing import Any

import models_cases
import numpy as np
import safetensors.numpy
import torch_files

from rlft.models import clip
from rlft.models.files import clip_weights, torch_layout, vocabulary
from rlft.models.shapes import param_shapes

NUMBERS = models_cases.FIXTURES / "clip_rewards.npz"
OPEN_CLIP_KEYS = models_cases.FIXTURES / "open_clip.json"
# LAION's heads and the embeddings with known ratings; not in the repository.
HEADS = pathlib.Path(
  os.environ.get("RLFT_HEADS", pathlib.Path(__file__).parents[2] / "shared" / "heads")
)

WORDS = models_cases.tokenizer()
LENGTH = 10
FEATURES = 24
PROMPTS = ("a photo of a dog", "two cats", "two cats two cats two cats two cats two cats")
SIZES = ((20, 20), (14, 22))
CONFIG = clip.CLIPConfig(
  clip.CLIPTextConfig(
    vocab_size=len(WORDS),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=LENGTH,
    hidden_act="gelu",
    pad_token_id=WORDS.pad_id,
    bos_token_id=WORDS.begin_id,
    eos_token_id=WORDS.end_id,
    projection_dim=FEATURES,
  ),
  clip.CLIPVisionConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
    hidden_act="gelu",
    projection_dim=FEATURES,
  ),
  FEATURES,
)
# The same in open_clip's terms.
OPEN_CLIP = {
  "embed_dim": FEATURES,
  "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
  "text_cfg": {
    "context_length": LENGTH,
    "vocab_size": len(WORDS),
    "width": 32,
    "heads": 4,
    "layers": 1,
  },
}
OPEN_CLIP["vision_cfg"]["mlp_ratio"] = OPEN_CLIP["text_cfg"]["mlp_ratio"] = 2.0


def images(size: tuple[int, int]) -> np.ndarray:
  """`[3, *size, 3]` float32 in [0, 1]; cubic resampling overshoots both ends."""
  return np.random.RandomState(5).uniform(0, 1, (len(PROMPTS), *size, 3)).astype(np.float32)


def hf_state() -> dict[str, np.ndarray]:
  """Random weights under transformers' names."""
  params = models_cases.random_params(clip.CLIPModel(CONFIG), seed=17)
  return torch_layout.to_torch(params) | {"logit_scale": np.array(1.2, np.float32)}


def to_open_clip(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """transformers' `CLIPModel` as open_clip's `CLIP`, the other way round than the library."""
  found = {
    "visual.proj": state["visual_projection.weight"].T,
    "text_projection": state["text_projection.weight"].T,
    "logit_scale": state["logit_scale"],
    "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
    "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
    "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
  }
  for ours, theirs in (("vision_model", "visual."), ("text_model", "")):
    positions = state[f"{ours}.embeddings.position_embedding.weight"]
    found[f"{theirs}positional_embedding"] = positions
    layers = {int(name.split(".")[3]) for name in state if name.startswith(f"{ours}.encoder.")}
    for layer in layers:
      old, new = f"{ours}.encoder.layers.{layer}", f"{theirs}transformer.resblocks.{layer}"
      for leaf in ("weight", "bias"):
        thirds = [state[f"{old}.self_attn.{letter}_proj.{leaf}"] for letter in "qkv"]
        found[f"{new}.attn.in_proj_{leaf}"] = np.concatenate(thirds)
        for name, other in (
          ("layer_norm1", "ln_1"),
          ("layer_norm2", "ln_2"),
          ("self_attn.out_proj", "attn.out_proj"),
          ("mlp.fc1", "mlp.c_fc"),
          ("mlp.fc2", "mlp.c_proj"),
        ):
          found[f"{new}.{other}.{leaf}"] = state[f"{old}.{name}.{leaf}"]
  for old, new in (
    ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.post_layernorm", "visual.ln_post"),
    ("text_model.final_layer_norm", "ln_final"),
  ):
    found |= {f"{new}.{leaf}": state[f"{old}.{leaf}"] for leaf in ("weight", "bias")}
  return found


def head(numbers: tuple[int, ...]) -> dict[str, np.ndarray]:
  """A small V2 head whose linear layers have these places."""
  rng, state = np.random.RandomState(6), {}
  sizes = (FEATURES, 16, 12, 8, 6, 1)
  for i, inputs, outputs in zip(numbers, sizes[:-1], sizes[1:], strict=True):
    state[f"layers.{i}.weight"] = rng.standard_normal((outputs, inputs)) * inputs**-0.5
    state[f"layers.{i}.bias"] = 0.3 * rng.standard_normal(outputs)
  return {name: array.astype(np.float32) for name, array in state.items()}


V2, V2_RELU = head((0, 2, 4, 6, 7)), head((0, 3, 6, 9, 11))
V1 = {"weight": V2["layers.0.weight"][:1], "bias": V2["layers.0.bias"][:1]}


def write(directory: pathlib.Path) -> None:
  """transformers' layout in `hf`, open_clip's in `hps`, heads and the tokenizer beside them."""
  for name in ("hf", "hps"):
    (directory / name).mkdir()
  config = dataclasses.asdict(CONFIG) | {"model_type": "clip"}
  (directory / "hf" / "config.json").write_text(json.dumps(config))
  safetensors.numpy.save_file(hf_state(), directory / "hf" / "model.safetensors")
  vocabulary.write_clip(directory / "hf", WORDS)
  (directory / "hps" / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))
  state = {f"module.{name}": array for name, array in to_open_clip(hf_state()).items()}
  torch_files.save(directory / "hps" / "HPS_v2.1_compressed.pt", state, "state_dict")
  for name, state in (("v1", V1), ("v2", V2), ("relu", V2_RELU)):
    torch_files.save(directory / f"{name}.pth", state)


# Every reward, in all its ways, at a square and at another size.
CASES = (
  ("clip-score", 0),
  ("hessel", 1),
  ("pickscore", 0),
  ("pickscore", 1),
  ("hpsv2", 0),
  ("hpsv2", 1),
  ("aesthetic-v1", 0),
  ("aesthetic-v2", 0),
  ("relu", 1),
)
SPECS = {
  "clip-score": "clip-score?weights={0}/hf",
  "hessel": "clip-score?weights={0}/hf&formula=hessel",
  "pickscore": "pickscore?weights={0}/hf",
  "hpsv2": "hpsv2?weights={0}/hps&tokenizer={0}/hf",
  "aesthetic-v1": "aesthetic-v1?weights={0}/hf&head={0}/v1.pth",
  "aesthetic-v2": "aesthetic-v2?weights={0}/hf&head={0}/v2.pth",
  "relu": "aesthetic-v2?weights={0}/hf&head={0}/relu.pth",
}


@functools.cache
def _towers(library: str) -> Any:
  """PyTorch's model of either library with the weights of `hf_state`."""
  import torch

  if library == "open_clip":
    import open_clip

    model = open_clip.model.CLIP(**OPEN_CLIP)
    state = to_open_clip(hf_state())
  else:
    import transformers

    config = dataclasses.asdict(CONFIG)
    model = transformers.CLIPModel(transformers.CLIPConfig(**config))
    state = hf_state()
  model.load_state_dict({k: torch.tensor(np.array(v)) for k, v in state.items()}, strict=True)
  return model.eval()


def torch_scores(name: str, size: tuple[int, int]) -> dict[str, np.ndarray]:
  """The scores `[3]` of `images(size)` by PyTorch, and the gradient of their weighted sum."""
  import torch

  x = torch.from_numpy(images(size)).requires_grad_()
  hps = name == "hpsv2"
  edge = max(size) if hps else min(size)
  pixels = torch.nn.functional.interpolate(
    x.permute(0, 3, 1, 2),
    size=[round(16 * n / edge) if hps else 16 * n // edge for n in size],
    mode="bicubic",
    antialias=True,
  )
  height, width = pixels.shape[2:]
  if hps:
    bottom, right = (16 - height) // 2, (16 - width) // 2
    around = (right, 16 - width - right, bottom, 16 - height - bottom)
    pixels = torch.nn.functional.pad(pixels, around)
  else:
    crop = (lambda n: (n - 16) // 2) if name == "pickscore" else (lambda n: round((n - 16) / 2))
    top, left = crop(height), crop(width)
    pixels = pixels.clamp(0, 1)[:, :, top : top + 16, left : left + 16]
  mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
  std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
  pixels = (pixels - mean) / std

  prompts = [f"A photo depicts {p}" if name == "hessel" else p for p in PROMPTS]
  given = WORDS(prompts, padding="max_length", truncation=True, max_length=LENGTH)
  ids = torch.tensor(given.input_ids)
  if hps:
    # open_clip puts 0 after the first end token.
    ends = (ids == WORDS.end_id).int().argmax(1, keepdim=True)
    ids = torch.where(torch.arange(LENGTH) > ends, 0, ids)
    image, text, _ = _towers("open_clip")(pixels, ids)
    scale = None
  else:
    model = _towers("transformers")
    output = model(ids, pixels)
    image, text, scale = output.image_embeds, output.text_embeds, model.logit_scale.exp()
  cosine = (image * text).sum(-1)
  if name in ("v1", "aesthetic-v1"):
    scores = (image @ torch.tensor(V1["weight"]).T + torch.tensor(V1["bias"]))[:, 0]
  elif name in ("aesthetic-v2", "relu"):
    scores = image
    state = V2 if name == "aesthetic-v2" else V2_RELU
    for weight, bias in zip(*[iter(state.values())] * 2, strict=True):
      if name == "relu" and scores is not image:
        scores = scores.relu()
      scores = scores @ torch.tensor(weight).T + torch.tensor(bias)
    scores = scores[:, 0]
  else:
    scores = {"hessel": 2.5 * cosine.clamp(min=0), "pickscore": None}.get(name, cosine)
    scores = scale * cosine if scores is None else scores
  (scores * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
  return {"scores": scores.detach().numpy(), "gradient": x.grad.numpy()}


def key_lines(state: dict[str, Any]) -> list[str]:
  """One line for each array: its name and its shape."""
  return sorted(f"{name} {tuple(array.shape)}" for name, array in state.items())


def open_clip_vit_h_14() -> list[str]:
  """`key_lines` of the network of HPSv2 as open_clip makes it; no memory is used."""
  import open_clip
  import torch

  with torch.device("meta"):
    model = open_clip.model.CLIP(**open_clip.get_model_config("ViT-H-14"))
  return key_lines(model.state_dict())


@functools.cache
def vit_h_14_state() -> dict[str, np.ndarray]:
  """The full-size state dict under transformers' names, of arrays that use no memory."""
  shapes = param_shapes(clip.CLIPModel(clip_weights.VIT_H_14))
  zeros = models_cases.traverse_util.flatten_dict(shapes)
  return {
    torch_layout.torch_names(path)[0]: torch_layout.to_torch_layout(
      path, np.broadcast_to(np.int8(0), leaf.shape)
    )
    for path, leaf in zeros.items()
  }


def digest(lines: list[str]) -> dict[str, Any]:
  return {"arrays": len(lines), "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest()}


if __name__ == "__main__":
  stored = {}
  for case, number in CASES:
    for key, value in torch_scores(case, SIZES[number]).items():
      stored[f"{case}/{number}/{key}"] = value
  np.savez_compressed(NUMBERS, **stored)
  OPEN_CLIP_KEYS.write_text(json.dumps({"ViT-H-14": digest(open_clip_vit_h_14())}) + "\n")
