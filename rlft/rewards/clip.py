"""How well an image fits its prompt, by CLIP (https://arxiv.org/abs/2103.00020) and its fine-tunes.

Every score is made of the cosine of an image's and a text's features:

    clip-score  cos                        (or 2.5 max(cos, 0), https://arxiv.org/abs/2104.08718)
    pickscore   exp(logit_scale) cos       (https://arxiv.org/abs/2305.01569)
    hpsv2       cos                        (https://arxiv.org/abs/2306.09341)

They differ in the weights and in how an image becomes a square.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rlft.models import clip, tokens
from rlft.models.files import clip_weights, vocabulary
from rlft.rewards import preprocess
from rlft.types import JaxReward, UserError

Dtype = Literal["float32", "bfloat16"]
# From images [B, H, W, 3] in [0, 1] and a size S to [B, S, S, 3].
Fit = Callable[[jax.Array, int], jax.Array]

# Of the cosine in CLIPScore (Hessel et al.), which also puts a beginning before each prompt.
HESSEL_FACTOR = 2.5
HESSEL_PREFIX = "A photo depicts "

_HPS_FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}


def clip_score(
  weights: str,
  tokenizer: str | None = None,
  formula: Literal["cosine", "hessel"] = "cosine",
  dtype: Dtype = "float32",
) -> JaxReward:
  """'clip-score': the cosine of image and prompt by any CLIP model, in [-1, 1].

  Images are resized on the short side and cropped, as in torchvision.

  Args:
    weights: a CLIP model as for `clip_weights.load`, e.g. openai/clip-vit-large-patch14 at a
      revision.
    tokenizer: directory or hub id of a CLIP tokenizer; default: that of `weights`.
    formula: 'hessel' gives 2.5 max(cos, 0), in [0, 2.5], of 'A photo depicts ' and the prompt; its
      paper uses ViT-B/32.
    dtype: type that the towers compute in.

  Raises:
    UserError: the files are missing, or not those of a CLIP model.
  """
  module, params = clip_weights.load(weights, dtype=jnp.dtype(dtype))
  words = vocabulary.open_clip(tokenizer or weights, module.config.text_config)
  prefix, finish = (HESSEL_PREFIX, hessel) if formula == "hessel" else ("", plain)
  return clip_reward(
    "clip-score",
    module,
    params,
    words,
    fit=torchvision_crop,
    finish=finish,
    prefix=prefix,
    pad_token_id=0,
  )


def pickscore(
  weights: str, tokenizer: str | None = None, divisor: float = 1.0, dtype: Dtype = "float32"
) -> JaxReward:
  """'pickscore': exp(logit_scale) times the cosine of image and prompt, about 15 to 25.

  Images are resized on the short side and cropped, as in transformers.

  Args:
    weights: as for `clip_score`; yuvalkirstain/PickScore_v1 at a revision.
    tokenizer: as for `clip_score`; laion/CLIP-ViT-H-14-laion2B-s32B-b79K at a revision.
    divisor: of the score; 26 in flow_grpo, which brings it near [0, 1].
    dtype: type that the towers compute in.

  Raises:
    UserError: as `clip_score`.
  """
  module, params = clip_weights.load(weights, dtype=jnp.dtype(dtype))
  words = vocabulary.open_clip(tokenizer or weights, module.config.text_config)

  if divisor == 0:
    raise UserError("pickscore: divisor=0 gives no score: leave it out, or write 26")

  def finish(cosine, params):
    return jnp.exp(params["logit_scale"]) / divisor * cosine

  return clip_reward(
    "pickscore", module, params, words, fit=preprocess.short_side_crop, finish=finish
  )


def hpsv2(
  weights: str,
  tokenizer: str,
  version: Literal["2.0", "2.1"] = "2.1",
  dtype: Dtype = "float32",
) -> JaxReward:
  """'hpsv2': the cosine of image and prompt by HPSv2, in [-1, 1]; about 0.2 to 0.35.

  The scores of the versions cannot be compared. Images are resized on the long side, with black
  around: nothing is cropped. Its logit scale is not used.

  Args:
    weights: HPS_v2_compressed.pt or HPS_v2.1_compressed.pt, or what has it: a directory, or
      xswu/HPSv2 at a revision. The network is open_clip's ViT-H-14, if no open_clip_config.json
      beside it says something else.
    tokenizer: as for `clip_score`; any original CLIP's.
    version: which of the two, if both are there.
    dtype: type that the towers compute in.

  Raises:
    UserError: as `clip_score`, or the file is of the other version.
  """
  for other, name in _HPS_FILES.items():
    if other != version and weights.endswith(name):
      raise UserError(f"{weights} is of version {other}: write version={other}")
  module, params = clip_weights.load(
    weights,
    dtype=jnp.dtype(dtype),
    names=(_HPS_FILES[version],),
    default=clip_weights.VIT_H_14,
  )
  words = vocabulary.open_clip(tokenizer, module.config.text_config)
  return clip_reward(
    "hpsv2", module, params, words, fit=preprocess.long_side_pad, finish=plain, pad_token_id=0
  )


def plain(cosine: jax.Array, params: Any) -> jax.Array:
  """The cosine itself; `[B]` -> `[B]`."""
  del params
  return cosine


def hessel(cosine: jax.Array, params: Any) -> jax.Array:
  """2.5 max(cos, 0), equation 1 of https://arxiv.org/abs/2104.08718; `[B]` -> `[B]`."""
  del params
  return HESSEL_FACTOR * jnp.maximum(cosine, 0.0)


def clip_reward(
  name: str,
  module: clip.CLIPModel,
  params: Any,
  tokenizer: tokens.Tokenizer,
  *,
  fit: Fit,
  finish: Callable[[jax.Array, Any], jax.Array],
  prefix: str = "",
  pad_token_id: int | None = None,
) -> JaxReward:
  """A reward from the cosine of image and prompt, with any CLIP model.

  Args:
    name: of the reward.
    module: the network.
    params: its parameters.
    tokenizer: of the network's vocabulary.
    fit: how images become squares.
    finish: `(cosine [B], params) -> score [B]`.
    prefix: put before each prompt.
    pad_token_id: what follows a text's end token, if not the tokenizer's padding: 0 in OpenAI's
      CLIP and open_clip. It has no influence on the features.

  Raises:
    UserError: the tokenizer is of another model.
  """
  check_tokenizer(tokenizer, module.config.text_config)

  def prepare(prompts, metadata):
    del metadata
    return tokenizer([prefix + prompt for prompt in prompts], pad_id=pad_token_id)[0]

  def score(params, images, ids):
    image = image_features(module, params, images, fit)
    text = unit(module.apply({"params": params}, ids, method="text_features"))
    return finish(jnp.sum(image * text, axis=-1), params)

  return JaxReward(name, score, prepare=prepare, params=params)


def image_embedder(
  weights: str, dtype: Dtype = "float32"
) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
  """The image tower of a CLIP model as a function.

  Args:
    weights: as for `clip_score`.
    dtype: type that the tower computes in.

  Returns:
    `embed`, a pure function `(params, images [B, H, W, 3] in [0, 1]) -> features [B, F]` of unit
    norm in float32, and its parameters.

  Raises:
    UserError: as `clip_score`.
  """
  module, params = clip_weights.load(weights, dtype=jnp.dtype(dtype))
  params = {name: tree for name, tree in params.items() if not name.startswith("text_")}

  def embed(params, images):
    return image_features(module, params, images, torchvision_crop)

  return embed, params


def image_features(module: clip.CLIPModel, params: Any, images: jax.Array, fit: Fit) -> jax.Array:
  """Features of unit norm: images `[B, H, W, 3]` in [0, 1] -> `[B, F]` float32."""
  config = module.config
  fitted = fit(images, config.vision_config.image_size)
  pixels = preprocess.normalise(fitted, config.image_mean, config.image_std)
  return unit(module.apply({"params": params}, pixels, method="image_features"))


def unit(features: jax.Array) -> jax.Array:
  """`[..., F]` -> the same, divided by the Euclidean norm over F."""
  return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def torchvision_crop(images: jax.Array, size: int) -> jax.Array:
  """Short side to `size` and the centre, with torchvision's rounding: `[B, size, size, 3]`."""
  return preprocess.short_side_crop(images, size, centre="round")


def check_tokenizer(tokenizer: tokens.Tokenizer, config: clip.CLIPTextConfig) -> None:
  """Raises `UserError` if the tokenizer's ids are not those of the text tower."""
  size, end = len(tokenizer), tokenizer.end_id
  # 2 in a config stands for the highest id.
  ends = (size - 1,) if config.eos_token_id in (None, 2) else (config.eos_token_id,)
  if size > config.vocab_size or end not in ends:
    raise UserError(
      f"the tokenizer has {size} tokens and ends a text with {end}, but the text tower takes "
      f"{config.vocab_size} and expects {ends[0]}: give the tokenizer of the same model"
    )
