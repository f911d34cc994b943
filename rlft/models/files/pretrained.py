"""Stable Diffusion models on disk, in the directory layout of diffusers with safetensors.

    model_index.json
    unet/          config.json  diffusion_pytorch_model.safetensors
    vae/           config.json  diffusion_pytorch_model.safetensors
    text_encoder/  config.json  model.safetensors
    tokenizer/     tokenizer.json, or vocab.json and merges.txt  tokenizer_config.json
    scheduler/     scheduler_config.json

and, for SDXL, `text_encoder_2/` and `tokenizer_2/`. Weights may be in shards with an index, and in
half precision (`...fp16.safetensors`); other files are not looked at. They are in PyTorch's names
and layouts; see `torch_layout`.
"""

from collections.abc import Collection, Mapping
import os
import pathlib
import shutil
import tempfile
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from rlft.config.settings import EMOJI_SD
from rlft.models import clip, diffusers_unet, scheduler_config, stable_diffusion, unet, vae
from rlft.models import config as config_lib
from rlft.models.files import (
  arrays,
  diffusers_layout,
  hub,
  single_file,
  sources,
  streaming,
  vocabulary,
)
from rlft.models.files.diffusers_layout import CLASSES, INDEX, PIPELINES, STEMS
from rlft.models.shapes import param_shapes
from rlft.models.stable_diffusion import StableDiffusion
from rlft.storage.files import staged
from rlft.types import UserError

EMOJI_SD_PATH = pathlib.Path(__file__).parents[2] / "emoji" / "data" / EMOJI_SD

_CONFIGS = {
  "unet": unet.UNetConfig,
  "vae": vae.VAEConfig,
  "text_encoder": clip.CLIPTextConfig,
  "text_encoder_2": clip.CLIPTextConfig,
}
_MODULES = {
  "unet": unet.UNet2DCondition,
  "vae": vae.AutoencoderKL,
  "text_encoder": clip.CLIPTextEncoder,
  "text_encoder_2": clip.CLIPTextEncoderWithProjection,
}


def find(path: str | os.PathLike[str]) -> str | pathlib.Path | single_file.Source:
  """Where the model is that a user names: a directory, or a hub's repository as `sources` takes it.

  Args:
    path: a directory in the diffusers layout, 'org/name@revision', a single file with its
      tokenizer (see `single_file`), or 'emoji-sd'.

  Raises:
    UserError: there is no such model; the message begins with `path`.
  """
  if str(path) == EMOJI_SD:
    return EMOJI_SD_PATH
  path = staged(path)
  if (file := single_file.parse(str(path))) is not None:
    single_file.check(file)
    return file
  source = pathlib.Path(path) if pathlib.Path(path).is_dir() else str(path)
  if isinstance(source, str):
    repository = hub.parse(source)
    if repository is None or repository.file is not None:
      raise UserError(
        f"{path} is not a directory: give a Stable Diffusion model in the diffusers layout, a hub's"
        f" org/name@revision, a {' or '.join(single_file.SUFFIXES)} file, or {EMOJI_SD}"
      )
    if repository.revision is None:
      raise UserError(
        f"{path} is not a directory here, and as a hub's repository it needs a revision, since its"
        f" files may change: write {path}@<commit hash>"
      )
  if sources.find_file(source, INDEX) is None:
    raise UserError(
      f"{path} has no {INDEX}: give the top directory of a model in the diffusers layout, or"
      f" {EMOJI_SD}"
    )
  return source


def _read_json(source: str | pathlib.Path, name: str) -> dict[str, Any]:
  if (file := sources.find_file(source, name)) is None:
    raise UserError(f"{source}/{name} does not exist; get the whole model again")
  return sources.read_json(file)


def _check_class(where: str, found: Any, expected: Collection[str]) -> None:
  if not isinstance(found, str) or found not in expected:
    raise UserError(
      f"{where}: _class_name is {found!r}, expected {' or '.join(map(repr, expected))}; "
      f"{config_lib.USE_SUPPORTED}"
    )


def _check_type(where: str, key: str, found: Any, kind: type) -> None:
  if not isinstance(found, kind):
    raise UserError(
      f"{where}: {key} is {str(found)[:100]!r}, no {kind.__name__}; get the file again"
    )


def _open_weights(source: str | pathlib.Path, name: str) -> tuple[Mapping[str, np.ndarray], str]:
  """The arrays of a component, and what to call their file."""
  # Whole, else in shards; full precision, else half.
  stem = f"{name}/{STEMS[name]}"
  names = (f"{stem}.safetensors", f"{stem}.fp16.safetensors")
  files = sources.find_files(source, names)
  if not files:
    raise UserError(
      f"{source}/{names[0]} does not exist; a model with .bin files has to be saved again by "
      "diffusers with safe_serialization=True"
    )
  state = arrays.read_files(files)
  if name.startswith("text_encoder"):
    state = _with_tower(state)
  return state, str(files[0] if len(files) == 1 else f"{source}/{name}")


def _with_tower(state: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
  """The arrays of a text encoder with the first part of their names, which transformers 5 drops."""
  tower = "text_model."
  if any(name.startswith(tower) for name in state):
    return state
  return arrays.Pieces(state, {f"{tower}{name}": arrays.Piece(name) for name in state})


def load(
  path: str | os.PathLike[str],
  *,
  dtype: Any = jnp.float32,
  remat: bool = False,
  attention: str = "auto",
  backend: str = "rlft",
  place: streaming.Place | None = None,
  identify: bool = False,
  scheduler: str = "",
  image_size: str = "",
  weights: bool = True,
) -> StableDiffusion:
  """Reads a model in the diffusers layout, or in one file.

  Args:
    path: as `find` takes it.
    dtype: type that the UNet computes in; VAE and text encoders compute in float32.
    remat, attention: see `UNet2DCondition`.
    backend: whose UNet, 'rlft' or 'diffusers' (see `diffusers_unet`).
    place: where each parameter belongs, see `streaming.read`; None leaves them on the host.
    identify: whether to set the model's `fingerprint`; all processes have to do the same.
    scheduler: options in the place of the model's own, see `scheduler_config.parse`.
    image_size: of the images to draw, see `stable_diffusion.parse_size`.
    weights: False reads no parameters, and fetches none from the hub: they are shapes.

  Returns:
    the model; parameters are float32, also where the files hold half precision: numpy arrays
    without `place`, else JAX's; without `weights`, `jax.ShapeDtypeStruct`s.

  Raises:
    UserError: something is missing, is not a Stable Diffusion that is supported, or does not fit.
  """
  source, options = find(path), scheduler_config.parse(scheduler)
  if isinstance(source, single_file.Source):
    contents = single_file.read(source, options)
  else:
    contents = _read_directory(source, options, weights)
  modules = contents.modules
  config = stable_diffusion.sized(
    modules["unet"].config,
    modules["vae"].config,
    stable_diffusion.parse_size(image_size),
    what=f"{source}/unet/config.json",
  )
  network = modules["unet"].clone(config=config, dtype=dtype, remat=remat, attention=attention)
  if weights:
    params, fingerprint = streaming.read(
      modules, contents.states, what=contents.what, place=place, identify=identify
    )
  else:
    params, fingerprint = {name: param_shapes(module) for name, module in modules.items()}, ""
  return StableDiffusion(
    unet=diffusers_unet.make(network) if backend == "diffusers" else network,
    vae=modules["vae"],
    text_encoders=tuple(m for name, m in modules.items() if name.startswith("text_encoder")),
    tokenizers=contents.tokenizers,
    scheduler=contents.scheduler,
    params=params,
    zero_empty=contents.zero_empty,
    fingerprint=fingerprint,
  )


def _read_directory(
  source: str | pathlib.Path, scheduler: Mapping[str, Any], weights: bool
) -> single_file.Contents:
  """A model in the diffusers layout before its parameters are read; see `single_file.read`.

  Without `weights` nothing is said of them, and their files need not be there.
  """
  index = _read_json(source, INDEX)
  _check_class(f"{source}/{INDEX}", index.get("_class_name"), PIPELINES)
  texts = PIPELINES[index["_class_name"]]
  modules = {}
  for name in ("unet", "vae", *texts):
    file = f"{name}/config.json"
    found = _read_json(source, file)
    if name not in texts:
      _check_class(f"{source}/{file}", found.get("_class_name"), (CLASSES[name],))
    modules[name] = _MODULES[name](_CONFIGS[name].from_dict(found, f"{source}/{file}"))
  file = "scheduler/scheduler_config.json"
  options = {**_read_json(source, file), **scheduler}
  scheduler_config.SchedulerConfig.from_dict(options, f"{source}/{file}")
  # Which of the two names diffusers believes depends on how it is asked.
  named = index.get("scheduler") or [None, None]
  _check_type(f"{source}/{INDEX}", "scheduler", named, list)
  scheduler_config.check_class(named[-1], f"{source}/{INDEX}")
  # As in diffusers, where SDXL's index does not say.
  zero_empty = index.get("force_zeros_for_empty_prompt", True)
  _check_type(f"{source}/{INDEX}", "force_zeros_for_empty_prompt", zero_empty, bool)
  tokenizers = tuple(
    vocabulary.open_clip(
      source, modules[name].config, folder=name.replace("text_encoder", "tokenizer")
    )
    for name in texts
  )
  opened = {name: _open_weights(source, name) for name in modules if weights}
  return single_file.Contents(
    modules=modules,
    states={name: state for name, (state, _) in opened.items()},
    what={name: file for name, (_, file) in opened.items()},
    tokenizers=tokenizers,
    scheduler=options,
    zero_empty=len(texts) > 1 and zero_empty,
  )


def save(path: str | os.PathLike[str], model: StableDiffusion, *, dtype: Any = np.float32) -> None:
  """Writes a model so that `load` and diffusers' `DiffusionPipeline` read it.

  The scheduler becomes DDIM, which is what the model was trained with, with the same noise.

  Everything is written to a new directory beside `path`, which then takes its place: at `path`
  there is the former model or the whole new one, but for the moment between two renames.

  Args:
    path: the directory; an existing one is replaced if it holds a model or nothing.
    model: what to write.
    dtype: of the stored weights, float32 or float16.

  Raises:
    UserError: `path` holds something else, or cannot be written.
  """
  root = pathlib.Path(path).absolute()
  if root.exists() and not (root / INDEX).exists():
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
    diffusers_layout.write(new, model, dtype)
    if root.exists():
      root.rename(old)
    try:
      new.rename(root)
    except BaseException:  # Ctrl-C, too.
      if old.exists() and not root.exists():
        old.rename(root)
      raise
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(
      f"{root} cannot be written ({error}); free some space or give another directory"
    ) from error
  finally:
    shutil.rmtree(workspace, ignore_errors=True)
