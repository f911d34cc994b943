"""Stable Diffusion in one file, in the layout of its authors, in which most models are shared.

There are no configs in it: they follow from names and shapes and, where these do not tell, from the
published model of the same family. There is no tokenizer in it either, which a user adds (in it,
%26 stands for '&', as in a reward's options):

    model.safetensors?tokenizer=FOLDER

What the UNet predicts is seldom said in it; where nothing is, Stable Diffusion 2 has to be told.
"""

from collections.abc import Mapping
import dataclasses
import logging
import os
import re
from typing import Any, NoReturn
import urllib.parse

from flax import traverse_util
import numpy as np

from rlft.models import architectures, clip, scheduler_config, tokens
from rlft.models import config as config_lib
from rlft.models import shapes as shapes_lib
from rlft.models.files import (
  arrays,
  hub,
  original_layout,
  original_shapes,
  sources,
  torch_layout,
  vocabulary,
)
from rlft.models.files.original_layout import UNET, VAE
from rlft.types import UserError

_log = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".ckpt")

# What the text encoders' names begin with, and the published model that is like it.
_FAMILIES = {
  ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."): "sdxl-base",
  ("cond_stage_model.transformer.",): "sd1.5",
  ("cond_stage_model.model.",): "sd2-base",
  ("conditioner.embedders.0.model.",): "sd2-base",
}
_SD2, _SD2_V = "sd2-base", "sd2.1"

# What a file is if one of its names is like this.
_OTHERS = (
  (r"^lora_|\.(lora_(up|down|A|B)|hada_w\d_\w|lokr_w\d)\b", "a LoRA: give the model it is for"),
  (r"^control_model\.", "a ControlNet, which is told a picture"),
  (r"^(string_to_param|emb_params|clip_[lg])$", "an embedding of textual inversion"),
  (r"(^|\.)joint_blocks\.", "Stable Diffusion 3"),
  (r"(^|\.)double_blocks\.", "FLUX"),
  (r"^edm_", "a model with the noise schedule of EDM"),
  (r"^(noise_augmentor|embedder)\.", "unCLIP, which varies pictures"),
  (r"^(down|up)_blocks\.", "one network of the diffusers layout, of which the directory is needed"),
)
# By the input channels of UNets that are told a picture.
_TOLD = {5: "depth", 7: "upscaling", 8: "editing", 9: "inpainting"}


@dataclasses.dataclass(frozen=True)
class Source:
  """A single file, as a user names it.

  Attributes:
    file: path of the weights, or 'org/name@revision/file' of a hub.
    tokenizer: where CLIP's tokenizer is, as `vocabulary.open_clip` takes it; '' if not given.
  """

  file: str
  tokenizer: str = ""


@dataclasses.dataclass(frozen=True)
class Contents:
  """A model before its parameters are read.

  Attributes:
    modules: networks by name: 'unet', 'vae', 'text_encoder' and, for SDXL, 'text_encoder_2'.
    states: the arrays of each, under the names of diffusers and transformers in PyTorch.
    what: the file of each, for messages.
    tokenizers: one for each text encoder.
    scheduler: as in `scheduler_config.json`.
    zero_empty: see `StableDiffusion`.
  """

  modules: Mapping[str, shapes_lib.Module]
  states: Mapping[str, Mapping[str, np.ndarray]]
  what: Mapping[str, str]
  tokenizers: tuple[tokens.Tokenizer, ...]
  scheduler: Mapping[str, Any]
  zero_empty: bool


def parse(text: str) -> Source | None:
  """The single file that a user names; None if it is something else.

  Raises:
    UserError: the file does not exist, or what follows '?' is no tokenizer.
  """
  text = os.path.expanduser(text)
  path, _, query = (text, "", "") if os.path.exists(text) else text.partition("?")
  if not path.endswith(SUFFIXES) or os.path.isdir(path):
    return None
  repository = hub.parse(path)
  if not os.path.exists(path) and (repository is None or repository.file is None):
    raise UserError(f"{path} does not exist: give a file, or a hub's org/name@revision/file")
  name, _, tokenizer = query.partition("=")
  if query and (name != "tokenizer" or not tokenizer or "&" in query):
    raise UserError(f"{text}: '?{query}' is no option: write ?tokenizer=FOLDER")
  return Source(path, urllib.parse.unquote(tokenizer))


def check(source: Source) -> None:
  """Checks by its names whether a file is a model that is supported, and has a tokenizer.

  Raises:
    UserError: it is not, or has none.
  """
  _recognise(source)


def read(source: Source, scheduler: Mapping[str, Any]) -> Contents:
  """Recognises the model in a file; its parameters are not read yet.

  Args:
    source: the file.
    scheduler: options in the place of those that follow from the file.

  Raises:
    UserError: it is no Stable Diffusion that is supported, lacks something, or has more than that.
  """
  file = source.file
  state, towers = _recognise(source)
  options, family = _scheduler(file, state, _FAMILIES[towers], scheduler)
  base = architectures.get(family)
  names = original_layout.needed(state, towers)
  pieces = {"unet": original_layout.unet(names), "vae": original_layout.vae(names)}
  texts = dict(zip(("text_encoder", "text_encoder_2"), towers, strict=False))
  pieces |= {name: original_layout.text(names, prefix) for name, prefix in texts.items()}
  modules = original_shapes.modules(base, file, state, pieces)
  placed = {key for name in modules for key in _place(file, state, pieces[name], modules[name])}
  if left := sorted(set(names) - placed):
    _refuse(
      f"{file}: of {len(left)} arrays without a place in a model like {family}, the first is"
      f" {left[0]}"
    )
  tokenizers = tuple(
    _open_tokenizer(source, modules[name].config, prefix) for name, prefix in texts.items()
  )
  return Contents(
    modules=modules,
    states={name: arrays.Pieces(state, pieces[name]) for name in modules},
    what=dict.fromkeys(modules, file),
    tokenizers=tokenizers,
    scheduler=options,
    zero_empty=base.zero_empty,
  )


def _refuse(message: str) -> NoReturn:
  raise UserError(f"{message}; {config_lib.USE_SUPPORTED}")


def _recognise(source: Source) -> tuple[Mapping[str, np.ndarray], tuple[str, ...]]:
  """The arrays, and what the text encoders' names begin with.

  Raises:
    UserError: it is another model, or has no tokenizer.
  """
  file = source.file
  state = sources.open_weights(file, key="state_dict")

  def has(prefix: str) -> bool:
    return any(name.startswith(prefix) for name in state)

  for pattern, what in _OTHERS:
    if any(re.search(pattern, name) for name in state):
      _refuse(f"{file} is {what}")
  if not has(UNET):
    if has("model_ema."):
      _refuse(f"{file} has averaged weights (model_ema.*) alone, and no {UNET}*")
    _refuse(f"{file} has no {UNET}*, so it is no whole model in the layout of its authors")
  towers = next((known for known in _FAMILIES if all(map(has, known))), None)
  if towers is None or not has(VAE):
    lacks = f"VAE ({VAE}*)" if towers else "text encoder of Stable Diffusion"
    _refuse(f"{file} has a UNet, but no {lacks}, so it is no whole model")
  if _FAMILIES[towers] == _SD2 and has(f"{UNET}label_emb."):
    _refuse(f"{file} is the refiner of SDXL, which only finishes pictures")
  first, last = f"{UNET}input_blocks.0.0.weight", f"{UNET}out.2.weight"
  if first in state and last in state:
    channels = arrays.shape(state, first)[1]
    if channels != arrays.shape(state, last)[0]:
      told = _TOLD.get(channels, "another use")
      _refuse(f"{file} is a model for {told}: its UNet takes {channels} channels")
  if not source.tokenizer:
    raise UserError(
      f"{file} has no tokenizer in it: give one, as {file}?tokenizer=FOLDER, a folder with CLIP's"
      " tokenizer.json (or vocab.json and merges.txt), or a hub's org/name@revision"
    )
  return state, towers


def _scheduler(
  file: str, state: Mapping[str, np.ndarray], family: str, given: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
  """The scheduler's options, and the published model that it is like; says what it predicts.

  Raises:
    UserError: it is not known what it predicts, or the options do not go together.
  """
  predicts, reason = _predicts(file, state, family, given)
  if family == _SD2 and predicts == "v_prediction":
    family = _SD2_V
  _log.warning("%s is like %s and predicts %s, %s", file, family, predicts, reason)
  options = {**architectures.get(family).scheduler, "prediction_type": predicts}
  if "ztsnr" in state:
    # Zero terminal SNR, whose last timestep has to be sampled: https://arxiv.org/abs/2305.08891
    options |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
  options |= given
  scheduler_config.SchedulerConfig.from_dict(options, file)
  return options, family


def _predicts(
  file: str, state: Mapping[str, np.ndarray], family: str, given: Mapping[str, Any]
) -> tuple[str, str]:
  """What the UNet predicts, and how that is known."""
  if "prediction_type" in given:
    return given["prediction_type"], "as --scheduler says"
  if "v_pred" in state:
    return "v_prediction", "as its key v_pred says"
  # https://github.com/Stability-AI/ModelSpec, and what ComfyUI writes.
  for key in ("modelspec.prediction_type", "modelspec.predict_key"):
    said = arrays.metadata(state).get(key)
    if said in ("epsilon", "v"):
      return "epsilon" if said == "epsilon" else "v_prediction", f"as its {key} says"
  if family == _SD2:
    raise UserError(
      f"{file} does not say what it predicts, and both kinds of Stable Diffusion 2 have the same"
      " arrays: give --scheduler=prediction_type=v_prediction (those for 768 pixels) or"
      " --scheduler=prediction_type=epsilon (those for 512, called base)"
    )
  return (
    "epsilon",
    "as nothing in it says otherwise (--scheduler=prediction_type=v_prediction does)",
  )


def _open_tokenizer(source: Source, config: clip.CLIPTextConfig, prefix: str) -> tokens.Tokenizer:
  """CLIP's tokenizer, padding as the text encoder of that prefix was trained."""
  # OpenCLIP pads with token 0, which is '!'.
  pad = tokens.CLIP_END if original_layout.pads_with_end(prefix) else "!"
  tokenizer = vocabulary.open_clip(source.tokenizer, config, pad=pad)
  if len(tokenizer) != config.vocab_size:
    raise UserError(
      f"tokenizer={source.tokenizer} has {len(tokenizer)} tokens, but {source.file} embeds"
      f" {config.vocab_size}: give the tokenizer of that model"
    )
  return tokenizer


def _place(
  file: str,
  state: Mapping[str, np.ndarray],
  pieces: Mapping[str, arrays.Piece],
  module: shapes_lib.Module,
) -> set[str]:
  """The names in the file of the arrays that are a network's parameters.

  Raises:
    UserError: a parameter is missing or has another shape.
  """
  placed = set()
  for path, leaf in traverse_util.flatten_dict(shapes_lib.param_shapes(module)).items():
    names = torch_layout.torch_names(path)
    piece = next((pieces[name] for name in names if name in pieces), None)
    if piece is None:
      _refuse(f"{file} has no array for {names[0]} (the name is diffusers'): get it again")
    expected = tuple(leaf.shape[axis] for axis in torch_layout.torch_axes(path, leaf.ndim))
    if (found := piece.shape(state)) != expected:
      _refuse(f"{file}: {piece.name} has shape {found}, expected {expected}")
    placed.add(piece.name)
  return placed
