"""The rewards of small OWL-ViT and OWLv2 detectors, in Flax and in PyTorch.

Writes what `rewards/test_owlvit.py` compares with where PyTorch is not installed:

    python tests/owlvit_reward_cases.py     (needs torch)
"""

import dataclasses
import functools
from typing import Any

import jax
import models_cases
import numpy as np
import towers_cases

from rlft.models import owlvit, tokens
from rlft.rewards import owlvit as owlvit_reward

KINDS = ("owlvit", "owlv2")
NUMBERS = models_cases.FIXTURES / "owlvit_rewards.npz"

# The rewards: sizes of images, and what is named in each of them.
SIZES = {"small": (13, 13), "large": (34, 28)}
NAMED = ({"objects": ["dog", "two cats"]}, {"objects": "dog"}, {"objects": ["cats"] * 3})


@functools.cache
def tokenizer() -> tokens.Tokenizer:
  """See `models_cases.tokenizer`; of 12 tokens."""
  return dataclasses.replace(models_cases.tokenizer(), length=12)


@functools.cache
def detector(kind: str) -> tuple[owlvit.OwlViT, Any]:
  """A detector for that tokenizer, and its parameters."""
  config = towers_cases.MODULES[kind].config
  text = dataclasses.replace(
    config.text_config, vocab_size=len(tokenizer()), max_position_embeddings=tokenizer().length
  )
  vision = dataclasses.replace(config.vision_config, num_hidden_layers=1)
  module = owlvit.OwlViT(dataclasses.replace(config, text_config=text, vision_config=vision))
  return module, models_cases.random_params(module, seed=4)


def images(size: str) -> np.ndarray:
  """`[B, H, W, 3]` in [0, 1], one for each of `NAMED`."""
  return np.random.RandomState(5).uniform(0, 1, (len(NAMED), *SIZES[size], 3)).astype(np.float32)


def reward(kind: str, **options: Any) -> Any:
  """The reward of `detector(kind)`."""
  return owlvit_reward.detector_reward(kind, *detector(kind), tokenizer(), **options)


@functools.cache
def reward_outputs(kind: str, size: str) -> dict[str, np.ndarray]:
  """`score` `[B]`, and `gradient` of their sum with respect to the images."""
  made = reward(kind)
  ids = made.prepare([""] * len(NAMED), NAMED)

  def run(x):
    scores = made.score(made.params, x, ids)
    return scores.sum(), scores

  gradient, scores = jax.jit(jax.grad(run, has_aux=True))(images(size))
  return {"score": np.asarray(scores), "gradient": np.asarray(gradient)}


def _torch_resize(x: Any, size: int) -> Any:
  """OWL-ViT's processor without its rounding to 8 bits."""
  import torch

  y = torch.nn.functional.interpolate(x, (size, size), mode="bicubic", antialias=True)
  return y.clamp(0, 1)


def _torch_zoom(x: Any, size: int) -> Any:
  """OWLv2's processor: `scipy.ndimage` on each axis, as matrices."""
  from scipy import ndimage
  import torch

  height, width = x.shape[2:]
  side = max(height, width)
  x = torch.nn.functional.pad(x, (0, side - width, 0, side - height), value=0.5)
  sigma = max(0.0, (side / size - 1) / 2)
  columns = np.eye(side)
  if sigma:
    columns = ndimage.gaussian_filter1d(columns, sigma, axis=0, mode="mirror")
  zoom = (size / side, 1)
  matrix = ndimage.zoom(columns, zoom, order=1, mode="mirror", grid_mode=True)
  matrix = torch.from_numpy(matrix.astype(np.float32))
  return torch.einsum("ih,bchw,jw->bcij", matrix, x, matrix)


def torch_reward_outputs(kind: str, size: str) -> dict[str, np.ndarray]:
  """The same with PyTorch: transformers' model on each image and its texts alone."""
  import torch

  module, tree = detector(kind)
  model = towers_cases.torch_model(module, tree)
  x = torch.from_numpy(images(size)).requires_grad_()
  side = module.config.vision_config.image_size
  y = {"owlvit": _torch_resize, "owlv2": _torch_zoom}[kind](x.permute(0, 3, 1, 2), side)
  mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
  y = (y - mean) / torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
  scores = []
  for i, known in enumerate(NAMED):
    names = [known["objects"]] if isinstance(known["objects"], str) else known["objects"]
    ids, _ = tokenizer()([f"a photo of a {name}" for name in names])
    ids = torch.from_numpy(ids).long()
    logits = model(input_ids=ids, pixel_values=y[i : i + 1]).logits[0]
    scores.append(torch.sigmoid(logits).amax(0).mean())
  scores = torch.stack(scores)
  scores.sum().backward()
  return {"score": scores.detach().numpy(), "gradient": x.grad.numpy()}


def stored(kind: str, size: str) -> dict[str, np.ndarray]:
  """What `torch_reward_outputs(kind, size)` was."""
  prefix = f"{kind}_{size}/"
  with np.load(NUMBERS) as file:
    return {k.removeprefix(prefix): file[k] for k in file if k.startswith(prefix)}


def main():
  arrays = {}
  for kind in KINDS:
    for size in SIZES:
      found = torch_reward_outputs(kind, size)
      arrays |= {f"{kind}_{size}/{k}": v for k, v in found.items()}
  np.savez_compressed(NUMBERS, **arrays)


if __name__ == "__main__":
  main()
