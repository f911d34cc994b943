"""LAION's aesthetic predictors: how people would rate a picture, about 1 to 10, without a prompt.

A small head on the features (of unit norm) of a CLIP model's image tower:

    aesthetic-v1  one linear layer          LAION-AI/aesthetic-predictor
    aesthetic-v2  five layers, on ViT-L/14  christophschuhmann/improved-aesthetic-predictor

The five layers of V2 have nothing between them, so they are one affine map, and are made one when
they are read. Its variant 'reluMSE' has ReLUs between, and is computed as it is.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlft.models.files import sources
from rlft.rewards import clip
from rlft.types import JaxReward, UserError

Name = Literal["aesthetic-v1", "aesthetic-v2"]

# The layers of V2 in PyTorch's sequence; dropout and, in the second, ReLUs are between.
_LINEAR = tuple(f"layers.{i}." for i in (0, 2, 4, 6, 7))
_WITH_RELU = tuple(f"layers.{i}." for i in (0, 3, 6, 9, 11))
_KINDS: Mapping[tuple[str, ...], Name] = {
  ("",): "aesthetic-v1",
  _LINEAR: "aesthetic-v2",
  _WITH_RELU: "aesthetic-v2",
}
_EXPECTED = {
  "aesthetic-v1": "weight and bias",
  "aesthetic-v2": "layers.0.weight, layers.0.bias and four layers more",
}

# (matrix [in, out], bias [out]) of each layer, float32; with ReLUs between if there are several.
Head = tuple[tuple[np.ndarray, np.ndarray], ...]


def aesthetic_v1(weights: str, head: str, dtype: clip.Dtype = "float32") -> JaxReward:
  """'aesthetic-v1': LAION's first predictor.

  Images are resized on the short side and cropped, as in torchvision.

  Args:
    weights: the CLIP model that the head was trained on: OpenAI's ViT-B/32, B/16 or L/14; see
      `clip.clip_score`.
    head: sa_0_4_vit_b_32_linear.pth, sa_0_4_vit_b_16_linear.pth or sa_0_4_vit_l_14_linear.pth.
    dtype: type that the image tower computes in; the head is float32.

  Raises:
    UserError: the files are missing, or do not fit each other.
  """
  return _reward("aesthetic-v1", weights, head, dtype)


def aesthetic_v2(weights: str, head: str, dtype: clip.Dtype = "float32") -> JaxReward:
  """'aesthetic-v2': LAION's second predictor; see `aesthetic_v1`.

  Args:
    weights: OpenAI's ViT-L/14, e.g. openai/clip-vit-large-patch14 at a revision.
    head: sac+logos+ava1-l14-linearMSE.pth, which nearly everyone uses, or another of its authors.
    dtype: as for `aesthetic_v1`.

  Raises:
    UserError: the files are missing, or do not fit each other.
  """
  return _reward("aesthetic-v2", weights, head, dtype)


def _reward(name: Name, weights: str, head: str, dtype: clip.Dtype) -> JaxReward:
  layers = read_head(name, sources.open_weights(head), what=head)
  embed, params = clip.image_embedder(weights, dtype)
  found = params["visual_projection"]["kernel"].shape[-1]
  expected = len(layers[0][0])
  if found != expected:
    raise UserError(
      f"{head} takes {expected} features, but {weights} gives {found}: use the head that was "
      "trained on this CLIP model"
    )

  def score(params, images, features):
    del features
    return rate(params["head"], embed(params["clip"], images))

  return JaxReward(name, score, params={"clip": params, "head": layers})


def read_head(name: Name, state: Mapping[str, np.ndarray], *, what: str) -> Head:
  """The layers of a head in a state dict; one layer wherever nothing is between them.

  Args:
    name: the reward.
    state: PyTorch's names: 'weight', 'bias' (V1) or 'layers.<i>.weight', 'layers.<i>.bias' (V2).
    what: the file, for messages.

  Raises:
    UserError: other names or shapes.
  """
  by_names = {
    frozenset(f"{layer}{leaf}" for layer in layers for leaf in ("weight", "bias")): layers
    for layers in _KINDS
  }
  layers = by_names.get(frozenset(state))
  if layers is None:
    raise UserError(
      f"{what} has {len(state)} arrays, the first is {min(state, default='none')}, expected "
      f"{_EXPECTED[name]}: give the .pth file of LAION's head"
    )
  if _KINDS[layers] != name:
    raise UserError(f"{what} is a head of {_KINDS[layers]}, not of {name}: write {_KINDS[layers]}")
  pairs = [_layer(state, layer, what) for layer in layers]
  inputs, outputs = zip(*(matrix.shape for matrix, _ in pairs), strict=True)
  if outputs != (*inputs[1:], 1):
    raise UserError(
      f"{what}: layers from {inputs} to {outputs} features do not end in one: download it again"
    )
  if layers != _WITH_RELU:
    pairs = [_collapse(pairs)]
  return tuple((matrix.astype(np.float32), bias.astype(np.float32)) for matrix, bias in pairs)


def _layer(
  state: Mapping[str, np.ndarray], prefix: str, what: str
) -> tuple[np.ndarray, np.ndarray]:
  matrix, bias = (np.asarray(state[f"{prefix}{leaf}"], np.float64) for leaf in ("weight", "bias"))
  if matrix.ndim != 2 or bias.shape != matrix.shape[:1]:
    raise UserError(
      f"{what}: {prefix}weight has shape {matrix.shape} and {prefix}bias {bias.shape}, expected "
      "(out, in) and (out,): download it again"
    )
  return matrix.T, bias


def _collapse(layers: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
  """(x W1 + b1) W2 + b2 = x (W1 W2) + (b1 W2 + b2), and so on, in float64."""
  matrix, bias = layers[0]
  for weight, offset in layers[1:]:
    matrix, bias = matrix @ weight, bias @ weight + offset
  return matrix, bias


def rate(head: Any, features: jax.Array) -> jax.Array:
  """The head's rating of features: `[B, F]` of unit norm -> `[B]` float32."""
  x = features.astype(jnp.float32)
  for i, (matrix, bias) in enumerate(head):
    x = jax.nn.relu(x) if i else x
    x = jnp.matmul(x, matrix, precision=jax.lax.Precision.HIGHEST) + bias
  return x[:, 0]
