"""The reward models at their published sizes with random weights, as `reward` times them.

A call scores a batch: from images in [0, 1] of any size, which are resized and normalised first,
and token ids of one text an image (detectors: four objects an image) to scores.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlft.models import clip, image_reward, owlvit, yolov3_tiny
from rlft.models.files import clip_weights, darknet
from rlft.models.shapes import param_shapes
from rlft.rewards import aesthetic, preprocess, yolo
from rlft.rewards import clip as clip_rewards
from rlft.rewards import image_reward as image_reward_rewards
from rlft.rewards import owlvit as owlvit_rewards

VIT_L_14 = clip.CLIPConfig(
  text_config=clip.CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_attention_heads=12, eos_token_id=2
  ),
  vision_config=clip.CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    patch_size=14,
  ),
  projection_dim=768,
)
OWLV2_B_16 = owlvit.OwlViTConfig(
  vision_config=clip.CLIPVisionConfig(image_size=960, patch_size=16), model_type="owlv2"
)
OBJECTS = 4  # queries of a detector for each image
_NOISE = 0.02  # standard deviation of weights: outputs stay of size 1


@dataclasses.dataclass(frozen=True)
class Scorer:
  """A reward model without its weights.

  Attributes:
    shapes: its parameters, as a tree of `jax.ShapeDtypeStruct`.
    score: `(params, images [B, H, W, 3] in [0, 1], features) -> [B]`.
    features: what it needs about B prompts: a tree of numpy arrays.
  """

  shapes: Any
  score: Callable[[Any, jax.Array, Any], jax.Array]
  features: Any = None


@dataclasses.dataclass(frozen=True)
class Port:
  """A reward model and its size.

  Attributes:
    config: of the network.
    scorer: `(config, dtype, batch size) -> Scorer`.
    kind: which function of `torch_ports` makes the same in PyTorch.
  """

  config: Any
  scorer: Callable[[Any, Any, int], Scorer]
  kind: str


def _ids(shape: tuple[int, ...], vocab_size: int) -> np.ndarray:
  """Token ids `[..., L]` of texts that fill 3/4 of L: the highest id ends them, 0 fills up."""
  ids = np.random.RandomState(0).randint(1, vocab_size - 1, shape).astype(np.int32)
  end = 3 * shape[-1] // 4
  ids[..., end], ids[..., end + 1 :] = vocab_size - 1, 0
  return ids


def _clip(fit: clip_rewards.Fit) -> Callable[[clip.CLIPConfig, Any, int], Scorer]:
  def scorer(config: clip.CLIPConfig, dtype: Any, batch_size: int) -> Scorer:
    module, text = clip.CLIPModel(config, dtype), config.text_config

    def score(params, images, ids):
      image = clip_rewards.image_features(module, params, images, fit)
      words = module.apply({"params": params}, ids, method="text_features")
      return jnp.sum(image * clip_rewards.unit(words), axis=-1)

    ids = _ids((batch_size, text.max_position_embeddings), text.vocab_size)
    return Scorer(param_shapes(module), score, ids)

  return scorer


def _aesthetic(config: clip.CLIPConfig, dtype: Any, batch_size: int) -> Scorer:
  del batch_size
  module = clip.CLIPModel(config, dtype)
  shapes = param_shapes(module)
  head = ((config.projection_dim, 1), (1,))
  head = (tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in head),)
  tower = {name: shapes[name] for name in shapes if not name.startswith("text_")}

  def score(params, images, features):
    del features
    found = clip_rewards.image_features(
      module, params["clip"], images, clip_rewards.torchvision_crop
    )
    return aesthetic.rate(params["head"], found)

  return Scorer({"clip": tower, "head": head}, score)


def _image_reward(config: image_reward.ImageRewardConfig, dtype: Any, batch_size: int) -> Scorer:
  module = image_reward.ImageReward(config, dtype)
  ids = _ids((batch_size, config.text_length), config.text.vocab_size)

  def score(params, images, features):
    return image_reward_rewards.score_images(module, params, images, features)

  features = {"ids": ids, "mask": (ids > 0).astype(np.int32)}
  return Scorer(param_shapes(module), score, features)


def _owlvit(config: owlvit.OwlViTConfig, dtype: Any, batch_size: int) -> Scorer:
  module, text = owlvit.OwlViT(config, dtype), config.text_config

  def score(params, images, ids):
    return owlvit_rewards.score_images(module, params, images, ids)

  ids = _ids((batch_size, OBJECTS, text.max_position_embeddings), text.vocab_size)
  return Scorer(param_shapes(module), score, ids)


def _yolo(network: darknet.Network, dtype: Any, batch_size: int) -> Scorer:
  classes = next(x.classes for x in network.layers if isinstance(x, darknet.Yolo))

  def score(params, images, weights):
    images = yolov3_tiny.resize(network, images)
    found = yolov3_tiny.detect(network, params, images, dtype=dtype)
    return jnp.sum(yolo.confidence(found) * weights, axis=1)

  shapes = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    darknet.param_shapes(network),
    is_leaf=lambda x: isinstance(x, tuple),
  )
  return Scorer(shapes, score, np.full((batch_size, classes), 1 / classes, np.float32))


PORTS: Mapping[str, Port] = {
  "clip-score": Port(VIT_L_14, _clip(clip_rewards.torchvision_crop), "clip"),
  "aesthetic-v2": Port(VIT_L_14, _aesthetic, "aesthetic"),
  "pickscore": Port(clip_weights.VIT_H_14, _clip(preprocess.short_side_crop), "clip"),
  "hpsv2": Port(clip_weights.VIT_H_14, _clip(preprocess.long_side_pad), "open_clip"),
  "image-reward": Port(image_reward.ImageRewardConfig(), _image_reward, "image_reward"),
  "owlvit": Port(owlvit.OwlViTConfig(), _owlvit, "owlvit"),
  "owlv2": Port(OWLV2_B_16, _owlvit, "owlvit"),
  "yolov3-tiny": Port(yolov3_tiny.YOLOV3_TINY, _yolo, "yolo"),
}


def random_params(shapes: Any) -> Any:
  """Cheap float32 weights on the device: one block of noise over and over; norm scales near 1."""

  def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    array = noise(leaf.shape)
    return jax.device_put(array + 1 if jax.tree_util.keystr(path).endswith("['scale']") else array)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def noise(shape: tuple[int, ...]) -> np.ndarray:
  """Float32 noise of mean 0 and standard deviation 0.02, which repeats."""
  # The length divides no power of two, or all rows of a matrix would be the same.
  block = np.random.RandomState(0).standard_normal(99_991).astype(np.float32)
  return np.resize(_NOISE * block, shape)
