"""Small ImageReward networks, their inputs, and how to run them in Flax and in PyTorch.

Shared by the tests of the network and of the reward. Writes what they compare with where PyTorch
is not installed:

    python tests/blip_cases.py     (needs torch)
"""

from collections.abc import Callable
import dataclasses
import functools
import json
import pathlib
import re
from typing import Any

import jax
import models_cases
import numpy as np
import towers_cases

from rlft.models import blip, image_reward, tokens
from rlft.models.files import torch_layout
from rlft.rewards import image_reward as image_reward_reward
from rlft.types import Reward

NUMBERS = models_cases.FIXTURES / "blip.npz"
TREES = models_cases.FIXTURES / "blip.json"

# Word pieces; ids are the places.
VOCABULARY = (
  *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
  *("a", "dog", "##s", "two", "cat", "play", "##ing", "in", "the", "garden", ",", "of", "house"),
)
PROMPTS = ("a dog", "Two cats playing, in the garden of the house", "", "dogs")

_SMALL = image_reward.ImageRewardConfig(
  vision=blip.VisionConfig(
    image_size=16,
    patch_size=4,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
  ),
  text=blip.TextConfig(
    vocab_size=len(VOCABULARY) + 2,
    max_position_embeddings=12,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
  ),
  text_length=10,
  head_widths=(16, 8, 6, 4),
)
# Every other option away from what it is there.
_OTHER = image_reward.ImageRewardConfig(
  vision=dataclasses.replace(
    _SMALL.vision, image_size=24, patch_size=8, layer_norm_eps=1e-3, num_hidden_layers=1
  ),
  text=dataclasses.replace(
    _SMALL.text,
    vocab_size=len(VOCABULARY),
    num_attention_heads=4,
    layer_norm_eps=1e-3,
    num_hidden_layers=1,
  ),
  text_length=12,
  head_widths=(10,),
  mean=-0.3,
  std=0.7,
)
MODULES = {
  "small": image_reward.ImageReward(_SMALL),
  "other": image_reward.ImageReward(_OTHER),
}
# (network, height and width of the images).
CASES = {
  "enlarged": ("small", (13, 11)),
  "reduced": ("small", (40, 29)),
  "as_it_is": ("other", (24, 24)),
}


def params(name: str) -> Any:
  """The parameters of `MODULES[name]`."""
  return models_cases.random_params(MODULES[name], seed=6)


def write_vocabulary(path: pathlib.Path) -> None:
  """Writes `VOCABULARY` as a vocab.txt."""
  path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")


def tokenizer(name: str = "small") -> tokens.Tokenizer:
  """A BERT tokenizer with `VOCABULARY`, of as many tokens as `MODULES[name]` takes."""
  vocabulary = {token: id for id, token in enumerate(VOCABULARY)}
  return tokens.bert(vocabulary, length=MODULES[name].config.text_length)


def images(case: str) -> np.ndarray:
  """`[B, H, W, 3]` in [0, 1], one for each of `PROMPTS`."""
  shape = (len(PROMPTS), *CASES[case][1], 3)
  return np.random.RandomState(8).uniform(0, 1, shape).astype(np.float32)


def reward(name: str) -> Reward:
  """The reward of `MODULES[name]`."""
  return image_reward_reward.preference_reward(name, MODULES[name], params(name), tokenizer(name))


@functools.cache
def _scores_and_gradient(name: str) -> Callable[..., Any]:
  made = reward(name)

  def run(x, params, features):
    scores = made.score(params, x, features)
    return scores.sum(), scores

  return jax.jit(jax.grad(run, has_aux=True))


def flax_outputs(case: str, x: Any = None) -> dict[str, np.ndarray]:
  """The reward's `score` `[B]`, and the `gradient` of their sum with respect to the images.

  Args:
    case: key of `CASES`.
    x: other images of the same size.
  """
  made = reward(CASES[case][0])
  features = made.prepare(PROMPTS, [{}] * len(PROMPTS))
  x = images(case) if x is None else x
  gradient, scores = _scores_and_gradient(CASES[case][0])(x, made.params, features)
  return {"score": np.asarray(scores), "gradient": np.asarray(gradient)}


# ---- PyTorch -------------------------------------------------------------------------------------

# The published names of the image encoder, and those of transformers' BLIP.
_VISION_NAMES = (
  (r"^cls_token$", "embeddings.class_embedding"),
  (r"^pos_embed$", "embeddings.position_embedding"),
  (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
  (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
  (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
  (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
  (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
  (r"^norm\.", "post_layernorm."),
)
# The other way.
_PUBLISHED_NAMES = (
  (r"^embeddings\.class_embedding$", "cls_token"),
  (r"^embeddings\.position_embedding$", "pos_embed"),
  (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
  (r"^encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"blocks.\1.norm\2."),
  (r"^encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"blocks.\1.attn.qkv."),
  (r"^encoder\.layers\.(\d+)\.self_attn\.projection\.", r"blocks.\1.attn.proj."),
  (r"^encoder\.layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
  (r"^post_layernorm\.", "norm."),
)


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
  found = [re.sub(pattern, new, name) for pattern, new in rules if re.search(pattern, name)]
  assert len(found) == 1, name
  return found[0]


def torch_models(config: image_reward.ImageRewardConfig) -> dict[str, Any]:
  """The PyTorch networks, by the prefix of their published names; weights at random."""
  import torch
  import transformers

  vision, text = dataclasses.asdict(config.vision), dataclasses.asdict(config.text)
  # As a decoder it has layers that look at the image; it is not run as one.
  text |= {"is_decoder": True, "encoder_hidden_size": config.vision.hidden_size}
  widths = [config.text.hidden_size, *config.head_widths]
  linear = [
    layer
    for a, b in zip(widths[:-1], widths[1:], strict=True)
    for layer in (torch.nn.Linear(a, b), torch.nn.Dropout(0.2))
  ]
  return {
    "blip.visual_encoder.": transformers.BlipVisionModel(transformers.BlipVisionConfig(**vision)),
    "blip.text_encoder.": transformers.BlipTextModel(
      transformers.BlipTextConfig(**text), add_pooling_layer=False
    ),
    # There is no dropout before the last layer.
    "mlp.layers.": torch.nn.Sequential(*linear[:-1], torch.nn.Linear(widths[-1], 1)),
  }


def torch_outputs(case: str) -> dict[str, np.ndarray]:
  """The same as `flax_outputs` with transformers' networks and PyTorch's resampling."""
  import torch

  given = torch.from_numpy(images(case)).requires_grad_()
  scores = torch_reward(CASES[case][0])(given)
  scores.sum().backward()
  return {"score": scores.detach().numpy(), "gradient": given.grad.numpy()}


def torch_reward(name: str) -> Callable[[Any], Any]:
  """The reward of `MODULES[name]`: `[4, H, W, 3]` tensor in [0, 1], of `PROMPTS`, to `[4]`."""
  import torch

  config = MODULES[name].config
  models = torch_models(config)
  state = torch_layout.to_torch(params(name))
  for prefix, model in models.items():
    part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if "visual" in prefix:
      part = {_rename(k, _VISION_NAMES): v for k, v in part.items()}
    tensors = {k: torch.from_numpy(v) for k, v in part.items()}
    model.load_state_dict(tensors, strict=True)
    model.eval().requires_grad_(False)
  vision, text, head = models.values()

  words = image_reward_reward.tokenize(tokenizer(name), PROMPTS)
  size = config.vision.image_size

  def score(given):
    height, width = given.shape[1:3]
    short = min(height, width)
    shape = (size * height // short, size * width // short)
    y = given.permute(0, 3, 1, 2)
    if shape != (height, width):
      y = torch.nn.functional.interpolate(y, shape, mode="bicubic", antialias=True).clamp(0, 1)
    # As torchvision's CenterCrop.
    top, left = (int(round((n - size) / 2.0)) for n in shape)
    y = y[:, :, top : top + size, left : left + size]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    y = (y - mean) / torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    states = text(
      input_ids=torch.from_numpy(words["ids"]).long(),
      attention_mask=torch.from_numpy(words["mask"]),
      encoder_hidden_states=vision(y).last_hidden_state,
      is_decoder=False,
    ).last_hidden_state
    return (head(states[:, 0])[:, 0] - config.mean) / config.std

  return score


def torch_tree(config: image_reward.ImageRewardConfig) -> dict[str, tuple[int, ...]]:
  """The published names and shapes: transformers' networks without memory, names translated."""
  import torch

  with torch.device("meta"):
    models = torch_models(config)
  tree = {}
  for prefix, model in models.items():
    for name, value in model.state_dict().items():
      name = _rename(name, _PUBLISHED_NAMES) if "visual" in prefix else name
      tree[prefix + name] = tuple(value.shape)
  return tree


def stored(case: str) -> dict[str, np.ndarray]:
  """The numbers that PyTorch gave."""
  with np.load(NUMBERS) as file:
    return {k.removeprefix(f"{case}/"): file[k] for k in file if k.startswith(f"{case}/")}


def main():
  arrays = {f"{case}/{k}": v for case in CASES for k, v in torch_outputs(case).items()}
  np.savez_compressed(NUMBERS, **arrays)
  tree = torch_tree(image_reward.ImageRewardConfig())
  TREES.write_text(json.dumps(towers_cases.digest(tree), indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
  main()
