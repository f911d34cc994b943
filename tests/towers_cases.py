"""Small CLIP models and detectors, their inputs, and how to run them in Flax and in PyTorch.

Shared by the tests of CLIP, OWL-ViT and OWLv2. Writes what they compare with where PyTorch is not
installed:

    python tests/towers_cases.py     (needs torch)
"""

import dataclasses
import functools
import hashlib
import json
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import models_cases
import numpy as np

from rlft.models import clip, owlvit
from rlft.models.files import torch_layout
from rlft.models.shapes import param_shapes

NUMBERS = models_cases.FIXTURES / "towers.npz"
TREES = models_cases.FIXTURES / "towers.json"

END = 57  # not the highest id, so that the two rules of pooling differ
_TEXT = clip.CLIPTextConfig(
  vocab_size=60,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=2,
  num_attention_heads=3,
  max_position_embeddings=8,
  pad_token_id=0,
  bos_token_id=56,
  eos_token_id=END,
  projection_dim=24,
)
_VISION = clip.CLIPVisionConfig(
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=2,
  image_size=16,
  patch_size=4,
  projection_dim=24,
)


def _variant(config: Any) -> Any:
  """The same with the exact GELU, another image size, and the end token's id of old files."""
  text = {"hidden_act": "gelu", "layer_norm_eps": 1e-3, "eos_token_id": 2}
  vision = {"hidden_act": "gelu", "layer_norm_eps": 1e-3, "image_size": 24, "patch_size": 8}
  return dataclasses.replace(
    config,
    text_config=dataclasses.replace(config.text_config, **text),
    vision_config=dataclasses.replace(config.vision_config, **vision),
  )


_CLIP = clip.CLIPConfig(_TEXT, _VISION, 24)
_OWLVIT = owlvit.OwlViTConfig(dataclasses.replace(_TEXT, num_hidden_layers=1), _VISION, 24)

MODULES = {
  "clip_quick_gelu": clip.CLIPModel(_CLIP),
  "clip_gelu": clip.CLIPModel(_variant(_CLIP)),
  "owlvit": owlvit.OwlViT(_OWLVIT),
  "owlv2": owlvit.OwlViT(dataclasses.replace(_variant(_OWLVIT), model_type="owlv2")),
}

# Ragged texts: padded with 0, with the end token, not at all; ids above the end token's before and
# after it.
IDS = np.array(
  [
    [56, 3, 4, END, 0, 0, 0, 0],
    [56, 59, 9, 8, 7, END, END, END],
    [56, 1, 2, 3, 4, 5, 6, END],
    [56, END, 58, 0, 0, 0, 0, 0],
  ],
  np.int32,
)


def inputs(name: str) -> dict[str, np.ndarray]:
  """The inputs of `MODULES[name]`: `pixels` `[2, S, S, 3]`, `ids` `[4, L]` or `[2, 2, L]`."""
  vision = MODULES[name].config.vision_config
  shape = (2, *vision.pixels.shape[1:])
  ids = IDS
  if isinstance(MODULES[name], owlvit.OwlViT):
    ids = IDS.reshape(2, 2, -1).copy()
    ids[1, 1] = 0  # the second image has one query
  return {"pixels": np.random.RandomState(3).standard_normal(shape).astype(np.float32), "ids": ids}


@functools.cache
def params(name: str) -> Any:
  """The parameters of `MODULES[name]`."""
  return models_cases.random_params(MODULES[name], seed=1)


def apply(name: str, *args: Any, method: str | None = None) -> Any:
  """`MODULES[name]` on `args`, compiled."""
  run = functools.partial(MODULES[name].apply, {"params": params(name)}, method=method)
  return jax.jit(run)(*args)


def _weighted(outputs: dict[str, Any]) -> Any:
  """A number that depends on every output, to be differentiated; works in JAX and PyTorch."""
  total = 0.0
  for key, value in sorted(outputs.items()):
    weights = np.random.RandomState(len(key)).standard_normal(value.shape).astype(np.float32)
    if not isinstance(value, jax.Array):
      import torch

      weights = torch.from_numpy(weights)
    total = total + (weights * value).mean()
  return total


def _flax(name: str, pixels: Any, ids: Any, **replacements: Any) -> dict[str, Any]:
  module = MODULES[name].clone(**replacements)
  apply = functools.partial(module.apply, {"params": params(name)})

  if isinstance(module, clip.CLIPModel):
    return {
      "image": apply(pixels, method="image_features"),
      "text": apply(ids, method="text_features"),
      "similarity": apply(pixels, ids),
    }
  found = apply(pixels, ids)
  # The logits of padding are as low as can be.
  outputs = {"confidence": jax.nn.sigmoid(found.logits), "boxes": found.boxes}
  return outputs if found.objectness is None else outputs | {"objectness": found.objectness}


@functools.cache
def flax_outputs(name: str) -> dict[str, np.ndarray]:
  """What the Flax module makes of `inputs(name)`, and the gradient with respect to the pixels."""

  def run(pixels, ids):
    outputs = _flax(name, pixels, ids)
    return _weighted(outputs), outputs

  given = inputs(name)
  compiled = jax.jit(jax.grad(run, has_aux=True))
  gradient, outputs = compiled(given["pixels"], given["ids"])
  return jax.tree.map(np.asarray, outputs | {"gradient": gradient})


@functools.cache
def flax_outputs_rounded(name: str) -> dict[str, np.ndarray]:
  """What the module makes of `inputs(name)` if its towers compute in bfloat16."""
  run = functools.partial(_flax, name, dtype=jnp.bfloat16)
  given = inputs(name)
  outputs = jax.jit(run)(given["pixels"], given["ids"])
  return jax.tree.map(np.asarray, outputs)


def torch_class(module: Any) -> tuple[Any, Any]:
  """transformers' config and model class."""
  import transformers

  kind = "clip" if isinstance(module, clip.CLIPModel) else module.config.model_type
  return {
    "clip": (transformers.CLIPConfig, transformers.CLIPModel),
    "owlvit": (transformers.OwlViTConfig, transformers.OwlViTForObjectDetection),
    "owlv2": (transformers.Owlv2Config, transformers.Owlv2ForObjectDetection),
  }[kind]


def torch_model(module: Any, tree: Any) -> Any:
  """The PyTorch model that is `module` with these parameters; strict about names and shapes."""
  import torch

  config, model = torch_class(module)
  model = model(config(**dataclasses.asdict(module.config)))
  state = {name: torch.from_numpy(array) for name, array in torch_layout.to_torch(tree).items()}
  model.load_state_dict(state, strict=True)
  return model.eval().requires_grad_(False)


def torch_outputs(name: str) -> dict[str, np.ndarray]:
  """What the PyTorch model makes of `inputs(name)`, and the gradient of the pixels."""
  import torch

  model = torch_model(MODULES[name], params(name))
  given = inputs(name)
  pixels = torch.from_numpy(given["pixels"]).requires_grad_()
  first = pixels.permute(0, 3, 1, 2)
  ids = torch.from_numpy(given["ids"]).reshape(-1, given["ids"].shape[-1])
  if isinstance(MODULES[name], clip.CLIPModel):
    outputs = {
      "image": model.get_image_features(first),
      "text": model.get_text_features(ids),
      "similarity": model(input_ids=ids, pixel_values=first).logits_per_image,
    }
  else:
    found = model(input_ids=ids, pixel_values=first)
    outputs = {"confidence": torch.sigmoid(found.logits), "boxes": found.pred_boxes}
    if "objectness_logits" in found:
      outputs["objectness"] = found.objectness_logits
  _weighted(outputs).backward()
  outputs["gradient"] = pixels.grad
  return {key: value.detach().numpy() for key, value in outputs.items()}


# Full size: what the published config.json files say beside transformers' defaults.
_H14 = {"hidden_act": "gelu", "projection_dim": 1024}
FULL_SIZE = {
  "clip_vit_b_32": {"model_type": "clip"},
  "clip_vit_l_14": {
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "vision_config": {
      "hidden_size": 1024,
      "intermediate_size": 4096,
      "num_hidden_layers": 24,
      "num_attention_heads": 16,
      "patch_size": 14,
    },
  },
  "clip_vit_h_14": {
    "model_type": "clip",
    "projection_dim": 1024,
    "text_config": {
      **_H14,
      "hidden_size": 1024,
      "intermediate_size": 4096,
      "num_hidden_layers": 24,
      "num_attention_heads": 16,
    },
    "vision_config": {
      **_H14,
      "hidden_size": 1280,
      "intermediate_size": 5120,
      "num_hidden_layers": 32,
      "num_attention_heads": 16,
      "patch_size": 14,
    },
  },
  "owlvit_base_patch32": {"model_type": "owlvit"},
  "owlv2_base_patch16": {
    "model_type": "owlv2",
    "vision_config": {"image_size": 960},
  },
}


def full_size(name: str) -> Any:
  """The Flax module of `FULL_SIZE[name]`."""
  data = FULL_SIZE[name]
  if data["model_type"] == "clip":
    return clip.CLIPModel(clip.CLIPConfig.from_dict(data))
  return owlvit.OwlViT(owlvit.OwlViTConfig.from_dict(data))


def flax_tree(module: Any) -> dict[str, tuple[int, ...]]:
  """PyTorch's name and shape of each parameter that the Flax module has."""
  tree = {}
  for path, leaf in traverse_util.flatten_dict(param_shapes(module)).items():
    empty = np.broadcast_to(np.float32(0), leaf.shape)
    tree[torch_layout.torch_names(path)[0]] = torch_layout.to_torch_layout(path, empty).shape
  return tree


def torch_tree(name: str) -> dict[str, tuple[int, ...]]:
  """The same of the PyTorch model, which is made without memory for its parameters."""
  import torch

  config, model = torch_class(full_size(name))
  with torch.device("meta"):
    return {k: tuple(v.shape) for k, v in model(config(**FULL_SIZE[name])).state_dict().items()}


def stored(name: str) -> dict[str, np.ndarray]:
  """What `torch_outputs(name)` was."""
  with np.load(NUMBERS) as file:
    return {k.removeprefix(f"{name}/"): file[k] for k in file if k.startswith(f"{name}/")}


def largest_difference(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
  """Over all arrays of both, which must have the same names, shapes and type float32."""
  assert found.keys() == expected.keys()
  for name in found:
    assert found[name].shape == expected[name].shape and found[name].dtype == np.float32, name
  return max(np.abs(found[name] - expected[name]).max() for name in found)


def digest(tree: dict[str, tuple[int, ...]]) -> dict[str, Any]:
  """Number of arrays, number of parameters, and SHA-256 of names and shapes."""
  lines = [f"{name} {tuple(shape)}" for name, shape in sorted(tree.items())]
  return {
    "arrays": len(tree),
    "parameters": sum(int(np.prod(shape)) for shape in tree.values()),
    "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
  }


def main():
  arrays = {}
  for name in MODULES:
    arrays |= {f"{name}/{k}": v for k, v in torch_outputs(name).items()}
  np.savez_compressed(NUMBERS, **arrays)
  trees = {name: digest(torch_tree(name)) for name in FULL_SIZE}
  TREES.write_text(json.dumps(trees, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
  main()
