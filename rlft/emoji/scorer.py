"""The trained judge of the emoji world: a small network that says what it sees in a picture.

It stands in for the paper's object detector, skin-tone classifier and preference model, with the
mistakes that a trained network makes. `rlft.emoji.scorer_train` trains it on rendered scenes;
`data/scorer.safetensors` holds the weights.
"""

from collections.abc import Mapping
import dataclasses
import os
import pathlib
from typing import Any

import chex
from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from rlft import files
from rlft.emoji import art, world
from rlft.types import UserError

Params = Mapping[str, Any]

WEIGHTS_FILE = art.DATA_DIR / "scorer.safetensors"
_REBUILD = "python launch/train_scorer.py --flagfile=experiments/emoji_scorer.flags"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
  """What the network says about B pictures; all float32 in [0, 1].

  Attributes:
    object_probs: `[B, 60]`, confidence that each of `art.OBJECTS` is there. Lower for pictures that
      are blurred or half-formed, so it grades pictures as well as classifying them.
    tone_probs: `[B, 4]`, over `world.TONE_CLASSES`; rows sum to 1, meaningless without skin.
    skin_prob: `[B]`, probability that there is a person.
    vividness: `[B]`, saturation times contrast of the picture, from the most washed-out of the
      world (0) to the art's own colours (1).
  """

  object_probs: jax.Array
  tone_probs: jax.Array
  skin_prob: jax.Array
  vividness: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logits:
  """`Scores` before the sigmoid and (tones) the softmax; same shapes."""

  objects: jax.Array
  tones: jax.Array
  skin: jax.Array
  vividness: jax.Array


def _squares(x: jax.Array) -> jax.Array:
  """`[B, H, W, C]` -> `[B, H/2, W/2, 4 C]`, the pixels of each 2x2 square one after the other."""
  batch, height, wide, channels = x.shape
  x = x.reshape(batch, height // 2, 2, wide // 2, 2, channels).swapaxes(2, 3)
  return x.reshape(batch, height // 2, wide // 2, 4 * channels)


class Scorer(nn.Module):
  """Convolutional network on `[B, 32, 32, 3]` float32 in [0, 1]; 213 k parameters.

  Objects are recognised at 16 places and pooled by log-sum-exp, so an object counts wherever it is.
  Colour is judged from the whole picture, with the first layer's features beside the last one's:
  normalisation removes the absolute colours that vividness and tone depend on.
  """

  widths: tuple[int, ...] = (40, 80, 96)

  @nn.compact
  def __call__(self, images: jax.Array) -> Logits:
    chex.assert_rank(images, 4)
    # 2x2 pixels become channels, later layers are joined by means: gradients of strided
    # convolutions are slow on a CPU.
    x = stem = nn.relu(nn.Conv(self.widths[0], (3, 3))(_squares(2 * images - 1)))
    x = x + nn.relu(nn.GroupNorm(8)(nn.Conv(self.widths[0], (3, 3))(x)))
    for width in self.widths[1:]:
      batch, height, wide, _ = x.shape
      x = _squares(x).reshape(batch, height // 2, wide // 2, 4, -1).mean(3)
      x = nn.relu(nn.GroupNorm(8)(nn.Conv(width, (3, 3))(x)))
      if width != self.widths[-1]:
        x = x + nn.relu(nn.GroupNorm(8)(nn.Conv(width, (3, 3))(x)))

    places = nn.Conv(len(art.OBJECTS), (1, 1), name="objects")(nn.relu(nn.Dense(128)(x)))
    objects = jax.nn.logsumexp(places, axis=(1, 2)) - OBJECT_PRIOR
    colour = jnp.concatenate(
      [x.mean((1, 2)), x.max((1, 2)), stem.mean((1, 2)), stem.max((1, 2))], axis=1
    )
    colour = nn.relu(nn.Dense(64)(colour))
    last = nn.Dense(len(world.TONE_CLASSES) + 2, name="colour")(colour)
    return Logits(objects=objects, tones=last[:, 2:], skin=last[:, 0], vividness=last[:, 1])


# The log-sum-exp of 16 zeros is 2.8; one object in 60 is there, whose logit is -4.
OBJECT_PRIOR = 7.0

_MODULE = Scorer()


def predict(params: Params, images: jax.Array) -> Scores:
  """Looks at pictures. Pure and jit-able; 64 pictures cost 20 ms of one CPU core.

  Args:
    params: from `load`.
    images: `[B, H, W, 3]` float32 in [0, 1]; other sizes than 32 are resized to it.
  """
  chex.assert_rank(images, 4)
  size = world.IMAGE_SIZE
  if images.shape[1:3] != (size, size):
    images = jax.image.resize(images, (len(images), size, size, 3), "linear")
  logits = _MODULE.apply({"params": params}, images.astype(jnp.float32))
  return Scores(
    object_probs=nn.sigmoid(logits.objects),
    tone_probs=nn.softmax(logits.tones),
    skin_prob=nn.sigmoid(logits.skin),
    vividness=nn.sigmoid(logits.vividness),
  )


def load(path: str | os.PathLike[str] = WEIGHTS_FILE) -> tuple[Scorer, Params]:
  """The network and its weights, float32 (stored as float16).

  Raises:
    UserError: the file is missing, damaged, or of another network.
  """
  path = pathlib.Path(path)
  try:
    flat = safetensors.numpy.load_file(path)
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(
      f"cannot read the scorer's weights {path} ({error}): reinstall rlft, or make them by"
      f" {_REBUILD}"
    ) from error
  shapes = traverse_util.flatten_dict(param_shapes(), sep="/")
  if {k: v.shape for k, v in flat.items()} != {k: v.shape for k, v in shapes.items()}:
    raise UserError(f"{path} holds the weights of another network: make them anew by {_REBUILD}")
  params = {name: jnp.asarray(array, jnp.float32) for name, array in flat.items()}
  return _MODULE, traverse_util.unflatten_dict(params, sep="/")


def save(path: str | os.PathLike[str], params: Params) -> None:
  """Writes weights as float16, atomically.

  Raises:
    UserError: the file cannot be written.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  files.write_atomic(
    path, safetensors.numpy.save({k: np.asarray(v, np.float16) for k, v in flat.items()})
  )


def param_shapes() -> Params:
  """The parameter tree as `jax.ShapeDtypeStruct`s."""
  size = world.IMAGE_SIZE
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  return jax.eval_shape(_MODULE.init, jax.random.key(0), images)["params"]
