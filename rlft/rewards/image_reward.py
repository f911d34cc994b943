"""ImageReward: how much people would like an image for its prompt (arXiv 2304.05977)."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from rlft.models import image_reward as image_reward_model
from rlft.models.files import sources, torch_layout
from rlft.rewards import preprocess
from rlft.types import JaxReward, UserError

# What a directory or a repository may call the weights, best first.
_NAMES = ("ImageReward.safetensors", "ImageReward.pt", *sources.WEIGHTS)
_VOCABULARY = "vocab.txt"
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
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
    tokenizer: vocab.txt of bert-base-uncased, or a directory or hub id that has one; default: the
      one beside the weights.
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
  words = open_vocabulary(tokenizer or weights, vocab_size=config.text.vocab_size)
  state = sources.open_weights(weights, names=_NAMES)
  params = torch_layout.from_torch(
    module, state, what=str(weights), ignore=image_reward_model.IGNORED
  )
  return preference_reward(name, module, params, words)


def preference_reward(
  name: str,
  module: image_reward_model.ImageReward,
  params: Any,
  tokenizer: transformers.BertTokenizer,
) -> JaxReward:
  """The reward of any network of this kind, whatever its size.

  Args:
    name: of the reward.
    module: the network.
    params: its parameters.
    tokenizer: from `open_vocabulary`.
  """

  def prepare(prompts, metadata):
    del metadata
    return tokenize(tokenizer, prompts, length=module.config.text_length)

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


def tokenize(
  tokenizer: transformers.BertTokenizer, texts: Sequence[str], *, length: int
) -> dict[str, np.ndarray]:
  """[CLS], the words, [SEP], padding.

  Args:
    tokenizer: from `open_vocabulary`.
    texts: P texts; words beyond `length` are cut off, [SEP] is not.
    length: L.

  Returns:
    'ids': `[P, L]` int32, and 'mask': `[P, L]` int32, 1 for tokens and 0 for padding.
  """
  found = tokenizer(
    list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="np"
  )
  return {
    "ids": found["input_ids"].astype(np.int32),
    "mask": found["attention_mask"].astype(np.int32),
  }


def open_vocabulary(source: str, *, vocab_size: int) -> transformers.BertTokenizer:
  """BERT's tokenizer (lower case, word pieces) with the vocabulary of `source`.

  Args:
    source: a vocab.txt, a directory or hub id with one, or a file of weights beside one.
    vocab_size: of the model that is to read the tokens.

  Raises:
    UserError: there is no vocabulary, or it is not the model's.
  """
  name = pathlib.PurePath(source).name
  path = sources.find_file(source, name if name.endswith(".txt") else _VOCABULARY)
  if path is None:
    raise UserError(
      f"{source}: there is no {_VOCABULARY} in it or beside it; give the one of the model, for "
      "ImageReward that of bert-base-uncased, as tokenizer=<path>"
    )
  try:
    # Not splitlines: a token may be a separator of lines in Unicode.
    tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{path} cannot be read ({error}); get it again") from error
  if missing := [token for token in _SPECIAL if token not in tokens]:
    raise UserError(f"{path} has no {missing[0]}; give a BERT vocabulary, one token a line")
  if len(tokens) not in (vocab_size, vocab_size - _ADDED_TOKENS):
    raise UserError(
      f"{path} has {len(tokens)} tokens, but the model has {vocab_size}; give the vocabulary of "
      "the model, for ImageReward that of bert-base-uncased (30522 tokens)"
    )
  return transformers.BertTokenizer(str(path), do_lower_case=True)


def _config(weights: str) -> image_reward_model.ImageRewardConfig:
  path = sources.find_file(weights, sources.CONFIG)
  data = sources.read_json(path) if path else {}
  # Anything else may lie beside the published weights: the config of the BERT of the vocabulary.
  if not {"vision", "text", "head_widths"} & data.keys():
    data = {}
  return image_reward_model.ImageRewardConfig.from_dict(data, what=str(path))
