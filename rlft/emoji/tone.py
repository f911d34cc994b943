"""'emoji-tone': a small network that classifies the skin of portraits into four tones.

It stands in for the paper's classifier of skin tones, with the mistakes of a trained network.
`data/emoji-tone` holds its weights; `launch/train_reward.py` trains it on rendered scenes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import chex
from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.numpy

from rlft.config.settings import EMOJI_SD
from rlft.emoji import art, measures, prompts, reward_training, scenes, world
from rlft.storage import files
from rlft.types import UserError

Params = Mapping[str, Any]

DIRECTORY = art.DATA_DIR / "emoji-tone"
REBUILD = "python launch/train_reward.py --flagfile=experiments/reward_tone.flags"
_WEIGHTS = "model.safetensors"

# Below this probability of a person, a picture has no skin tone.
MIN_PERSON = 0.5
# No label is quite 0 or 1, so that logits stay finite and confidences graded.
_SMOOTHING = 0.04
# Many portraits; the rest teaches what is nobody.
_KINDS = {"object": 0.15, "pair": 0.15, "portrait": 0.7}
_TRAINING, _HELD_OUT, _INIT = range(3)  # second word of each seed: the streams never meet
_GENERATED = 256  # portraits drawn by emoji-sd, to compare with the oracle


def _squares(x: jax.Array) -> jax.Array:
  """`[B, H, W, C]` -> `[B, H/2, W/2, 4 C]`, the pixels of each 2x2 square one after the other."""
  batch, height, wide, channels = x.shape
  x = x.reshape(batch, height // 2, 2, wide // 2, 2, channels).swapaxes(2, 3)
  return x.reshape(batch, height // 2, wide // 2, 4 * channels)


class ToneClassifier(nn.Module):
  """Convolutional network on `[B, 32, 32, 3]` float32 in [0, 1]; 116 k parameters.

  The first layer's features stand beside the last one's: normalisation removes the absolute
  colours, which a tone depends on.
  """

  widths: tuple[int, ...] = (32, 48, 64)

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """`[B, 5]` logits: the four `world.TONE_CLASSES`, then "nobody"."""
    chex.assert_rank(images, 4)
    # 2x2 pixels become channels, later layers are joined by means: gradients of strided
    # convolutions are slow on a CPU.
    x = stem = nn.relu(nn.Conv(self.widths[0], (3, 3))(_squares(2 * images - 1)))
    for width in self.widths[1:]:
      batch, height, wide, _ = x.shape
      x = _squares(x).reshape(batch, height // 2, wide // 2, 4, -1).mean(3)
      x = nn.relu(nn.GroupNorm(8)(nn.Conv(width, (3, 3))(x)))
      x = x + nn.relu(nn.GroupNorm(8)(nn.Conv(width, (3, 3))(x)))
    colour = jnp.concatenate(
      [x.mean((1, 2)), x.max((1, 2)), stem.mean((1, 2)), stem.max((1, 2))], axis=1
    )
    return nn.Dense(len(world.TONE_CLASSES) + 1)(nn.relu(nn.Dense(64)(colour)))


_MODULE = ToneClassifier()


def classify(params: Params, images: jax.Array) -> jax.Array:
  """Skin tones of B pictures; pure and jit-able.

  Args:
    params: from `load`.
    images: `[B, H, W, 3]` float32 in [0, 1]; other sizes than 32 are resized to it.

  Returns:
    `[B, 4]` probabilities of `world.TONE_CLASSES`; NaN where there is nobody.
  """
  chex.assert_rank(images, 4)
  size = world.IMAGE_SIZE
  if images.shape[1:3] != (size, size):
    images = jax.image.resize(images, (len(images), size, size, 3), "linear")
  logits = _MODULE.apply({"params": params}, images.astype(jnp.float32))
  somebody = 1 - nn.softmax(logits)[:, -1:] >= MIN_PERSON
  return jnp.where(somebody, nn.softmax(logits[:, :-1]), jnp.nan)


def param_shapes() -> Params:
  """The parameter tree as `jax.ShapeDtypeStruct`s."""
  size = world.IMAGE_SIZE
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  return jax.eval_shape(_MODULE.init, jax.random.key(0), images)["params"]


def load(directory: Path = DIRECTORY) -> Params:
  """The weights, float32 (stored as float16).

  Raises:
    UserError: the file is missing, damaged, or of another network.
  """
  path = Path(directory) / _WEIGHTS
  try:
    flat = safetensors.numpy.load_file(path)
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(
      f"cannot read the weights {path} ({error}): reinstall rlft, or make them by {REBUILD}"
    ) from error
  shapes = traverse_util.flatten_dict(param_shapes(), sep="/")
  if {k: v.shape for k, v in flat.items()} != {k: v.shape for k, v in shapes.items()}:
    raise UserError(f"{path} holds the weights of another network: make them by {REBUILD}")
  params = {name: array.astype(np.float32) for name, array in flat.items()}
  return traverse_util.unflatten_dict(params, sep="/")


def save(directory: Path, params: Params) -> None:
  """Writes the weights as float16, atomically; raises `UserError` if that fails."""
  flat = traverse_util.flatten_dict(params, sep="/")
  files.write_atomic(
    Path(directory) / _WEIGHTS,
    safetensors.numpy.save({name: np.asarray(x, np.float16) for name, x in flat.items()}),
  )


# ---------------------------------------------------------------------------- training


def recipe(config: reward_training.RewardConfig) -> reward_training.Recipe:
  """How `launch/train_reward.py` trains it: on rendered scenes, spoiled as generated ones are."""

  def batch(step: int):
    rng = np.random.default_rng((config.seed, _TRAINING, step))
    drawn = scenes.scenes(rng, config.batch_size, wide=True, kinds=_KINDS)
    return drawn, scenes.damage(rng, config.batch_size)

  return reward_training.Recipe(
    init=lambda seed: reward_training.initialise(
      param_shapes(), np.random.default_rng((seed, _INIT))
    ),
    batch=batch,
    loss=loss,
    measure=lambda params: measure(params, config.seed, config.held_out),
    save=save,
    load=load,
  )


def loss(params: Params, batch: tuple[scenes.Scenes, scenes.Damage]) -> jax.Array:
  """Cross-entropy of tones where one person is plain to see, and of somebody against nobody."""
  images, truth = scenes.degrade(*batch)
  logits = _MODULE.apply({"params": params}, images)
  tones = optax.smooth_labels(jax.nn.one_hot(truth.tones, logits.shape[1] - 1), _SMOOTHING)
  tone = truth.tone_known * optax.softmax_cross_entropy(logits[:, :-1], tones)
  somebody = jax.nn.logsumexp(logits[:, :-1], axis=1) - logits[:, -1]
  label = _SMOOTHING / 2 + (1 - _SMOOTHING) * truth.person
  return jnp.mean(tone + optax.sigmoid_binary_cross_entropy(somebody, label))


def measure(params: Params, seed: int, n: int) -> reward_training.Figures:
  """Accuracies on `n` fresh scenes, on a second art style, and agreement on generated portraits.

  Returns:
    For 'rendered', 'spoiled' and 'noto' (another style, as rendered): 'tone', the accuracy on
    portraits (nobody found is a mistake), and 'person', that of somebody against nobody. For
    'generated' (portraits by emoji-sd): 'agreement' with the ITA oracle where both see somebody,
    and the shares of portraits in which each of them sees somebody.
  """
  look = jax.jit(classify)
  rng = np.random.default_rng((seed, _HELD_OUT))
  drawn = scenes.scenes(rng, n, wide=False)
  pictures = {
    "rendered": scenes.clean(drawn),
    "spoiled": jax.jit(scenes.degrade)(drawn, scenes.damage(rng, n)),
    "noto": scenes.clean(scenes.scenes(rng, n, wide=False, style="noto")),
  }
  report = {}
  for name, (images, truth) in pictures.items():
    probs = np.asarray(look(params, images))
    found = np.isfinite(probs[:, 0])
    right = found & (np.argmax(probs, axis=1) == truth.tones)
    report[name] = {
      "tone": float(np.average(right, weights=np.asarray(truth.tone_known, np.float64))),
      "person": float(np.mean(found == (np.asarray(truth.person) > 0.5))),
    }
  images = generated_portraits(seed, _GENERATED)
  probs, oracle = np.asarray(look(params, images)), np.asarray(measures.tone_class(images)[0])
  found = np.isfinite(probs[:, 0])
  both = found & (oracle >= 0)
  report["generated"] = {
    "agreement": float((np.argmax(probs, axis=1)[both] == oracle[both]).sum() / max(both.sum(), 1)),
    "person": float(np.mean(found)),
    "person_by_oracle": float(np.mean(oracle >= 0)),
  }
  return report


def generated_portraits(seed: int, n: int) -> np.ndarray:
  """`[n, 32, 32, 3]` in [0, 1]: portraits that emoji-sd draws for the training prompts."""
  from rlft.diffusion.policy import make_policy
  from rlft.diffusion.sampler import Sampler
  from rlft.models.files import pretrained

  portraits = prompts.prompts("portrait", "train")
  model = pretrained.load(EMOJI_SD)
  draw = Sampler(model, make_policy(model, sampling_steps=10, guidance_scale=1.0), batch_size=64)
  texts = [portraits[i % len(portraits)].text for i in range(n)]
  return draw(texts, seed, progress="drawing portraits")
