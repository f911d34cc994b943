"""'geneval-owl': whether an image shows what a prompt of GenEval asks for, as OWLv2 sees it.

GenEval (arXiv 2310.11513) checks by a detector which objects are there, how many, of which colour
and how they lie. Its rules are followed; its detector (Mask2Former, of COCO's classes) and its
judge of colours (CLIP on what is cut out) are not: OWLv2 is asked for both. The threshold is not
tuned against people. So figures compare models with each other, not with published ones.

A prompt says in its metadata, as GenEval's evaluation_metadata.jsonl has it,
    include  what must be there: {"class": ..., "count": n}, with "color", and with "position", the
             relation to another entry by its place: ["left of", 0]
    exclude  what must not be: {"class": ..., "count": n}, fewer than n of which are allowed
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlft.models import owlvit as owlvit_model
from rlft.models import tokens
from rlft.rewards import owlvit
from rlft.types import JaxReward, UserError

COLOURS = (
  "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"
)  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD = 0.3

_CLASSES = 2  # that a prompt may name
_CLAUSES = 2  # of each kind, that a prompt may have
_CANDIDATES = 128  # patches of a class that are looked at
_OVERLAP = 0.5  # from which on two boxes are of one object
_NEAR = 0.1  # share of the sizes that an offset must exceed
_SLANT = 0.5  # of the offset's direction, from which on it is one of the four
_ABSENT = -1


def geneval_owl(
  weights: str,
  tokenizer: str | None = None,
  threshold: float = THRESHOLD,
  dtype: Literal["float32", "bfloat16"] = "float32",
) -> JaxReward:
  """'geneval-owl': 1 where all is as the prompt says, else 0.

  Args:
    weights: OWLv2 or OWL-ViT, as for `owlvit.owlv2`.
    tokenizer: as for `owlvit.owlv2`.
    threshold: confidence from which on an object counts.
    dtype: type that the towers compute in.

  Raises:
    UserError: the files are not those of such a detector, or the threshold is not in (0, 1).
  """
  if not 0 < threshold < 1:
    raise UserError(f"geneval-owl: threshold={threshold} must be between 0 and 1")
  return detector_reward(*owlvit.open_detector(weights, tokenizer, dtype), threshold=threshold)


def detector_reward(
  module: owlvit_model.OwlViT, params: Any, tokenizer: tokens.Tokenizer, *, threshold: float
) -> JaxReward:
  """The reward of any detector of this kind, whatever its size."""

  def prepare(prompts, metadata):
    return features(tokenizer, prompts, metadata)

  def score(params, images, asked):
    found = module.apply({"params": params}, owlvit.pixels(module.config, images), asked["ids"])
    confidence = jax.nn.sigmoid(found.logits)
    asked = {key: value for key, value in asked.items() if key != "ids"}
    judge = jax.vmap(lambda *given: correct(*given, threshold=threshold))
    return judge(confidence, found.boxes, asked)

  return JaxReward(
    "geneval-owl", score, prepare=prepare, params=params, needs=("include", "exclude")
  )


def features(
  tokenizer: tokens.Tokenizer, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> dict[str, np.ndarray]:
  """What the detector is asked, and what must be true.

  Args:
    tokenizer: a CLIP tokenizer, of L tokens.
    prompts: B.
    metadata: see the head of this file.

  Returns:
    `ids` `[B, Q, L]`, queries: the classes, then each class in each colour; 0 where there is none.
    Of the clauses, `[B, 2]` int32 each: `class`, `count` (0 where there is no clause), `colour`,
    `relation`, `target` (-1: not asked), and `excluded_class`, `excluded_count`.

  Raises:
    UserError: metadata that cannot be read.
  """
  names = ("class", "count", "colour", "relation", "target", "excluded_class", "excluded_count")
  rows = {name: np.full((len(prompts), _CLAUSES), _ABSENT, np.int32) for name in names}
  for name in ("class", "count", "excluded_class", "excluded_count"):
    rows[name][:] = 0
  texts = []
  for row, (prompt, known) in enumerate(zip(prompts, metadata, strict=True)):
    try:
      texts.append(_read(known, {name: array[row] for name, array in rows.items()}))
    except (KeyError, TypeError, ValueError, IndexError) as error:
      raise UserError(
        f"the prompt {prompt!r} does not say in its metadata what must be there ({error!r}): give"
        " GenEval's evaluation_metadata.jsonl, or prompts with 'include' as it has it"
      ) from error
  queries = _CLASSES * (1 + len(COLOURS))
  return {"ids": owlvit.query_ids(tokenizer, texts, max_objects=queries), **rows}


def _read(known: Mapping[str, Any], row: Mapping[str, np.ndarray]) -> list[str]:
  """Fills a row of each array from a prompt's metadata; its queries."""
  include, exclude = (list(known.get(key) or ()) for key in ("include", "exclude"))
  if not include or max(len(include), len(exclude)) > _CLAUSES:
    raise ValueError(f"{len(include)} entries of 'include', {len(exclude)} of 'exclude'")
  classes = list(dict.fromkeys(clause["class"] for clause in [*include, *exclude]))
  if len(classes) > _CLASSES:
    raise ValueError(f"{len(classes)} classes")
  for place, clause in enumerate(include):
    row["class"][place] = classes.index(clause["class"])
    row["count"][place] = int(clause["count"])
    if colour := clause.get("color"):
      row["colour"][place] = COLOURS.index(colour)
    if position := clause.get("position"):
      relation, target = position
      if not 0 <= target < place:
        raise ValueError(f"position {position}")
      row["relation"][place], row["target"][place] = RELATIONS.index(relation), target
  for place, clause in enumerate(exclude):
    row["excluded_class"][place] = classes.index(clause["class"])
    row["excluded_count"][place] = int(clause["count"])
  names = classes + [classes[-1]] * (_CLASSES - len(classes))
  coloured = any("color" in clause for clause in include)
  texts = [owlvit.TEMPLATE.replace("{}", name) for name in names]
  if coloured:
    texts += [owlvit.TEMPLATE.replace("{}", f"{c} {name}") for name in names for c in COLOURS]
  return texts


def correct(
  confidence: jax.Array, boxes: jax.Array, asked: Mapping[str, jax.Array], *, threshold: float
) -> jax.Array:
  """Whether one image is as asked; pure.

  Args:
    confidence: `[N, Q]` in [0, 1] of N patches in the queries of `features`.
    boxes: `[N, 4]`: centre x, centre y, width, height.
    asked: the clauses, `[2]` each, see `features`.
    threshold: confidence from which on an object counts.

  Returns:
    1 or 0, float32.
  """
  objects = [_objects(confidence[:, place], boxes, threshold) for place in range(_CLASSES)]
  # By class: [2, K] each.
  patches, present = (jnp.stack(parts) for parts in zip(*objects, strict=True))
  colours = confidence[:, _CLASSES:].reshape(len(confidence), _CLASSES, len(COLOURS))
  right, chosen, places = jnp.array(True), [], []
  for clause in range(_CLAUSES):
    kind, count = asked["class"][clause], asked["count"][clause]
    there, patch = present[kind], patches[kind]
    # The most confident ones, as many as are asked for.
    taken = there & (jnp.cumsum(there) <= count)
    right &= there.sum() >= count
    colour = asked["colour"][clause]
    seen = jnp.argmax(colours[patch, kind], axis=-1)
    right &= (colour == _ABSENT) | jnp.all(~taken | (seen == colour))
    chosen, places = [*chosen, taken], [*places, boxes[patch]]
    for target in range(clause):
      pairs = taken[:, None] & chosen[target]
      holds = _related(places[clause], places[target])[asked["relation"][clause]]
      right &= (asked["target"][clause] != target) | jnp.all(~pairs | holds)
    limit = asked["excluded_count"][clause]
    right &= (limit == 0) | (present[asked["excluded_class"][clause]].sum() < limit)
  return right.astype(jnp.float32)


def _objects(
  confidence: jax.Array, boxes: jax.Array, threshold: float
) -> tuple[jax.Array, jax.Array]:
  """Patches of a class by falling confidence `[K]`, and which of them are objects of their own."""
  values, patches = jax.lax.top_k(confidence, min(_CANDIDATES, len(confidence)))
  overlaps = _overlap(boxes[patches]) >= _OVERLAP
  order = jnp.arange(len(patches))

  def keep(place, kept):
    hidden = jnp.any(kept & overlaps[place] & (order < place))
    return kept.at[place].set(kept[place] & ~hidden)

  return patches, jax.lax.fori_loop(0, len(patches), keep, values > threshold)


def _overlap(boxes: jax.Array) -> jax.Array:
  """Intersection over union of all pairs: `[K, 4]` -> `[K, K]`."""
  low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
  sides = jnp.minimum(high[:, None], high) - jnp.maximum(low[:, None], low)
  shared = jnp.prod(jnp.maximum(sides, 0), axis=-1)
  areas = jnp.prod(boxes[:, 2:], axis=-1)
  return shared / jnp.maximum(areas[:, None] + areas - shared, 1e-9)


def _related(first: jax.Array, second: jax.Array) -> jax.Array:
  """How boxes `[K, 4]` lie to others `[M, 4]`: `[4, K, M]` bool, in the order of `RELATIONS`."""
  offset = first[:, None, :2] - second[:, :2]
  near = _NEAR * (first[:, None, 2:] + second[:, 2:])
  beyond = jnp.maximum(jnp.abs(offset) - near, 0) * jnp.sign(offset)
  x, y = jnp.moveaxis(
    beyond / jnp.maximum(jnp.linalg.norm(offset, axis=-1), 1e-9)[..., None], -1, 0
  )
  return jnp.stack([x < -_SLANT, x > _SLANT, y < -_SLANT, y > _SLANT])
