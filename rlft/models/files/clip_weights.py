"""CLIP models from files: the layout of transformers, and that of OpenAI and open_clip.

The second has one array for query, key and value, and bare parameters for positions and
projections; `from_open_clip` gives its arrays the names and layouts of the first.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import os
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlft.models import clip
from rlft.models.files import arrays, sources, torch_layout
from rlft.models.shapes import Params
from rlft.types import UserError

OPEN_CLIP_CONFIG = "open_clip_config.json"
# Where transformers keeps what is done to images; open_clip has it in its config.
_PREPROCESSOR = "preprocessor_config.json"

# The backbone of HPSv2 (open_clip's ViT-H-14). Its end token is the highest id of the vocabulary.
VIT_H_14 = clip.CLIPConfig(
  text_config=clip.CLIPTextConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    hidden_act="gelu",
    eos_token_id=2,
  ),
  vision_config=clip.CLIPVisionConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=16,
    patch_size=14,
    hidden_act="gelu",
  ),
  projection_dim=1024,
)

# Applied one after the other to a name of open_clip.
_RULES = tuple(
  (re.compile(pattern), name)
  for pattern, name in (
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^(text\.)?text_projection$", "text_projection.weight"),
    (r"^visual\.", "vision_model."),
    (r"^(text\.)?(?=(transformer|token_embedding|positional_embedding|ln_final)\b)", "text_model."),
    (r"\.transformer\.resblocks\.", ".encoder.layers."),
    (r"\.(class_embedding|token_embedding\.weight)$", r".embeddings.\1"),
    (r"\.positional_embedding$", ".embeddings.position_embedding.weight"),
    (r"\.conv1\.", ".embeddings.patch_embedding."),
    (r"\.ln_pre\.", ".pre_layrnorm."),
    (r"\.ln_post\.", ".post_layernorm."),
    (r"\.ln_final\.", ".final_layer_norm."),
    (r"\.ln_(1|2)\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
  )
)
_TRANSPOSED = re.compile(r"^(visual\.proj|(text\.)?text_projection)$")
_FUSED = re.compile(r"\.in_proj_(?=weight$|bias$)")


def open_clip_pieces(names: Iterable[str]) -> dict[str, arrays.Piece]:
  """What each array of transformers' names and layouts is of arrays with open_clip's names."""
  pieces = {}
  for old in names:
    new = old
    for pattern, name in _RULES:
      new = pattern.sub(name, new)
    if _FUSED.search(new):
      for third, letter in enumerate("qkv"):
        pieces[_FUSED.sub(f".{letter}_proj.", new)] = arrays.Piece(old, third)
    else:
      pieces[new] = arrays.Piece(old, transposed=bool(_TRANSPOSED.match(old)))
  return pieces


def from_open_clip(state: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
  """A state dict of OpenAI's CLIP or open_clip as one of transformers' `CLIPModel`.

  Args:
    state: names such as 'visual.transformer.resblocks.0.attn.in_proj_weight'. A state dict that
      already has transformers' names is returned as it is.

  Returns:
    the same arrays under the names of transformers; names that are not known stay.
  """
  return arrays.Pieces(state, open_clip_pieces(state)) if is_open_clip(state) else state


def is_open_clip(state: Mapping[str, np.ndarray]) -> bool:
  """Whether the names are those of OpenAI's CLIP or open_clip."""
  return "visual.conv1.weight" in state


def open_clip_config(data: Mapping[str, Any], what: str = OPEN_CLIP_CONFIG) -> clip.CLIPConfig:
  """The config of a model in open_clip's terms.

  Args:
    data: a parsed open_clip_config.json, or its 'model_cfg'.
    what: the file, for messages.

  Raises:
    UserError: an option that would change the network is not implemented.
  """
  data = data.get("model_cfg", data)
  vision = _options(data, "vision_cfg", _VISION, what)
  text = _options(data, "text_cfg", _TEXT, what)
  model = _options({"": data}, "", _MODEL, what)
  act = "quick_gelu" if model["quick_gelu"] else "gelu"
  return clip.CLIPConfig(
    text_config=clip.CLIPTextConfig(
      vocab_size=text["vocab_size"],
      hidden_size=text["width"],
      intermediate_size=int(text["width"] * text["mlp_ratio"]),
      num_hidden_layers=text["layers"],
      num_attention_heads=text["heads"],
      max_position_embeddings=text["context_length"],
      hidden_act=act,
      # The end of a text is its highest token id.
      eos_token_id=2,
    ),
    vision_config=clip.CLIPVisionConfig(
      hidden_size=vision["width"],
      intermediate_size=int(vision["width"] * vision["mlp_ratio"]),
      num_hidden_layers=vision["layers"],
      num_attention_heads=vision["width"] // vision["head_width"],
      image_size=vision["image_size"],
      patch_size=vision["patch_size"],
      hidden_act=act,
    ),
    projection_dim=model["embed_dim"],
  )


# Options with open_clip's defaults.
_MODEL = {"embed_dim": 512, "quick_gelu": False, "vision_cfg": {}, "text_cfg": {}}
_VISION = {
  "layers": 12,
  "width": 768,
  "head_width": 64,
  "mlp_ratio": 4.0,
  "patch_size": 16,
  "image_size": 224,
}
_TEXT = {
  "context_length": 77,
  "vocab_size": 49408,
  "width": 512,
  "heads": 8,
  "layers": 12,
  "mlp_ratio": 4.0,
}


def _options(
  data: Mapping[str, Any], key: str, known: Mapping[str, Any], what: str
) -> dict[str, Any]:
  given = data.get(key) or {}
  if unknown := sorted(set(given) - set(known)):
    raise UserError(
      f"{what}: option {unknown[0]!r} of {key or 'the model'} is not supported; use a CLIP model "
      "with two plain transformers (ViT-B, L, H, g)"
    )
  return {**known, **given}


def load(
  source: str | os.PathLike[str],
  *,
  dtype: Any = jnp.float32,
  names: Sequence[str] = sources.WEIGHTS,
  default: clip.CLIPConfig | None = None,
) -> tuple[clip.CLIPModel, Params]:
  """Reads a CLIP model with both towers, in either layout.

  Args:
    source: see `rlft.models.files.sources`; the config is beside the weights, in config.json or
      open_clip_config.json, and what is done to images in preprocessor_config.json or the latter
      (OpenAI's means and deviations if it is not said). A pickled file may keep the weights in
      'state_dict' and have 'module.' before each name.
    dtype: type that the towers compute in.
    names: files to look for in a directory.
    default: the config if there is none beside the weights.

  Returns:
    the module and its parameters, float32 numpy arrays.

  Raises:
    UserError: something is missing or does not fit.
  """
  state = sources.open_weights(source, names=names, key="state_dict")
  state = arrays.strip_prefix(state, "module.")
  config = _config(source, is_open_clip(state), default)
  config = dataclasses.replace(config, **_normalisation(source))
  module = clip.CLIPModel(config, dtype)
  params = torch_layout.from_torch(module, from_open_clip(state), what=str(source))
  return module, params


def _config(
  source: str | os.PathLike[str], first_open_clip: bool, default: clip.CLIPConfig | None
) -> clip.CLIPConfig:
  readers = [(sources.CONFIG, clip.CLIPConfig.from_dict), (OPEN_CLIP_CONFIG, open_clip_config)]
  for name, reader in reversed(readers) if first_open_clip else readers:
    if (path := sources.find_file(source, name)) is not None:
      return reader(sources.read_json(path), what=str(path))
  if default is None:
    raise UserError(
      f"{source}: there is no {sources.CONFIG} or {OPEN_CLIP_CONFIG} in it or beside it; put the "
      "model's own there"
    )
  return default


def _normalisation(source: str | os.PathLike[str]) -> dict[str, tuple[float, ...]]:
  """What the files beside a model say of images: `image_mean`, `image_std`; {} if nothing.

  Raises:
    UserError: images are to be prepared in a way that is not implemented.
  """
  for name in (_PREPROCESSOR, OPEN_CLIP_CONFIG):
    if (path := sources.find_file(source, name)) is None:
      continue
    data = sources.read_json(path)
    data = data if name == _PREPROCESSOR else data.get("preprocess_cfg", {})
    if not isinstance(data, Mapping):
      raise UserError(f"{path}: preprocess_cfg is no object; get it again")
    told = (
      ("do_normalize", data.get("do_normalize", True) is True),
      ("do_center_crop", data.get("do_center_crop", True) is True),
      ("resize_mode", data.get("resize_mode", "shortest") == "shortest"),
    )
    for key, usual in told:
      if not usual:
        raise UserError(
          f"{path}: {key}={data[key]!r} is not supported: use a CLIP model whose images are resized"
          " to the short side, cropped to the centre and normalised"
        )
    found = {}
    for key, values in (("image_mean", _either(data, "mean")), ("image_std", _either(data, "std"))):
      if values is None:
        continue
      numbers = isinstance(values, list) and all(type(x) in (int, float) for x in values)
      if not numbers or len(values) != 3 or (key == "image_std" and min(values) <= 0):
        raise UserError(f"{path}: {key}={values!r} is not three numbers; get it again")
      found[key] = tuple(map(float, values))
    if found:
      return found
  return {}


def _either(data: Mapping[str, Any], name: str) -> Any:
  """What transformers calls 'image_mean', and open_clip 'mean'."""
  return data.get(f"image_{name}", data.get(name))
