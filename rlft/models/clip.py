"""CLIP (https://arxiv.org/abs/2103.00020): both towers, and Stable Diffusion's text encoders.

Numbers: `CLIPModel`, `CLIPTextModel` and `CLIPTextModelWithProjection` of transformers. Parameter
trees: their names split at the dots; for the text encoders that is also the tree of the Flax
classes of transformers 4.57.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from rlft.models import clip_layers, clip_vision
from rlft.models import config as config_lib

CLIPVisionConfig = clip_vision.CLIPVisionConfig

# Of the channels of images in [0, 1], as OpenAI's models take them.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

# Configs from before transformers 4.31 say 2 whatever the tokenizer's end token is; the end token
# is then the highest id, as in OpenAI's code.
_WRONG_EOS = 2


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
  """Names and defaults of transformers' `CLIPTextConfig`; token ids are kept for saving."""

  vocab_size: int = 49408
  hidden_size: int = 512
  intermediate_size: int = 2048
  num_hidden_layers: int = 12
  num_attention_heads: int = 8
  max_position_embeddings: int = 77
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  projection_dim: int = 512
  pad_token_id: int | None = 1
  bos_token_id: int | None = 49406
  eos_token_id: int | None = 49407

  def __post_init__(self):
    clip_layers.check(self, "text encoder")

  @classmethod
  def from_dict(cls, data: Mapping[str, Any], what: str = "text encoder config"):
    """From a parsed `text_encoder/config.json`; raises `UserError` if it is not CLIP's."""
    found = data.get("model_type", "clip_text_model")
    config_lib.require(
      found == "clip_text_model",
      f"{what}: model_type={found!r} is not supported (only 'clip_text_model'); "
      f"{config_lib.USE_SUPPORTED}",
    )
    return config_lib.parse(cls, data, what=what)


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
  """Both towers; names of transformers' `CLIPConfig`.

  Attributes:
    text_config, vision_config: the towers.
    projection_dim: F, the size of the features that are compared.
    logit_scale_init_value: logarithm of the factor of the cosine, before training.
    image_mean, image_std: of the channels of images, see `rlft.rewards.preprocess.normalise`; other
      libraries keep them in a file of their own.
  """

  text_config: CLIPTextConfig = CLIPTextConfig()
  vision_config: CLIPVisionConfig = CLIPVisionConfig()
  projection_dim: int = 512
  logit_scale_init_value: float = 2.6592
  image_mean: tuple[float, ...] = IMAGE_MEAN
  image_std: tuple[float, ...] = IMAGE_STD

  @classmethod
  def from_dict(cls, data: Mapping[str, Any], what: str = "config.json"):
    """From a parsed `config.json`; raises `UserError` if it is not a CLIP model's."""
    found = data.get("model_type", "clip")
    config_lib.require(
      found == "clip",
      f"{what}: model_type={found!r} is not supported (only 'clip'); use a CLIP model with a text "
      "and an image tower",
    )
    return config_lib.parse(cls, data | towers(data, what=what), what=what)


def towers(
  data: Mapping[str, Any],
  *,
  what: str,
  text: Mapping[str, Any] | None = None,
  vision: Mapping[str, Any] | None = None,
) -> dict[str, CLIPTextConfig | CLIPVisionConfig]:
  """`{'text_config': ..., 'vision_config': ...}` from a parsed `config.json` of both towers.

  `text` and `vision` are defaults that differ from CLIP's. Options may be in `text_config` or, in
  old files, in `text_config_dict`, which goes first.
  """
  configs = {}
  for key, cls, defaults in (
    ("text_config", CLIPTextConfig, text),
    ("vision_config", clip_vision.CLIPVisionConfig, vision),
  ):
    given = {**(defaults or {}), **(data.get(key) or {}), **(data.get(f"{key}_dict") or {})}
    configs[key] = config_lib.parse(cls, given, what=f"{what}, {key}")
  return configs


class _Embeddings(nn.Module):
  config: CLIPTextConfig

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    """`[B, L]` int32 -> `[B, L, D]`: the sum of token and position embeddings."""
    c = self.config
    if ids.shape[1] > c.max_position_embeddings:
      raise ValueError(
        f"{ids.shape[1]} tokens, but the text encoder takes at most "
        f"{c.max_position_embeddings}; truncate the prompts"
      )
    tokens = nn.Embed(
      c.vocab_size,
      c.hidden_size,
      embedding_init=nn.initializers.normal(0.02),
      name="token_embedding",
    )
    positions = nn.Embed(
      c.max_position_embeddings,
      c.hidden_size,
      embedding_init=nn.initializers.normal(0.01),
      name="position_embedding",
    )
    return tokens(ids) + positions(jnp.arange(ids.shape[1]))


class CLIPTextTower(nn.Module):
  """Attributes: config (see `CLIPTextConfig`); dtype of the computation."""

  config: CLIPTextConfig
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Encodes token ids `[B, L]` int32; see `CLIPTextEncoder`.

    Returns:
      `[B, L, D]` float32 twice: the states before the last layer, without a norm, and those after
      it and the final layer norm.
    """
    x = _Embeddings(self.config, name="embeddings")(ids).astype(self.dtype)
    causal = jnp.tril(jnp.ones((ids.shape[1], ids.shape[1]), bool))
    before, x = clip_layers.Encoder(self.config, self.dtype, name="encoder")(x, causal)
    eps = self.config.layer_norm_eps
    x = nn.LayerNorm(eps, dtype=jnp.float32, name="final_layer_norm")(x)
    return before.astype(jnp.float32), x


class CLIPTextEncoder(nn.Module):
  """Attributes: config (see `CLIPTextConfig`); dtype of the computation."""

  config: CLIPTextConfig
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    self.text_model = CLIPTextTower(self.config, self.dtype)

  def __call__(self, ids: jax.Array) -> jax.Array:
    """Encodes token ids.

    Args:
      ids: `[B, L]` int32 in [0, vocab_size), L at most `max_position_embeddings`. A token attends
        to itself and those before it; padding needs no mask, as in Stable Diffusion.

    Returns:
      `[B, L, hidden_size]` float32: the last layer's states after the final layer norm.
    """
    return self.text_model(ids)[1]

  def before_last(self, ids: jax.Array) -> jax.Array:
    """Encodes like `__call__`, to the states before the last layer, without a norm."""
    return self.text_model(ids)[0]

  def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The smallest valid inputs of `__call__`."""
    return (jax.ShapeDtypeStruct((1, 1), jnp.int32),)


class CLIPTextEncoderWithProjection(nn.Module):
  """The second text encoder of SDXL.

  Attributes: config (see `CLIPTextConfig`); dtype of the computation; the final layer norm and the
  projection are float32.
  """

  config: CLIPTextConfig
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    self.text_model = CLIPTextTower(self.config, self.dtype)
    self.text_projection = nn.Dense(self.config.projection_dim, use_bias=False)

  def __call__(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Encodes token ids `[B, L]` int32; see `CLIPTextEncoder`.

    Returns:
      `[B, L, hidden_size]`: the states before the last layer, without a norm;
      `[B, projection_dim]`: the projection of each text's end. Both float32.
    """
    before, states = self.text_model(ids)
    return before, self.text_projection(pool_end(states, ids, end_token(self.config)))

  def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The smallest valid inputs of `__call__`."""
    return (jax.ShapeDtypeStruct((1, 1), jnp.int32),)


def end_token(config: CLIPTextConfig) -> int | None:
  """The id for `pool_end`."""
  return None if config.eos_token_id == _WRONG_EOS else config.eos_token_id


def pool_end(states: jax.Array, ids: jax.Array, eos_token_id: int | None) -> jax.Array:
  """The states at each text's end token, which has seen the whole text.

  Args:
    states: `[B, L, D]`.
    ids: `[B, L]` int32.
    eos_token_id: the end token, whose first place counts; `None`: the highest id of each text.

  Returns:
    `[B, D]`. A text without the end token gives its first state, as in transformers.
  """
  marks = ids if eos_token_id is None else ids == eos_token_id
  ends = jnp.argmax(marks, axis=1)
  return jnp.take_along_axis(states, ends[:, None, None], axis=1)[:, 0]


class CLIPModel(nn.Module):
  """Both towers and what makes their outputs comparable.

  Attributes:
    config: see `CLIPConfig`.
    dtype: type that the towers compute in; their last layer norms and the projections are float32.
    pre_norm: name of the image tower's first layer norm, see `clip_vision.CLIPVisionTower`.
    end_is_highest: the end of a text is its highest token id, whatever the config says (OWL-ViT).
  """

  config: CLIPConfig
  dtype: jnp.dtype = jnp.float32
  pre_norm: str = "pre_layrnorm"
  end_is_highest: bool = False

  def setup(self):
    c = self.config
    self.vision_model = clip_vision.CLIPVisionTower(c.vision_config, self.dtype, self.pre_norm)
    self.text_model = CLIPTextTower(c.text_config, self.dtype)
    self.visual_projection = nn.Dense(c.projection_dim, use_bias=False)
    self.text_projection = nn.Dense(c.projection_dim, use_bias=False)
    self.logit_scale = self.param(
      "logit_scale", nn.initializers.constant(c.logit_scale_init_value), ()
    )

  def __call__(self, pixels: jax.Array, ids: jax.Array) -> jax.Array:
    """exp(logit_scale) times the cosines of images and texts; arguments as below.

    Returns:
      `[images, texts]` float32.
    """
    image, text = self.image_features(pixels), self.text_features(ids)
    image, text = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (image, text))
    return jnp.exp(self.logit_scale) * image @ text.T

  def image_features(self, pixels: jax.Array) -> jax.Array:
    """Images to features.

    Args:
      pixels: `[B, S, S, 3]` float, S the config's `image_size`, normalised with CLIP's mean and
        deviation.

    Returns:
      `[B, F]` float32, not normalised.
    """
    return self.visual_projection(self.vision_model(pixels))

  def image_tokens(self, pixels: jax.Array) -> jax.Array:
    """`[B, S, S, 3]` -> `[B, 1 + N, D]` float32: class token and patches before the projection."""
    return self.vision_model(pixels, all_tokens=True)

  def text_features(self, ids: jax.Array) -> jax.Array:
    """Texts to features.

    Args:
      ids: `[B, L]` int32, L at most `max_position_embeddings`; what follows the end token has no
        influence.

    Returns:
      `[B, F]` float32, not normalised.
    """
    end = None if self.end_is_highest else end_token(self.config.text_config)
    return self.text_projection(pool_end(self.text_model(ids)[1], ids, end))

  def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The smallest valid inputs of `__call__`."""
    return (self.config.vision_config.pixels, jax.ShapeDtypeStruct((1, 1), jnp.int32))
