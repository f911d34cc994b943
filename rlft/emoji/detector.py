"""'emoji-detector': OWL-ViT's architecture in small, which finds what a text names.

It stands in for the paper's object detector. `data/emoji-detector` holds a model of 0.65 M
parameters in the layout of transformers' `OwlViTForObjectDetection`; `launch/train_reward.py`
trains it from nothing on rendered scenes of the seen objects and of people.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy

from rlft.emoji import art, prompts, reward_training, scenes, world
from rlft.models import clip, owlvit
from rlft.models.files import sources, torch_layout, vocabulary
from rlft.models.files.pretrained import EMOJI_SD_PATH
from rlft.models.shapes import param_shapes
from rlft.rewards import preprocess
from rlft.storage import files

Params = Mapping[str, Any]

DIRECTORY = art.DATA_DIR / "emoji-detector"
REBUILD = "python launch/train_reward.py --flagfile=experiments/reward_detector.flags"
TOKENIZER = EMOJI_SD_PATH / "tokenizer"
TEMPLATE = "{}"  # the text of a query: the object's name
QUERY_LENGTH = 16

CONFIG = owlvit.OwlViTConfig(
  text_config=clip.CLIPTextConfig(
    vocab_size=942,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=QUERY_LENGTH,
    pad_token_id=0,
  ),
  vision_config=clip.CLIPVisionConfig(
    hidden_size=96,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=world.IMAGE_SIZE,
    patch_size=4,
    projection_dim=64,
  ),
  projection_dim=64,
)
_MODULE = owlvit.OwlViT(CONFIG)

# What the network is asked for in training: class k of the column is NAMES[k].
NAMES = (*prompts.SEEN_OBJECTS, "person")
_CLASSES = np.array([*(art.OBJECTS.index(n) for n in prompts.SEEN_OBJECTS), scenes.PERSON])
# A patch stands for a thing if it is in the middle of its box, of this share of the width.
_MIDDLE = 0.5
_BOX_WEIGHT = 2.0
_FOCUS = 2.0  # exponent of the focal loss
# Logits start near `scale * shift`: hardly any patch holds any one thing.
_FIRST_SCALE, _FIRST_SHIFT = 12.0, -0.4
_LEAST_CONFIDENCE = 0.02  # boxes below it, nearly all, add nothing to a precision that counts
_TRAINING, _HELD_OUT, _INIT = range(3)  # second word of each seed: the streams never meet


def load(directory: Path = DIRECTORY) -> Params:
  """The weights, float32 (stored as float16).

  Raises:
    UserError: the file is missing, damaged, or of another network.
  """
  path = Path(directory) / "model.safetensors"
  return torch_layout.from_torch(_MODULE, sources.open_weights(path), what=str(path))


def save(directory: Path, params: Params) -> None:
  """Writes `config.json` and `model.safetensors` (float16); raises `UserError` if that fails."""
  config = {"architectures": ["OwlViTForObjectDetection"], **dataclasses.asdict(CONFIG)}
  state = torch_layout.to_torch(params, np.float16)
  files.write_atomic(Path(directory) / "config.json", json.dumps(config, indent=2) + "\n")
  files.write_atomic(
    Path(directory) / "model.safetensors", safetensors.numpy.save(state, {"format": "pt"})
  )


def query_ids(names: Sequence[str]) -> np.ndarray:
  """`[Q, 16]` int32 tokens of the queries for `names`."""
  # Padded by end tokens, as in training of CLIP: what follows the first one is never looked at.
  tokenizer = vocabulary.open_clip(TOKENIZER, CONFIG.text_config)
  return tokenizer([TEMPLATE.format(name) for name in names])[0]


# ---------------------------------------------------------------------------- training


def recipe(config: reward_training.RewardConfig) -> reward_training.Recipe:
  """How `launch/train_reward.py` trains it: on rendered scenes, spoiled as generated ones are."""
  ids = query_ids(NAMES)

  def batch(step: int):
    rng = np.random.default_rng((config.seed, _TRAINING, step))
    drawn = scenes.scenes(rng, config.batch_size, wide=True, objects=prompts.SEEN_OBJECTS)
    return drawn, scenes.damage(rng, config.batch_size)

  return reward_training.Recipe(
    init=init,
    batch=batch,
    loss=lambda params, batch: loss(params, ids, *scenes.degrade(*batch)),
    measure=lambda params: measure(params, config.seed, config.held_out),
    save=save,
    load=load,
  )


def init(seed: int) -> Params:
  """Untrained weights, with class heads that expect nothing."""
  shapes = param_shapes(_MODULE)
  params = reward_training.initialise(shapes, np.random.default_rng((seed, _INIT)))
  head = params["class_head"]
  head["logit_scale"]["bias"][:] = _FIRST_SCALE - 1
  head["logit_shift"]["bias"][:] = _FIRST_SHIFT
  for name in ("logit_scale", "logit_shift"):
    head[name]["kernel"] *= 0.1
  return params


def loss(params: Params, ids: jax.Array, images: jax.Array, truth: scenes.Truth) -> jax.Array:
  """Focal loss of the named things in each patch, and distance and overlap of the boxes.

  The labels are soft (how much of a thing is to be seen), so the focal loss is that of
  arXiv 2006.04388. A thing's patches are those in the middle of its box; those in the rest of the
  box are not asked about it.

  Args:
    params: of the network.
    ids: `[Q, L]` of the queries for `NAMES`.
    images: `[B, 32, 32, 3]` float32 in [0, 1].
    truth: what is in them.
  """
  found = _MODULE.apply({"params": params}, preprocess.clip_normalise(images), ids)
  grid = CONFIG.vision_config.grid
  centres = (jnp.arange(grid) + 0.5) / grid
  y, x = (c.reshape(-1) for c in jnp.meshgrid(centres, centres, indexing="ij"))
  boxes = truth.boxes
  centre = (boxes[..., :2] + boxes[..., 2:]) / 2
  size = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 1e-3)
  # How far each patch is from each thing's middle, in half boxes: `[B, 4, N]`.
  far = jnp.maximum(
    jnp.abs(x - centre[..., :1]) / (size[..., :1] / 2),
    jnp.abs(y - centre[..., 1:]) / (size[..., 1:] / 2),
  )
  middle = (far <= _MIDDLE) | (far <= far.min(-1, keepdims=True))
  named = truth.classes[..., None] == _CLASSES  # [B, 4, Q]
  labels = truth.presence[..., None, None] * named[:, :, None] * middle[..., None]
  labels = labels.max(1)  # [B, N, Q]
  asked = ~jnp.any(named[:, :, None] & ((far <= 1) & ~middle)[..., None], axis=1) | (labels > 0)
  entropy = optax.sigmoid_binary_cross_entropy(found.logits, labels)
  focus = jnp.abs(jax.nn.sigmoid(found.logits) - labels) ** _FOCUS
  positives = jnp.maximum(labels.max(-1).sum(1), 1.0)  # of each picture
  classes = jnp.mean((entropy * focus * asked).sum((1, 2)) / positives)

  weight = truth.presence[..., None] * middle  # [B, 4, N]
  distance, overlap = _box_errors(found.boxes[:, None], boxes[:, :, None])
  total = (weight * (distance + overlap)).sum((1, 2)) / jnp.maximum(weight.sum((1, 2)), 1.0)
  return classes + _BOX_WEIGHT * jnp.mean(total)


def _box_errors(found: jax.Array, true: jax.Array) -> tuple[jax.Array, jax.Array]:
  """L1 distance, and 1 - generalised IoU (arXiv 1902.09630).

  Args:
    found: `[..., 4]` centre and size.
    true: `[..., 4]` edges.
  """
  edges = jnp.concatenate(
    [found[..., :2] - found[..., 2:] / 2, found[..., :2] + found[..., 2:] / 2], axis=-1
  )

  def area(low, high):
    sides = jnp.maximum(high - low, 0.0)
    return sides[..., 0] * sides[..., 1]

  low, high = edges[..., :2], edges[..., 2:]
  shared = area(jnp.maximum(low, true[..., :2]), jnp.minimum(high, true[..., 2:]))
  union = area(low, high) + area(true[..., :2], true[..., 2:]) - shared
  hull = area(jnp.minimum(low, true[..., :2]), jnp.maximum(high, true[..., 2:]))
  giou = shared / (union + 1e-6) - (hull - union) / (hull + 1e-6)
  return jnp.abs(edges - true).sum(-1), 1 - giou


# ---------------------------------------------------------------------------- measuring


def measure(params: Params, seed: int, n: int) -> reward_training.Figures:
  """Average precision at an overlap of 0.5 on `n` fresh scenes of each kind.

  Returns:
    For 'seen' (objects of training), 'spoiled' (the same, spoiled as in training), 'withheld'
    (objects that were never shown) and 'noto' (seen objects in another art style): 'ap50', the
    mean over objects of the area under the precision-recall curve; 'presence', the accuracy of
    "confidence above 0.5" over what is there and as many names of what is not.
  """
  rng = np.random.default_rng((seed, _HELD_OUT))
  kinds = {"object": 0.5, "pair": 0.5}
  groups = {
    "seen": (prompts.SEEN_OBJECTS, "twemoji"),
    "spoiled": (prompts.SEEN_OBJECTS, "twemoji"),
    "withheld": (art.WITHHELD_OBJECTS, "twemoji"),
    "noto": (prompts.SEEN_OBJECTS, "noto"),
  }
  look = jax.jit(
    lambda params, images, ids: _MODULE.apply(
      {"params": params}, preprocess.clip_normalise(images), ids
    )
  )
  size = min(n, 100)
  n -= n % size
  report = {}
  for name, (objects, style) in groups.items():
    drawn = scenes.scenes(rng, n, wide=False, objects=objects, kinds=kinds, style=style)
    images, truth = scenes.clean(drawn)
    if name == "spoiled":
      images, truth = jax.jit(scenes.degrade)(drawn, scenes.damage(rng, n))
    ids = query_ids(objects)
    # In parts of one size, so that memory stays small and one program does for all.
    parts = [look(params, images[i : i + size], ids) for i in range(0, n, size)]
    scores = np.concatenate([jax.nn.sigmoid(part.logits) for part in parts])
    boxes = np.concatenate([part.boxes for part in parts])
    truth = jax.tree.map(np.asarray, truth)
    precisions, right = [], []
    for column, thing in enumerate(objects):
      there = (truth.classes == art.OBJECTS.index(thing)) & (truth.presence > 0.5)
      if there.any():
        precisions.append(
          average_precision(scores[..., column], boxes, truth.boxes, there, overlap=0.5)
        )
      confidence, present = scores[..., column].max(1), there.any(1)
      absent = np.flatnonzero(~(truth.classes == art.OBJECTS.index(thing)).any(1))[: present.sum()]
      right += [*(confidence[present] > 0.5), *(confidence[absent] <= 0.5)]
    report[name] = {"ap50": float(np.mean(precisions)), "presence": float(np.mean(right))}
  return report


def average_precision(
  scores: np.ndarray, boxes: np.ndarray, truth: np.ndarray, there: np.ndarray, *, overlap: float
) -> float:
  """Area under the precision-recall curve of one class, precision made monotone (COCO, VOC 2010).

  Args:
    scores: `[B, N]` confidences.
    boxes: `[B, N, 4]` centre and size.
    truth: `[B, M, 4]` edges.
    there: `[B, M]` bool, which of them are of this class.
    overlap: intersection over union from which a box is right; also that from which a less
      confident box is dropped beside a more confident one.
  """
  hits = []  # (confidence, right)
  for score, box, edges, real in zip(scores, boxes, truth, there, strict=True):
    order = np.flatnonzero(score >= _LEAST_CONFIDENCE)
    order = order[np.argsort(-score[order], kind="stable")]
    box = np.concatenate([box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2], 1)
    kept: list[int] = []
    for i in order:
      if not kept or _iou(box[i], box[kept]).max() < overlap:
        kept.append(i)
    open_ = list(np.flatnonzero(real))
    for i in kept:
      right = False
      if open_:
        ious = _iou(box[i], edges[open_])
        if ious.max() >= overlap:
          right = True
          open_.pop(int(ious.argmax()))
      hits.append((score[i], right))
  hits.sort(key=lambda hit: -hit[0])
  right = np.array([hit[1] for hit in hits], bool)
  if not len(right):
    return 0.0
  recall = np.cumsum(right) / there.sum()
  precision = np.cumsum(right) / np.arange(1, len(right) + 1)
  precision = np.maximum.accumulate(precision[::-1])[::-1]
  return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Intersection over union of one box `[4]` and others `[K, 4]`, all edges; `[K]`."""
  low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
  shared = np.prod(np.maximum(high - low, 0), axis=1)
  areas = np.prod(others[:, 2:] - others[:, :2], axis=1)
  return shared / (np.prod(box[2:] - box[:2]) + areas - shared + 1e-9)
