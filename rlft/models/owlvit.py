"""OWL-ViT (https://arxiv.org/abs/2205.06230) and OWLv2 (https://arxiv.org/abs/2306.09683).

Detectors of whatever a text names: a CLIP model whose image patches each propose one box and are
compared with the texts. Parameter trees: the names of transformers' `OwlViTForObjectDetection` and
`Owlv2ForObjectDetection`, split at the dots.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from rlft.models import clip, clip_layers
from rlft.models import config as config_lib

# Where transformers' defaults differ from CLIP's.
_TEXT = {"max_position_embeddings": 16, "pad_token_id": 0}
_VISION = {
  "owlvit": {"image_size": 768, "patch_size": 32},
  "owlv2": {"image_size": 768, "patch_size": 16},
}
_EPSILON = 1e-6  # keeps the normalisation of features finite
_GUARD = 1e-4  # keeps the logits of 0 and 1 finite


@dataclasses.dataclass(frozen=True)
class OwlViTConfig:
  """Names and defaults of transformers' `OwlViTConfig`.

  Attributes:
    text_config, vision_config: the towers.
    projection_dim: size of a text's features; the class head has the text tower's width, which
      must be the same.
    model_type: 'owlvit', or 'owlv2', which has an objectness head too.
    logit_scale_init_value: of CLIP's own head, which detection does not use.
  """

  text_config: clip.CLIPTextConfig = clip.CLIPTextConfig(**_TEXT)
  vision_config: clip.CLIPVisionConfig = clip.CLIPVisionConfig(**_VISION["owlvit"])
  projection_dim: int = 512
  model_type: str = "owlvit"
  logit_scale_init_value: float = 2.6592

  def __post_init__(self):
    config_lib.require(
      self.model_type in _VISION,
      f"detector config: model_type={self.model_type!r} must be one of {', '.join(_VISION)}",
    )
    config_lib.require(
      self.projection_dim == self.text_config.hidden_size,
      f"detector config: projection_dim={self.projection_dim} must be the text tower's hidden_size="
      f"{self.text_config.hidden_size}",
    )

  @classmethod
  def from_dict(cls, data: Mapping[str, Any], what: str = "config.json"):
    """From a parsed `config.json`; raises `UserError` if it is not of OWL-ViT or OWLv2."""
    found = data.get("model_type")
    config_lib.require(
      found in _VISION,
      f"{what}: model_type={found!r} is not supported (only {', '.join(map(repr, _VISION))}); use "
      "an OWL-ViT or OWLv2 model",
    )
    configs = clip.towers(data, what=what, text=_TEXT, vision=_VISION[found])
    return config_lib.parse(cls, {**data, **configs}, what=what)

  @property
  def clip(self) -> clip.CLIPConfig:
    """The CLIP model inside."""
    return clip.CLIPConfig(
      self.text_config, self.vision_config, self.projection_dim, self.logit_scale_init_value
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queries:
  """Encoded texts, `[B, Q, ...]` or, if all images share them, `[Q, ...]`.

  Attributes:
    features: `[..., Q, F]` float32, of unit length.
    present: `[..., Q]` bool; False for padding.
  """

  features: jax.Array
  present: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Detections:
  """What each of the N patches of B images proposes; all float32.

  Attributes:
    logits: `[B, N, Q]`; sigmoid gives the confidence that the patch's box holds query q. The lowest
      float32 where the query is padding.
    boxes: `[B, N, 4]` in [0, 1]: centre x, centre y, width, height in units of the image's sides.
    objectness: `[B, N]` logits of the box holding anything; `None` for OWL-ViT. Its gradient ends
      at the patch's features.
  """

  logits: jax.Array
  boxes: jax.Array
  objectness: jax.Array | None


def box_bias(grid: int) -> jax.Array:
  """Logits of each patch's default box: centre at the patch's lower right corner, size 1 patch.

  Returns:
    `[grid * grid, 4]` float32, row by row: x, y, width, height.
  """

  def logit(x: jax.Array) -> jax.Array:
    return jnp.log(x + _GUARD) - jnp.log1p(_GUARD - x)

  corners = jnp.arange(1, grid + 1, dtype=jnp.float32) / grid
  y, x = jnp.meshgrid(corners, corners, indexing="ij")
  sizes = jnp.full((grid * grid, 2), 1 / grid, jnp.float32)
  return logit(jnp.concatenate([x.reshape(-1, 1), y.reshape(-1, 1), sizes], axis=1))


def _normalise(x: jax.Array) -> jax.Array:
  return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + _EPSILON)


class _ClassHead(nn.Module):
  """Scaled and shifted cosines of patches and queries; scale and shift depend on the patch."""

  features: int

  @nn.compact
  def __call__(self, patches: jax.Array, queries: Queries) -> jax.Array:
    """`[B, N, D]` float32 -> `[B, N, Q]`."""
    x = _normalise(nn.Dense(self.features, name="dense0")(patches))
    cosines = jnp.einsum("...nf,...qf->...nq", x, _normalise(queries.features))
    shift = nn.Dense(1, name="logit_shift")(patches)
    scale = nn.elu(nn.Dense(1, name="logit_scale")(patches)) + 1
    present = queries.present[..., None, :]
    return jnp.where(present, (cosines + shift) * scale, jnp.finfo(jnp.float32).min)


class _MLPHead(nn.Module):
  """Three dense layers with the exact GELU between; boxes and objectness."""

  features: int

  @nn.compact
  def __call__(self, patches: jax.Array) -> jax.Array:
    """`[B, N, D]` float32 -> `[B, N, features]`."""
    x = patches
    for i in range(2):
      x = clip_layers.gelu(nn.Dense(patches.shape[-1], name=f"dense{i}")(x))
    return nn.Dense(self.features, name="dense2")(x)


class OwlViT(nn.Module):
  """OWL-ViT or OWLv2, as the config says.

  Attributes:
    config: see `OwlViTConfig`.
    dtype: type that the towers compute in; heads and last layer norms are float32.
  """

  config: OwlViTConfig
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    c = self.config
    towers = clip.CLIPModel(c.clip, self.dtype, pre_norm="pre_layernorm", end_is_highest=True)
    setattr(self, c.model_type, towers)
    self.layer_norm = nn.LayerNorm(c.vision_config.layer_norm_eps)
    self.class_head = _ClassHead(c.text_config.hidden_size)
    self.box_head = _MLPHead(4)
    if c.model_type == "owlv2":
      self.objectness_head = _MLPHead(1)

  @property
  def _clip(self) -> clip.CLIPModel:
    # An attribute's name is its place in the tree, which the published files give.
    return getattr(self, self.config.model_type)

  def __call__(self, pixels: jax.Array, ids: jax.Array) -> Detections:
    """Detects what the texts name.

    Args:
      pixels: see `encode_images`.
      ids: see `encode_queries`; `[B, Q, L]`, or `[Q, L]` for the same queries in all images.
    """
    if self.is_initializing():
      # The files also hold CLIP's own head, without a part in detection; here, too, so that they
      # map one to one in both directions.
      self._clip.image_features(pixels)
    return self.detect(self.encode_images(pixels), self.encode_queries(ids))

  def encode_queries(self, ids: jax.Array) -> Queries:
    """Texts to queries.

    Args:
      ids: `[..., Q, L]` int32, L at most `max_position_embeddings`: begin token, text, end token
        (the highest id), padding. A query whose first id is 0 is padding.
    """
    features = self._clip.text_features(ids.reshape(-1, ids.shape[-1]))
    features = features / jnp.linalg.norm(features, axis=-1, keepdims=True)
    return Queries(features.reshape(*ids.shape[:-1], -1), ids[..., 0] > 0)

  def encode_images(self, pixels: jax.Array) -> jax.Array:
    """Images to features of patches.

    Args:
      pixels: `[B, S, S, 3]` float, S the config's `image_size`, normalised with CLIP's mean and
        deviation.

    Returns:
      `[B, N, D]` float32; the N = (S / patch)^2 patches row by row.
    """
    tokens = self._clip.image_tokens(pixels)
    return self.layer_norm(tokens[:, 1:] * tokens[:, :1])

  def detect(self, patches: jax.Array, queries: Queries) -> Detections:
    """Compares what `encode_images` and `encode_queries` returned."""
    boxes = self.box_head(patches) + box_bias(self.config.vision_config.grid)
    objectness = None
    if self.config.model_type == "owlv2":
      objectness = self.objectness_head(jax.lax.stop_gradient(patches))[..., 0]
    return Detections(self.class_head(patches, queries), nn.sigmoid(boxes), objectness)

  def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The smallest valid inputs of `__call__`."""
    return (self.config.vision_config.pixels, jax.ShapeDtypeStruct((1, 1), jnp.int32))
