"""ImageReward: how much people would like an image for a text (https://arxiv.org/abs/2304.05977).

BLIP's encoders and a head without activations. The parameter tree has the names of the published
file, `ImageReward.pt`; see `torch_layout`.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from rlft.models import blip
from rlft.models import config as config_lib
from rlft.types import UserError

# Of the published file: projections of BLIP's contrastive loss, which nothing here reads.
IGNORED = r"^blip\.(vision|text)_proj\."


@dataclasses.dataclass(frozen=True)
class ImageRewardConfig:
  """By default the published model, of 446 million parameters.

  Attributes:
    vision, text: the encoders.
    text_length: tokens that a prompt is padded or cut to.
    head_widths: of the head's hidden layers.
    mean, std: of the head's output on the published training data; the reward is what is left of
      it after both are taken out.
  """

  vision: blip.VisionConfig = blip.VisionConfig()
  text: blip.TextConfig = blip.TextConfig()
  text_length: int = 35
  head_widths: tuple[int, ...] = (1024, 128, 64, 16)
  mean: float = 0.16717362830052426
  std: float = 1.0333394966054072

  def __post_init__(self):
    config_lib.require(
      0 < self.text_length <= self.text.max_position_embeddings,
      f"ImageReward config: text_length={self.text_length} must be between 1 and "
      f"max_position_embeddings={self.text.max_position_embeddings}",
    )
    config_lib.require(
      bool(self.head_widths), "ImageReward config: head_widths must not be empty, e.g. [16]"
    )
    config_lib.require(self.std > 0, f"ImageReward config: std={self.std} must be positive")

  @classmethod
  def from_dict(cls, data: Mapping[str, Any], what: str = "ImageReward config"):
    """From a parsed `config.json`, which holds what `dataclasses.asdict` gives or a part of it.

    Args:
      data: what is left out has its default; keys that begin with an underscore are no options.
      what: the file, for messages.

    Raises:
      UserError: an unknown option, or a value that does not fit.
    """
    parts = {"vision": blip.VisionConfig, "text": blip.TextConfig}
    values = _known(cls, data, what)
    for name, part in parts.items():
      values[name] = part(**_known(part, values.get(name, {}), f"{what}, {name!r}"))
    return cls(**values)


def _known(cls: type, data: Mapping[str, Any], what: str) -> dict[str, Any]:
  names = [field.name for field in dataclasses.fields(cls)]
  options = {key: value for key, value in data.items() if not key.startswith("_")}
  if unknown := options.keys() - set(names):
    raise UserError(f"{what}: unknown option {min(unknown)!r}; use {', '.join(names)}")
  return {key: config_lib.freeze(value) for key, value in options.items()}


class _Blip(nn.Module):
  config: ImageRewardConfig
  dtype: jnp.dtype

  def setup(self):
    self.visual_encoder = blip.VisionTransformer(self.config.vision, self.dtype)
    self.text_encoder = blip.TextEncoder(self.config.text, self.dtype)


class _Layers(nn.Module):
  widths: tuple[int, ...]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, D]` -> `[B, 1]`: a product of matrices. In float32, also on TPUs."""
    # The numbers skip the dropout after each hidden layer but the last: 0, 2, 4, 6, 7.
    last = 2 * len(self.widths) - 1
    for i, width in enumerate([*self.widths, 1]):
      # Variance stays as it is, so that the first gradients pass five layers undiminished.
      x = nn.Dense(
        width,
        dtype=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,
        kernel_init=nn.initializers.lecun_normal(),
        name=str(min(2 * i, last)),
      )(x)
    return x


class Head(nn.Module):
  """The head: linear layers without activations. Attributes: widths of the hidden ones."""

  widths: tuple[int, ...]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, D]` -> `[B]` float32."""
    return _Layers(self.widths, name="layers")(x.astype(jnp.float32))[:, 0]


class ImageReward(nn.Module):
  """Attributes: config; dtype of the encoders' computation (the head's is float32)."""

  config: ImageRewardConfig
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    self.blip = _Blip(self.config, self.dtype)
    self.mlp = Head(self.config.head_widths)

  def __call__(self, pixels: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Scores images for texts.

    Args:
      pixels: `[B, S, S, 3]` float, S the image encoder's `image_size`, normalised with CLIP's mean
        and deviation.
      ids: `[B, L]` int32: [CLS], the text, [SEP], padding; or `[P, L]`, see `score`.
      mask: of the same shape, nonzero for tokens, zero for padding.

    Returns:
      `[B]` float32, about N(0, 1) over the pictures that the published model was trained on.
    """
    return self.score(self.encode_images(pixels), ids, mask)

  def encode_images(self, pixels: jax.Array) -> jax.Array:
    """`[B, S, S, 3]` as in `__call__` -> `[B, N, E]` of type `dtype`, for `score`."""
    return self.blip.visual_encoder(pixels)

  def score(self, states: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Scores encoded images: the part of `__call__` that depends on the text.

    Args:
      states: `[B, N, E]` from `encode_images`.
      ids: `[P, L]` int32, where P divides B: the first B/P images are for the first text.
      mask: `[P, L]` as in `__call__`.

    Returns:
      `[B]` float32.
    """
    if len(states) % len(ids):
      raise ValueError(f"{len(states)} images for {len(ids)} texts: give as many for each text")
    ids, mask = (jnp.repeat(x, len(states) // len(ids), axis=0) for x in (ids, mask))
    # The first place is [CLS].
    y = self.mlp(self.blip.text_encoder(ids, mask, states)[:, 0])
    return (y - self.config.mean) / self.config.std

  def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The smallest valid inputs of `__call__`."""
    size = self.config.vision.image_size
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32), ids, ids
