"""What is in a Stable Diffusion directory of diffusers beside the weights, and writing it all."""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
import shutil
from typing import Any

import safetensors.numpy

from rlft.models.files import torch_layout, vocabulary
from rlft.models.scheduler_config import SchedulerConfig
from rlft.models.stable_diffusion import StableDiffusion

INDEX = "model_index.json"
_DIFFUSERS_VERSION = "0.39.0"
# The text encoders of each pipeline.
PIPELINES = {
  "StableDiffusionPipeline": ("text_encoder",),
  "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2"),
}
_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
STEMS = {
  "unet": _DIFFUSERS_WEIGHTS,
  "vae": _DIFFUSERS_WEIGHTS,
  "text_encoder": "model",
  "text_encoder_2": "model",
}
CLASSES = {
  "unet": "UNet2DConditionModel",
  "vae": "AutoencoderKL",
  "text_encoder": "CLIPTextModel",
  "text_encoder_2": "CLIPTextModelWithProjection",
}


def _write_json(path: pathlib.Path, data: Mapping[str, Any]) -> None:
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write(root: pathlib.Path, model: StableDiffusion, dtype: Any) -> None:
  """Writes every file of `model` below the existing directory `root`."""
  for name in describe(root, model):
    file = root / name / f"{STEMS[name]}.safetensors"
    # transformers refuses files that do not say which framework's layout they hold.
    safetensors.numpy.save_file(
      torch_layout.to_torch(model.params[name], dtype), file, metadata={"format": "pt"}
    )
    # safetensors makes files that only their owner can read.
    shutil.copymode(root / name / "config.json", file)


def describe(root: pathlib.Path, model: StableDiffusion) -> list[str]:
  """Writes everything but the weights; returns the names of the networks, which have a folder.

  Of a model without tokenizers, whose weights are random, none are written.
  """
  names = ("text_encoder", "text_encoder_2")[: len(model.text_encoders)]
  pipeline = next(name for name, texts in PIPELINES.items() if texts == names)
  index: dict[str, Any] = {
    "_class_name": pipeline,
    "_diffusers_version": _DIFFUSERS_VERSION,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
  }
  if len(names) == 1:
    index |= {"requires_safety_checker": False, "safety_checker": [None, None]}
  else:
    index |= {"force_zeros_for_empty_prompt": model.zero_empty}
  # Every option is said: the defaults of a scheduler's own class may be others.
  scheduler = dataclasses.asdict(SchedulerConfig.from_dict(model.scheduler))
  scheduler |= {"_class_name": "DDIMScheduler", "_diffusers_version": _DIFFUSERS_VERSION}
  _write_json(root / "scheduler" / "scheduler_config.json", scheduler)

  modules = {"unet": model.unet, "vae": model.vae}
  modules |= zip(names, model.text_encoders, strict=True)
  for name, module in modules.items():
    config = dataclasses.asdict(module.config)
    if name in names:
      # The type to compute in, whatever `dtype` the file has: newer transformers would take the
      # file's, and a half precision text encoder does not fit the other networks.
      config |= {"model_type": "clip_text_model", "architectures": [CLASSES[name]]}
      config |= {"torch_dtype": "float32"}
    else:
      config |= {"_class_name": CLASSES[name], "_diffusers_version": _DIFFUSERS_VERSION}
    _write_json(root / name / "config.json", config)
    index[name] = ["transformers" if name in names else "diffusers", CLASSES[name]]
  for name, tokenizer in zip(names, model.tokenizers, strict=bool(model.tokenizers)):
    name = name.replace("text_encoder", "tokenizer")
    vocabulary.write_clip(root / name, tokenizer)
    index[name] = ["transformers", "CLIPTokenizer"]
  _write_json(root / INDEX, index)
  return list(modules)
