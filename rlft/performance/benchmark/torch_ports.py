"""PyTorch's implementations of the reward models, for `reward` to compare with.

Those of transformers and open_clip with their default attention, and YOLOv3-tiny layer by layer.
Images are resized on the tensor, with antialiasing. Random weights, as on our side.
"""

from collections.abc import Callable
import dataclasses
import importlib.util
import itertools
from typing import Any

import jax
import numpy as np

from rlft.models import clip, image_reward, owlvit
from rlft.models.files import darknet
from rlft.performance.benchmark.contest import Side, Unavailable, cores
from rlft.performance.benchmark.ports import noise

# What is imported for each kind of network, beside torch.
_PACKAGES = {"open_clip": ("open_clip", "torchvision")}


def start(*packages: str) -> Any:
  """PyTorch's device here, with PyTorch set to use all of it.

  Args:
    *packages: that are needed beside torch.

  Raises:
    Unavailable: something is not installed, or PyTorch does not run where JAX does.
  """
  for package in ("torch", *packages):
    if importlib.util.find_spec(package) is None:
      raise Unavailable(f"no {package}")
  import torch

  platform = jax.default_backend()
  if platform not in ("cpu", "gpu") or (platform == "gpu" and not torch.cuda.is_available()):
    raise Unavailable(f"PyTorch does not run on this {platform}")
  torch.set_num_threads(cores())
  torch.set_float32_matmul_precision("high")  # TF32 on GPUs, which is XLA's default.
  return torch.device("cuda" if platform == "gpu" else "cpu")


def side(
  kind: str, config: Any, dtype: Any, images: np.ndarray, features: Any
) -> Callable[[], Side]:
  """Returns what makes PyTorch's side of a contest.

  Args:
    kind: a key of `_KINDS`.
    config: of our network.
    dtype: type of the computation, float32 or bfloat16.
    images: `[B, H, W, 3]` float32 in [0, 1].
    features: a tree of numpy arrays, see `ports.Scorer`.
  """

  def make() -> Side:
    place = start(*_PACKAGES.get(kind, ()))
    import torch

    with torch.device("meta"):  # Nothing is allocated, or initialised at length.
      network = _KINDS[kind](config)
    network = network.to(getattr(torch, np.dtype(dtype).name)).to_empty(device=place).eval()
    _fill(network)
    given = torch.from_numpy(images).to(place).permute(0, 3, 1, 2)
    about = jax.tree.map(lambda x: torch.from_numpy(x).to(place), features)

    def run() -> Any:
      with torch.inference_mode():
        return network(given, about).float().cpu()  # Waits for an accelerator.

    return Side(run)

  return make


def _fill(network: Any) -> None:
  """Cheap random weights, and the buffers that the meta device has lost."""
  import torch

  with torch.no_grad():
    for name, parameter in network.named_parameters():
      value = noise(tuple(parameter.shape))
      # Vectors called weight are the scales of norms.
      is_scale = parameter.ndim == 1 and name.endswith("weight")
      parameter.copy_(torch.from_numpy(value + 1 if is_scale else value))
    for name, buffer in network.named_buffers():
      match name.rpartition(".")[2]:
        case "position_ids":
          buffer.copy_(torch.arange(buffer.shape[-1]))
        case "attn_mask":
          buffer.fill_(-torch.inf).triu_(1)
        case "running_var":
          buffer.fill_(1)
        case _:
          buffer.zero_()


def _module(parts: dict[str, Any], forward: Callable[[Any, Any, Any], Any]) -> Any:
  """A PyTorch module that calls `forward(parts, images [B, 3, H, W] in [0, 1], features)`."""
  import torch

  class Scorer(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.parts = torch.nn.ModuleDict(parts)

    def forward(self, images: Any, features: Any) -> Any:
      return forward(self.parts, images, features)

  return Scorer()


def _pixels(images: Any, shape: tuple[int, int], like: Any, *, fit: str = "crop") -> Any:
  """Resized, cropped or padded to `shape`, and normalised; of the type of `like`'s weights."""
  import torch
  from torch.nn import functional

  height, width = images.shape[2:]
  ratios = shape[0] / height, shape[1] / width
  ratio = {"crop": max(ratios), "pad": min(ratios), "stretch": None}[fit]
  size = shape if ratio is None else (round(height * ratio), round(width * ratio))
  if size != (height, width):
    images = functional.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
  top, left = (shape[0] - size[0]) // 2, (shape[1] - size[1]) // 2
  # Negative padding crops.
  images = functional.pad(images, (left, shape[1] - size[1] - left, top, shape[0] - size[0] - top))
  mean, std = (
    torch.tensor(x, device=images.device)[:, None, None] for x in (clip.IMAGE_MEAN, clip.IMAGE_STD)
  )
  return ((images - mean) / std).to(next(like.parameters()).dtype)


def _unit(features: Any) -> Any:
  return features / features.norm(dim=-1, keepdim=True)


def _clip(config: clip.CLIPConfig) -> Any:
  import transformers

  size = config.vision_config.image_size

  def forward(parts, images, ids):
    model = parts["model"]
    image = model.get_image_features(_pixels(images, (size, size), model))
    return (_unit(image) * _unit(model.get_text_features(ids))).sum(-1)

  given = transformers.CLIPConfig(**dataclasses.asdict(config))
  return _module({"model": transformers.CLIPModel(given)}, forward)


def _open_clip(config: clip.CLIPConfig) -> Any:
  from open_clip.model import CLIP

  vision, text = config.vision_config, config.text_config
  size = vision.image_size
  model = CLIP(
    config.projection_dim,
    {
      "image_size": size,
      "layers": vision.num_hidden_layers,
      "width": vision.hidden_size,
      "head_width": vision.hidden_size // vision.num_attention_heads,
      "mlp_ratio": vision.intermediate_size / vision.hidden_size,
      "patch_size": vision.patch_size,
    },
    {
      "context_length": text.max_position_embeddings,
      "vocab_size": text.vocab_size,
      "width": text.hidden_size,
      "heads": text.num_attention_heads,
      "mlp_ratio": text.intermediate_size / text.hidden_size,
      "layers": text.num_hidden_layers,
    },
    quick_gelu=vision.hidden_act == "quick_gelu",
  )

  def forward(parts, images, ids):
    model = parts["model"]
    image = model.encode_image(_pixels(images, (size, size), model, fit="pad"), normalize=True)
    return (image * model.encode_text(ids, normalize=True)).sum(-1)

  return _module({"model": model}, forward)


def _linear(widths: tuple[int, ...]) -> Any:
  """Linear layers with nothing between."""
  import torch

  pairs = itertools.pairwise(widths)
  return torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in pairs))


def _aesthetic(config: clip.CLIPConfig) -> Any:
  import transformers

  size, widths = config.vision_config.image_size, (config.projection_dim, 1024, 128, 64, 16, 1)

  def forward(parts, images, features):
    del features
    found = parts["tower"](_pixels(images, (size, size), parts["tower"])).image_embeds
    return parts["head"](_unit(found))[:, 0]

  given = dataclasses.asdict(config.vision_config) | {"projection_dim": config.projection_dim}
  tower = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**given))
  return _module({"tower": tower, "head": _linear(widths)}, forward)


def _image_reward(config: image_reward.ImageRewardConfig) -> Any:
  import transformers

  size = config.vision.image_size
  widths = (config.text.hidden_size, *config.head_widths, 1)
  # As a decoder it has layers that look at the image; it is not run as one.
  text = dataclasses.asdict(config.text) | {
    "is_decoder": True,
    "encoder_hidden_size": config.vision.hidden_size,
  }

  def forward(parts, images, features):
    states = parts["vision"](_pixels(images, (size, size), parts["vision"])).last_hidden_state
    words = parts["text"](
      input_ids=features["ids"],
      attention_mask=features["mask"],
      encoder_hidden_states=states,
      is_decoder=False,
    )
    score = parts["head"](words.last_hidden_state[:, 0])[:, 0]
    return (score - config.mean) / config.std

  vision = transformers.BlipVisionConfig(**dataclasses.asdict(config.vision))
  parts = {
    "vision": transformers.BlipVisionModel(vision),
    "text": transformers.BlipTextModel(
      transformers.BlipTextConfig(**text), add_pooling_layer=False
    ),
    "head": _linear(widths),
  }
  return _module(parts, forward)


def _owlvit(config: owlvit.OwlViTConfig) -> Any:
  import transformers

  size = config.vision_config.image_size
  given, network = {
    "owlvit": (transformers.OwlViTConfig, transformers.OwlViTForObjectDetection),
    "owlv2": (transformers.Owlv2Config, transformers.Owlv2ForObjectDetection),
  }[config.model_type]

  model = network(given(**dataclasses.asdict(config)))
  # The cache of this method keeps the model alive, and what it returned on the meta device.
  network.compute_box_bias.cache_clear()
  bias = network.compute_box_bias.__wrapped__

  def forward(parts, images, ids):
    model = parts["model"]
    model.box_bias = bias(model, model.num_patches_height, model.num_patches_width)
    # OWLv2 pads to a square and resizes with a Gaussian; of square images no more than this.
    pixels = _pixels(images, (size, size), model, fit="stretch")
    found = model(input_ids=ids.reshape(-1, ids.shape[-1]), pixel_values=pixels)
    return found.logits.amax(1).sigmoid().mean(-1)

  return _module({"model": model}, forward)


def _yolo(network: darknet.Network) -> Any:
  import torch
  from torch.nn import functional

  parts, channels = {}, 3
  for i, (layer, outputs) in enumerate(zip(network.layers, network.channels(), strict=True)):
    if isinstance(layer, darknet.Conv):
      conv = torch.nn.Conv2d(
        channels, outputs, layer.size, layer.stride, layer.padding, bias=not layer.batch_norm
      )
      norm = [torch.nn.BatchNorm2d(outputs)] if layer.batch_norm else []
      act = [torch.nn.LeakyReLU(0.1, inplace=True)] if layer.leaky else []
      parts[str(i)] = torch.nn.Sequential(conv, *norm, *act)
    channels = outputs

  def forward(parts, images, weights):
    shape = (network.height, network.width)
    x = functional.interpolate(images, shape, mode="bilinear")
    x = x.to(next(parts.parameters()).dtype)
    outputs, best = [], []
    for i, layer in enumerate(network.layers):
      match layer:
        case darknet.Conv():
          x = parts[str(i)](x)
        case darknet.MaxPool():
          before, after = layer.padding // 2, layer.padding - layer.padding // 2
          x = functional.pad(x, (before, after, before, after), value=-torch.inf)
          x = functional.max_pool2d(x, layer.size, layer.stride)
        case darknet.Upsample():
          x = functional.interpolate(x, scale_factor=layer.stride)
        case darknet.Route():
          x = torch.cat([outputs[j] for j in layer.layers], 1)
        case darknet.Shortcut():
          x = x + outputs[layer.layer]
        case darknet.Yolo():
          places = x.unflatten(1, (len(layer.anchors), -1)).flatten(3).float()
          best.append((places[:, :, 4:5].sigmoid() * places[:, :, 5:].sigmoid()).amax((1, 3)))
      outputs.append(x)
    return (torch.stack(best).amax(0) * weights).sum(-1)

  return _module(parts, forward)


_KINDS: dict[str, Callable[[Any], Any]] = {
  "aesthetic": _aesthetic,
  "clip": _clip,
  "image_reward": _image_reward,
  "open_clip": _open_clip,
  "owlvit": _owlvit,
  "yolo": _yolo,
}
