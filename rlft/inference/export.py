"""A run's result for other programs: a model directory of diffusers, and the LoRA adapter alone."""

import os
from typing import Any

import numpy as np

from rlft.inference import load as finetuned
from rlft.models import stable_diffusion
from rlft.models.files import lora_files, pretrained
from rlft.storage import files
from rlft.types import UserError


def export(
  workdir: str | os.PathLike[str],
  *,
  output: str | os.PathLike[str] | None = None,
  lora_output: str | os.PathLike[str] | None = None,
  lora_format: str = "peft",
  dtype: Any = np.float32,
  ema: bool = True,
  base: str = "",
) -> list[str]:
  """Writes what a run has trained so far.

  Args:
    workdir: of the run; its newest checkpoint is taken.
    output: directory for the whole model (a LoRA is merged into it), replaced if it holds a model.
    lora_output: safetensors file for the adapter, to be used with the base model.
    lora_format: of that file, see `lora_files`.
    dtype: of the stored weights of both, float32 or float16.
    ema: the averaged weights, where the run has them.
    base: where the run's base model is now, if it has moved.

  Returns:
    Lines that say what was written, and what is no longer as in the base model.

  Raises:
    UserError: the run cannot be read, has no LoRA, or nothing can be written there.
  """
  for path in filter(None, (output, lora_output)):
    files.check_local(path)
  found = finetuned.load(os.fspath(workdir), ema=ema, base=base)
  if lora_output and found.lora is None:
    raise UserError(
      f"{workdir} has no LoRA to write to {lora_output}: only a run with --lora_rank has one, give"
      " --output for the whole model"
    )
  said = []
  if output:
    pretrained.save(output, found.model, dtype=dtype)
    said += [f"wrote {output}", *_changes(found)]
  if lora_output:
    lora_files.save(
      lora_output, found.lora, scale=found.lora_scale, format=lora_format, dtype=dtype
    )
    said.append(f"wrote {lora_output}")
  return said


def _changes(found: finetuned.Finetuned) -> list[str]:
  """What of a model's configuration is not what it was in its base model: a line for each."""
  said = []
  name = found.model.scheduler.get("_class_name")
  if name not in (None, "DDIMScheduler"):
    said.append(f"  scheduler: DDIM, which rlft samples with, in the place of {name}; same noise")
  policy = found.config.policy if found.config else None
  if policy and policy.scheduler:
    said.append(f"  scheduler: {policy.scheduler}, as the run was told")
  if policy and policy.image_size:
    height, width = stable_diffusion.image_size(found.model)
    said.append(f"  images of {height}x{width} pixels, as the run was told")
    if height != width and len(found.model.text_encoders) > 1:
      said.append(f"  diffusers' pipeline of XL has to be given {height=} and {width=}")
  return said
