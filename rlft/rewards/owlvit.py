"""How sure an open-vocabulary detector is of the objects that a prompt names: OWL-ViT and OWLv2.

The paper's compositionality reward (arXiv 2401.12244): the mean, over the named objects, of the
detector's confidence in each. These detectors take the place of the paper's UniDet. An object's
confidence is the highest of all patches: that needs no non-maximum suppression, and has a gradient.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlft.models import owlvit as owlvit_model
from rlft.models import tokens
from rlft.models.files import sources, torch_layout, vocabulary
from rlft.rewards import named, preprocess
from rlft.types import JaxReward, UserError

# How the detectors' authors turn an object's name into a query.
TEMPLATE = "a photo of a {}"
# Queries for an image, named or not, as every batch must have the same shape.
MAX_OBJECTS = 4


def owlvit(
  weights: str,
  tokenizer: str | None = None,
  template: str = TEMPLATE,
  max_objects: int = MAX_OBJECTS,
  dtype: Literal["float32", "bfloat16"] = "float32",
) -> JaxReward:
  """'owlvit': mean confidence of OWL-ViT in the objects of `metadata['objects']`, in [0, 1].

  Args:
    weights: a directory, file or hub id as for `open_weights`, in the format of transformers, with
      config.json; e.g. google/owlvit-base-patch32 at a revision.
    tokenizer: directory or hub id of a CLIP tokenizer; default: that of `weights`.
    template: the query; {} stands for the object's name.
    max_objects: the most objects that a prompt may name.
    dtype: type that the towers compute in.

  Raises:
    UserError: the files are not those of OWL-ViT.
  """
  return _from_files("owlvit", weights, tokenizer, template, max_objects, dtype)


def owlv2(
  weights: str,
  tokenizer: str | None = None,
  template: str = TEMPLATE,
  max_objects: int = MAX_OBJECTS,
  dtype: Literal["float32", "bfloat16"] = "float32",
) -> JaxReward:
  """'owlv2': mean confidence of OWLv2; like `owlvit`, e.g. google/owlv2-base-patch16-ensemble."""
  return _from_files("owlv2", weights, tokenizer, template, max_objects, dtype)


def _from_files(
  name: str, weights: str, tokenizer: str | None, template: str, max_objects: int, dtype: str
) -> JaxReward:
  module, params, words = open_detector(weights, tokenizer, dtype, kind=name)
  return detector_reward(name, module, params, words, template=template, max_objects=max_objects)


def open_detector(
  weights: str, tokenizer: str | None, dtype: str, *, kind: str = ""
) -> tuple[owlvit_model.OwlViT, Any, tokens.Tokenizer]:
  """A detector from files, its parameters and its tokenizer; see `owlvit`.

  Args:
    weights, tokenizer, dtype: see there.
    kind: 'owlvit' or 'owlv2', if only one will do.

  Raises:
    UserError: the files are not those of such a detector.
  """
  config = owlvit_model.OwlViTConfig.from_dict(sources.read_config(weights), what=weights)
  if kind not in ("", config.model_type):
    raise UserError(f"{weights} is of {config.model_type}: use the reward {config.model_type!r}")
  module = owlvit_model.OwlViT(config, jnp.dtype(dtype))
  params = torch_layout.from_torch(module, sources.open_weights(weights), what=weights)
  return module, params, vocabulary.open_clip(tokenizer or weights, config.text_config)


def detector_reward(
  name: str,
  module: owlvit_model.OwlViT,
  params: Any,
  tokenizer: tokens.Tokenizer,
  *,
  template: str = TEMPLATE,
  max_objects: int = MAX_OBJECTS,
) -> JaxReward:
  """The reward of any detector of this kind, whatever its size.

  Args:
    name: of the reward.
    module: the network; its kind and its image size say how images are prepared.
    params: its parameters.
    tokenizer: its CLIP tokenizer.
    template, max_objects: see `owlvit`.

  Returns:
    a reward whose score is in [0, 1]; NaN where a prompt names no object.

  Raises:
    UserError: a template without {}, or `max_objects` below 1.
  """
  if "{}" not in template:
    raise UserError(f"template={template!r} has no place for the object: write {{}} where it goes")
  if max_objects < 1:
    raise UserError(f"max_objects={max_objects} must be at least 1")

  def prepare(prompts, metadata):
    texts = queries(prompts, metadata, template=template, max_objects=max_objects)
    return query_ids(tokenizer, texts, max_objects=max_objects)

  def score(params, images, ids):
    return score_images(module, params, images, ids)

  return JaxReward(name, score, prepare=prepare, params=params, needs=("objects",))


def queries(
  prompts: Sequence[str],
  metadata: Sequence[Mapping[str, Any]],
  *,
  template: str = TEMPLATE,
  max_objects: int = MAX_OBJECTS,
) -> list[list[str]]:
  """The query texts of each prompt, one for each of `metadata['objects']`.

  Raises:
    UserError: a prompt names more than `max_objects`.
  """
  texts = []
  for prompt, known in zip(prompts, metadata, strict=True):
    names = named.names(known, "objects")
    if len(names) > max_objects:
      raise UserError(
        f"the prompt {prompt!r} names {len(names)} objects: name at most {max_objects}, or raise"
        " the reward's max_objects"
      )
    texts.append([template.replace("{}", name) for name in names])
  return texts


def query_ids(
  tokenizer: tokens.Tokenizer, texts: Sequence[Sequence[str]], *, max_objects: int
) -> np.ndarray:
  """Token ids of the queries.

  Args:
    tokenizer: a CLIP tokenizer, of L tokens; longer texts are cut, the end token stays.
    texts: for each of B prompts, at most `max_objects` texts.
    max_objects: Q.

  Returns:
    `[B, Q, L]` int32; 0 after a text's end token and wherever there is no text.
  """
  ids = np.zeros((len(texts), max_objects, tokenizer.length), np.int32)
  for row, group in zip(ids, texts, strict=True):
    row[: len(group)] = tokenizer(group, pad_id=0)[0]
  return ids


def score_images(
  module: owlvit_model.OwlViT, params: Any, images: jax.Array, ids: jax.Array
) -> jax.Array:
  """Mean confidence in what the queries name; pure, and differentiable in `images`.

  Args:
    module, params: the detector.
    images: `[B, H, W, 3]` float32 in [0, 1], any size.
    ids: `[B, Q, L]` from `query_ids`.

  Returns:
    `[B]` float32 in [0, 1]; NaN where there are no queries.
  """
  found = module.apply({"params": params}, pixels(module.config, images), ids)
  return named.mean(confidence(found.logits), ids[..., 0] > 0)


def pixels(config: owlvit_model.OwlViTConfig, images: jax.Array) -> jax.Array:
  """Images `[B, H, W, 3]` in [0, 1] as the detector takes them: `[B, S, S, 3]`, normalised."""
  fit = preprocess.owlv2 if config.model_type == "owlv2" else preprocess.square
  return preprocess.clip_normalise(fit(images, config.vision_config.image_size))


def confidence(logits: jax.Array) -> jax.Array:
  """Highest sigmoid(logit) of all patches: `[B, N, Q]` -> `[B, Q]` in [0, 1]; 0 for padding."""
  # The highest logit has the highest sigmoid; its gradient goes to that patch alone.
  return jax.nn.sigmoid(jnp.max(logits, axis=1))
