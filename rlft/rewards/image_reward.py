"""ImageReward: how much people would like an image for its prompt (arXiv 2304.05977)."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlft.models import image_reward as image_reward_model
from rlft.models import tokens
from rlft.models.files import sources, torch_layout, vocabulary
from rlft.rewards import preprocess
from rlft.types import JaxReward, UserError

# What a directory or a repository may call the weights, best first.
_NAMES = ("ImageReward.safetensors", "ImageReward.pt", *sources.WEIGHTS)
# [DEC] and [ENC], which BLIP adds to BERT's vocabulary; no vocabulary file has them, no score
# needs them, and the embeddings have rows for them.
_ADDED_TOKENS = 2


def image_reward(
  weights: str,
  tokenizer: str | None = None,
  dtype: Literal["float32", "bfloat16"] = "float32",
) -> JaxReward:
  """'image-reward': the published model's score, or that of a smaller one of this kind.

  About N(0, 1) over the pictures that the published model was trained on; higher is better. The
  score has a gradient with respect to the images.

  Args:
    weights: file, directory or hub id as for `open_weights`; ImageReward.pt is
      THUDM/ImageReward@<revision>/ImageReward.pt. If a config.json beside it describes a model
      (see `ImageRewardConfig.from_dict`), that is what is built.
    tokenizer: vocab.txt or tokenizer.json of bert-base-uncased, or a directory or hub id that has
      one; default: the one beside the weights.
    dtype: type that the encoders compute in; the head computes in float32.

  Raises:
    UserError: a file is missing, damaged, or of another model.
  """
  return load("image-reward", weights, tokenizer, dtype=dtype)


def load(
  name: str, weights: str, tokenizer: str | None = None, *, dtype: str = "float32"
) -> JaxReward:
  """A reward called `name` from the files of any model of this kind; see `image_reward`."""
  config = _config(weights)
  module = image_reward_model.ImageReward(config, jnp.dtype(dtype))
  words = open_tokenizer(tokenizer or weights, config)
  state = sources.open_weights(weights, names=_NAMES)
  params = torch_layout.from_torch(
    module, state, what=str(weights), ignore=image_reward_model.IGNORED
  )
  return preference_reward(name, module, params, words)


def preference_reward(
  name: str,
  module: image_reward_model.ImageReward,
  params: Any,
  tokenizer: tokens.Tokenizer,
) -> JaxReward:
  """The reward of any network of this kind, whatever its size.

  Args:
    name: of the reward.
    module: the network.
    params: its parameters.
    tokenizer: from `open_tokenizer`.
  """

  def prepare(prompts, metadata):
    del metadata
    return tokenize(tokenizer, prompts)

  def score(params, images, features):
    return score_images(module, params, images, features)

  return JaxReward(name, score, prepare=prepare, params=params)


def score_images(
  module: image_reward_model.ImageReward,
  params: Any,
  images: jax.Array,
  features: Mapping[str, jax.Array],
) -> jax.Array:
  """Scores images as the original does: short side resized (bicubic), centre cropped, normalised.

  Args:
    module: the network.
    params: its parameters.
    images: `[B, H, W, 3]` float32 in [0, 1], of any height and width.
    features: from `tokenize`, of B prompts, or of P prompts with B/P images each, in their order.

  Returns:
    `[B]` float32; NaN for an image with a pixel that is not finite.
  """
  size = module.config.vision.image_size
  pixels = preprocess.clip_normalise(preprocess.short_side_crop(images, size, centre="round"))
  return module.apply({"params": params}, pixels, features["ids"], features["mask"])


def tokenize(tokenizer: tokens.Tokenizer, texts: Sequence[str]) -> dict[str, np.ndarray]:
  """[CLS], the words, [SEP], padding.

  Args:
    tokenizer: from `open_tokenizer`, of L tokens.
    texts: P texts; words beyond that are cut off, [SEP] is not.

  Returns:
    'ids': `[P, L]` int32, and 'mask': `[P, L]` int32, 1 for tokens and 0 for padding.
  """
  ids, sizes = tokenizer(texts)
  return {"ids": ids, "mask": (np.arange(ids.shape[1]) < sizes[:, None]).astype(np.int32)}


def open_tokenizer(source: str, config: image_reward_model.ImageRewardConfig) -> tokens.Tokenizer:
  """BERT's tokenizer (lower case, word pieces) with the vocabulary of `source`.

  Args:
    source: see `vocabulary.read_bert`.
    config: of the model that is to read the tokens.

  Raises:
    UserError: there is no vocabulary, or it is not the model's.
  """
  words, path = vocabulary.read_bert(source)
  if missing := [token for token in tokens.BERT_SPECIAL if token not in words]:
    raise UserError(f"{path} has no {missing[0]}; give a BERT vocabulary, one token a line")
  size = config.text.vocab_size
  if len(words) not in (size, size - _ADDED_TOKENS):
    raise UserError(
      f"{path} has {len(words)} tokens, but the model has {size}; give the vocabulary of the model,"
      " for ImageReward that of bert-base-uncased (30522 tokens)"
    )
  return tokens.bert(words, length=config.text_length)


def _config(weights: str) -> image_reward_model.ImageRewardConfig:
  path = sources.find_file(weights, sources.CONFIG)
  data = sources.read_json(path) if path else {}
  # Anything else may lie beside the published weights: the config of the BERT of the vocabulary.
  if not {"vision", "text", "head_widths"} & data.keys():
    data = {}
  return image_reward_model.ImageRewardConfig.from_dict(data, what=str(path))
