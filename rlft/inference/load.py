"""Reads a model for sampling, evaluation or export: a run's newest checkpoint, or a directory."""

import dataclasses
from pathlib import Path
from typing import Any

from rlft.config import stored
from rlft.config.settings import Config
from rlft.models import lora as lora_lib
from rlft.models.files import pretrained
from rlft.models.stable_diffusion import StableDiffusion
from rlft.storage.checkpoint import Checkpointer
from rlft.types import UserError


@dataclasses.dataclass(frozen=True)
class Finetuned:
  """A model and where it comes from.

  Attributes:
    model: modules and final parameters; a LoRA is merged, averaged weights are used where kept.
    config: of the run; None for a plain directory.
    lora: the adapter of a run that trained one.
    lora_scale: factor of the adapter, alpha / rank.
    iteration: iterations done; 0 for a plain directory.
  """

  model: StableDiffusion
  config: Config | None = None
  lora: Any = None
  lora_scale: float = 0.0
  iteration: int = 0


def load(path: str, *, ema: bool = True) -> Finetuned:
  """Loads a run's workdir, a model in the diffusers layout, 'org/name@revision' or 'emoji-sd'.

  Args:
    path: which.
    ema: use the averaged weights of a run that kept them.

  Raises:
    UserError: no model there, or the run's base model has changed.
  """
  workdir = Path(path)
  if not (workdir / "checkpoints").is_dir():
    return Finetuned(pretrained.load(path))
  checkpointer = Checkpointer(workdir / "checkpoints", read_only=True)
  restored = checkpointer.restore_numpy()
  checkpointer.close()
  if restored is None:
    raise UserError(
      f"{path} has no checkpoint yet: wait for the run's first, or give another model"
    )
  state, meta = restored
  config = stored.from_json(meta["config"])
  base = pretrained.load(config.pretrained, identify=True)
  if base.fingerprint != meta["base_model"]:
    raise UserError(
      f"the run in {path} was trained from another {config.pretrained} than is there now:"
      " restore that directory"
    )
  params = state["ema"] if ema and state.get("ema") else _full_precision(state)
  adapter, scale = None, 0.0
  if config.policy.lora_rank:
    adapter, scale = params, lora_lib.scale(config.policy.lora_rank, config.policy.lora_alpha)
    params = lora_lib.merge(base.params["unet"], adapter, scale)
  model = dataclasses.replace(base, params={**base.params, "unet": params}, fingerprint="")
  return Finetuned(model, config, adapter, scale, meta["cursor"]["iteration"])


def _full_precision(state: dict[str, Any]) -> Any:
  """As `optimizer.full_precision`, of a state without its types."""
  opt = state["opt"]
  return opt["master"] if isinstance(opt, dict) and "master" in opt else state["params"]
