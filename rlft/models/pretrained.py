"""Stable Diffusion models on disk, in the directory layout of diffusers with safetensors.

    model_index.json
    unet/          config.json  diffusion_pytorch_model.safetensors
    vae/           config.json  diffusion_pytorch_model.safetensors
    text_encoder/  config.json  model.safetensors
    tokenizer/     vocab.json  merges.txt  tokenizer_config.json  special_tokens_map.json
    scheduler/     scheduler_config.json

The weights are in PyTorch's names and layouts; see `torch_layout`.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

from flax import traverse_util
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import transformers

from rlft.models import clip, torch_layout, unet, vae, weights
from rlft.models.torch_layout import Params
from rlft.types import UserError

EMOJI_SD = "emoji-sd"
EMOJI_SD_PATH = pathlib.Path(__file__).parents[1] / "emoji" / "data" / EMOJI_SD

_PIPELINE = "StableDiffusionPipeline"
_DIFFUSERS_VERSION = "0.39.0"
_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
_WEIGHTS = {"unet": _DIFFUSERS_WEIGHTS, "vae": _DIFFUSERS_WEIGHTS, "text_encoder": "model"}
_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}


@dataclasses.dataclass(frozen=True)
class StableDiffusion:
  """A text-to-image model: three networks, their parameters, and what belongs to them.

  Attributes:
    unet, vae, text_encoder: the Flax modules (with their configs).
    tokenizer: text to token ids.
    scheduler: the parsed `scheduler_config.json`.
    params: `{'unet': ..., 'vae': ..., 'text_encoder': ...}`, float32 trees (numpy after `load`).
  """

  unet: unet.UNet2DCondition
  vae: vae.AutoencoderKL
  text_encoder: clip.CLIPTextEncoder
  tokenizer: transformers.CLIPTokenizer
  scheduler: Mapping[str, Any]
  params: Params


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  if not path.exists():
    raise UserError(
      f"{path} does not exist; give a Stable Diffusion model in the diffusers layout, or {EMOJI_SD}"
    )
  return weights.read_json(path)


def _check_class(path: pathlib.Path, found: str | None, expected: str) -> None:
  if found != expected:
    raise UserError(
      f"{path}: _class_name is {found!r}, expected {expected!r}; "
      "use a Stable Diffusion 1.x or 2.x model"
    )


def _load_params(module: Any, directory: pathlib.Path, stem: str) -> Params:
  # Whole, else in shards; full precision, else half.
  names = (f"{stem}.safetensors", f"{stem}.fp16.safetensors")
  files = weights.find_files(directory, names)
  if not files:
    raise UserError(
      f"{directory / names[0]} does not exist; a model with .bin files has to be saved "
      "again by diffusers with safe_serialization=True"
    )
  what = str(files[0] if len(files) == 1 else directory)
  return torch_layout.from_torch(module, weights.read_files(files), what=what)


def load(
  path: str | os.PathLike[str], *, dtype: Any = jnp.float32, remat: bool = False
) -> StableDiffusion:
  """Reads a model from a directory in the diffusers layout.

  Args:
    path: the directory, or 'emoji-sd' for the model that comes with the library.
    dtype: type that the UNet computes in; VAE and text encoder compute in float32.
    remat: see `UNet2DCondition`.

  Returns:
    the model; parameters are numpy float32 arrays, also where the files hold half precision.

  Raises:
    UserError: something is missing, is not Stable Diffusion 1.x or 2.x, or does not fit.
  """
  root = EMOJI_SD_PATH if str(path) == EMOJI_SD else pathlib.Path(path)
  if not root.is_dir():
    raise UserError(
      f"model {str(root)!r} is not a directory; give a Stable Diffusion model in the diffusers "
      f"layout, or {EMOJI_SD}"
    )
  index = root / "model_index.json"
  _check_class(index, _read_json(index).get("_class_name"), _PIPELINE)
  configs = {}
  for name, class_name in _CLASSES.items():
    file = root / name / "config.json"
    configs[name] = _read_json(file)
    if name != "text_encoder":
      _check_class(file, configs[name].get("_class_name"), class_name)

  def what(name: str) -> str:
    return str(root / name / "config.json")

  modules = {
    "unet": unet.UNet2DCondition(
      unet.UNetConfig.from_dict(configs["unet"], what("unet")), dtype=dtype, remat=remat
    ),
    "vae": vae.AutoencoderKL(vae.VAEConfig.from_dict(configs["vae"], what("vae"))),
    "text_encoder": clip.CLIPTextEncoder(
      clip.CLIPTextConfig.from_dict(configs["text_encoder"], what("text_encoder"))
    ),
  }
  scheduler = _read_json(root / "scheduler" / "scheduler_config.json")
  tokenizer = weights.open_tokenizer(root / "tokenizer")
  params = {
    name: _load_params(module, root / name, _WEIGHTS[name]) for name, module in modules.items()
  }
  return StableDiffusion(**modules, tokenizer=tokenizer, scheduler=scheduler, params=params)


def _write_json(path: pathlib.Path, data: Mapping[str, Any]) -> None:
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write(root: pathlib.Path, model: StableDiffusion, dtype: Any) -> None:
  """Writes every file of `model` below the existing directory `root`."""
  scheduler = {"_class_name": "DDIMScheduler", **model.scheduler}
  scheduler["_diffusers_version"] = _DIFFUSERS_VERSION
  _write_json(root / "scheduler" / "scheduler_config.json", scheduler)
  for name, class_name in _CLASSES.items():
    config = dataclasses.asdict(getattr(model, name).config)
    if name == "text_encoder":
      # The type to compute in, whatever `dtype` the file has: newer transformers would take the
      # file's, and a half precision text encoder does not fit the other networks.
      config |= {"model_type": "clip_text_model", "architectures": [class_name]}
      config |= {"torch_dtype": "float32"}
    else:
      config |= {"_class_name": class_name, "_diffusers_version": _DIFFUSERS_VERSION}
    _write_json(root / name / "config.json", config)
    file = root / name / f"{_WEIGHTS[name]}.safetensors"
    # transformers refuses files that do not say which framework's layout they hold.
    safetensors.numpy.save_file(
      torch_layout.to_torch(model.params[name], dtype), file, metadata={"format": "pt"}
    )
    # safetensors makes files that only their owner can read.
    shutil.copymode(root / name / "config.json", file)
  model.tokenizer.save_pretrained(str(root / "tokenizer"))
  _write_json(
    root / "model_index.json",
    {
      "_class_name": _PIPELINE,
      "_diffusers_version": _DIFFUSERS_VERSION,
      "feature_extractor": [None, None],
      "image_encoder": [None, None],
      "requires_safety_checker": False,
      "safety_checker": [None, None],
      "scheduler": ["diffusers", scheduler["_class_name"]],
      "text_encoder": ["transformers", _CLASSES["text_encoder"]],
      "tokenizer": ["transformers", "CLIPTokenizer"],
      "unet": ["diffusers", _CLASSES["unet"]],
      "vae": ["diffusers", _CLASSES["vae"]],
    },
  )


def save(path: str | os.PathLike[str], model: StableDiffusion, *, dtype: Any = np.float32) -> None:
  """Writes a model so that `load` and diffusers' `StableDiffusionPipeline` read it.

  Everything is written to a new directory beside `path`, which then takes its place: whoever looks
  at `path` sees the former model or the whole new one.

  Args:
    path: the directory; an existing one is replaced if it holds a model or nothing.
    model: what to write.
    dtype: of the stored weights, float32 or float16.

  Raises:
    UserError: `path` holds something else, or cannot be written.
  """
  root = pathlib.Path(path).absolute()
  if root.exists() and not (root / "model_index.json").exists():
    if not root.is_dir() or any(root.iterdir()):
      raise UserError(
        f"{root} exists and is not a model; give another directory, or remove it first"
      )
  try:
    root.parent.mkdir(parents=True, exist_ok=True)
    workspace = pathlib.Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
  except OSError as error:
    raise UserError(f"{root} cannot be written ({error}); give another one") from error
  new, old = workspace / "new", workspace / "old"
  try:
    new.mkdir()
    _write(new, model, dtype)
    if root.exists():
      root.rename(old)
    try:
      new.rename(root)
    except OSError:
      if old.exists():
        old.rename(root)
      raise
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(
      f"{root} cannot be written ({error}); free some space or give another directory"
    ) from error
  finally:
    shutil.rmtree(workspace, ignore_errors=True)


def fingerprint(params: Params) -> str:
  """SHA-256 (hexadecimal) of names, shapes, types and bits of a parameter tree."""
  digest = hashlib.sha256()
  for path, array in sorted(traverse_util.flatten_dict(params).items()):
    array = np.ascontiguousarray(array)
    digest.update(f"{'/'.join(path)} {array.dtype} {array.shape};".encode())
    digest.update(array.tobytes())
  return digest.hexdigest()
