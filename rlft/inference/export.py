"""A run's result for other programs: a model directory of diffusers, and the LoRA adapter alone."""

import os
from typing import Any

import numpy as np

from rlft.inference import load as finetuned
from rlft.models.files import lora_files, pretrained
from rlft.types import UserError


def export(
  workdir: str | os.PathLike[str],
  *,
  output: str | os.PathLike[str] | None = None,
  lora_output: str | os.PathLike[str] | None = None,
  lora_format: str = "peft",
  dtype: Any = np.float32,
  ema: bool = True,
) -> None:
  """Writes what a run has trained so far.

  Args:
    workdir: of the run; its newest checkpoint is taken.
    output: directory for the whole model (a LoRA is merged into it), replaced if it holds a model.
    lora_output: safetensors file for the adapter, to be used with the base model.
    lora_format: of that file, see `lora_files`.
    dtype: of the stored weights of both, float32 or float16.
    ema: the averaged weights, where the run has them.

  Raises:
    UserError: the run cannot be read, has no LoRA, or nothing can be written there.
  """
  found = finetuned.load(os.fspath(workdir), ema=ema)
  if lora_output and found.lora is None:
    raise UserError(
      f"{workdir} has no LoRA to write to {lora_output}: only a run with --lora_rank has one, give"
      " --output for the whole model"
    )
  if lora_output:
    lora_files.save(
      lora_output, found.lora, scale=found.lora_scale, format=lora_format, dtype=dtype
    )
  if output:
    pretrained.save(output, found.model, dtype=dtype)
