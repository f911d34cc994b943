"""Reads a model for sampling, evaluation or export: a run's newest checkpoint, or a directory."""

import dataclasses
from typing import Any

from rlft.config import stored
from rlft.config.settings import Config
from rlft.inference import runs
from rlft.models import lora as lora_lib
from rlft.models import scheduler_config
from rlft.models.files import lora_files, pretrained
from rlft.models.stable_diffusion import StableDiffusion
from rlft.storage import files
from rlft.storage.checkpoint import Checkpointer
from rlft.types import UserError


@dataclasses.dataclass(frozen=True)
class Finetuned:
  """A model and where it comes from.

  Attributes:
    model: modules and final parameters; a LoRA is merged, averaged weights are used where kept.
    config: of the run; None for a plain directory.
    lora: the adapter of a run that trained one; one from a file is in the model alone.
    lora_scale: factor of the adapter, alpha / rank.
    iteration: iterations done; 0 for a plain directory.
    started_in: where the run was started, as far as it says so; '' for a plain directory.
    averaged: the parameters are the average that the run kept.
  """

  model: StableDiffusion
  config: Config | None = None
  lora: Any = None
  lora_scale: float = 0.0
  iteration: int = 0
  started_in: str = ""
  averaged: bool = False


def load(
  path: str,
  *,
  ema: bool = True,
  base: str = "",
  scheduler: str = "",
  image_size: str = "",
  lora: str = "",
) -> Finetuned:
  """Loads a run's workdir, or a model as `pretrained.find` takes it.

  Args:
    path: which.
    ema: use the averaged weights of a run that kept them.
    base: where the run's base model is now; where it was, if ''.
    scheduler: options that stand above those of the run and of the model, see
      `scheduler_config.parse`.
    image_size: of the images to draw, see `stable_diffusion.parse_size`; the run's or else the
      model's own, if ''.
    lora: file of an adapter, see `lora_files`, that is merged into the model; none if ''.

  Raises:
    UserError: no model there, the run's base model has moved or changed, or the adapter is of
      another model.
  """
  found = _load(path, ema, base, scheduler, image_size)
  if not lora:
    return found
  params = found.model.params
  adapter = lora_files.load(lora, lora_lib.targets(params["unet"]))
  params = {**params, "unet": lora_lib.merge(params["unet"], adapter, 1.0)}
  return dataclasses.replace(found, model=dataclasses.replace(found.model, params=params))


def _load(path: str, ema: bool, base: str, scheduler: str, image_size: str) -> Finetuned:
  """What `load` gives without an adapter from a file."""
  if not runs.is_run(path):
    if base:
      raise UserError(f"--pretrained={base} has no effect: {path} is no run, leave it out")
    return Finetuned(pretrained.load(path, scheduler=scheduler, image_size=image_size))
  checkpointer = Checkpointer(files.path_of(path) / "checkpoints", read_only=True)
  restored = checkpointer.restore_numpy()
  checkpointer.close()
  if restored is None:
    raise UserError(
      f"{path} has no checkpoint yet: wait for the run's first, or give another model"
    )
  state, meta = restored
  config = stored.from_json(meta["config"])
  model = _load_base(path, base or config.pretrained, config, scheduler, image_size)
  if model.fingerprint != meta["base_model"]:
    raise UserError(
      f"the run in {path} was trained from another model than is now in"
      f" {base or config.pretrained}: restore that one, or give its place with --pretrained"
    )
  averaged = bool(ema and state.get("ema"))
  params = state["ema"] if averaged else _full_precision(state)
  adapter, scale = None, 0.0
  if config.policy.lora_rank:
    adapter, scale = params, lora_lib.scale(config.policy.lora_rank, config.policy.lora_alpha)
    params = lora_lib.merge(model.params["unet"], adapter, scale)
  model = dataclasses.replace(model, params={**model.params, "unet": params}, fingerprint="")
  iteration = meta["cursor"]["iteration"]
  started_in = meta.get("started_in", "")
  return Finetuned(model, config, adapter, scale, iteration, started_in, averaged)


def _load_base(
  path: str, base: str, config: Config, scheduler: str, image_size: str
) -> StableDiffusion:
  """The model at `base` that the run in `path` was trained from, set as the run was."""
  check_base(path, base)
  model = pretrained.load(
    base,
    identify=True,
    scheduler=config.policy.scheduler,
    image_size=image_size or config.policy.image_size,
  )
  options = {**model.scheduler, **scheduler_config.parse(scheduler)}
  return dataclasses.replace(model, scheduler=options)


def check_base(path: str, base: str) -> None:
  """Raises `UserError` if there is no model at `base`, from which the run in `path` was trained."""
  try:
    pretrained.find(base)
  except UserError as error:
    raise UserError(
      f"the base model of the run in {path}: {error}; if it has moved, give its place with"
      " --pretrained"
    ) from error


def _full_precision(state: dict[str, Any]) -> Any:
  """What `optimizer.full_precision` gives, of a state without its types."""
  opt = state["opt"]
  return opt["master"] if isinstance(opt, dict) and "master" in opt else state["params"]
