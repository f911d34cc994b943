"""A run's result for other programs: a model directory of diffusers, and the LoRA adapter alone."""

import os
import pathlib
from typing import Any

import numpy as np

from rlft.inference import card
from rlft.inference import load as finetuned
from rlft.models import stable_diffusion
from rlft.models.files import hub, lora_files, pretrained
from rlft.report.run_files import read_run
from rlft.storage import files
from rlft.types import UserError

_CARD = "README.md"


def export(
  workdir: str | os.PathLike[str],
  *,
  output: str | os.PathLike[str] | None = None,
  lora_output: str | os.PathLike[str] | None = None,
  lora_format: str = "peft",
  dtype: Any = np.float32,
  ema: bool = True,
  base: str = "",
  push_to_hub: str = "",
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
    push_to_hub: 'org/name' of the hub, where all that was written is uploaded; '' leaves it here.

  Returns:
    Lines that say what was written, and what is no longer as in the base model.

  Raises:
    UserError: the run cannot be read, has no LoRA, nothing can be written there, or the hub
      refuses.
  """
  for path in filter(None, (output, lora_output)):
    files.check_local(path)
  if push_to_hub:
    hub.check_upload(push_to_hub)
  found = finetuned.load(os.fspath(workdir), ema=ema, base=base)
  if lora_output and found.lora is None:
    raise UserError(
      f"{workdir} has no LoRA to write to {lora_output}: only a run with --lora_rank has one, give"
      " --output for the whole model"
    )
  readme = ""
  if found.config:
    adapter = "" if output or not lora_output else pathlib.Path(lora_output).name
    readme = card.card(read_run(workdir), found, repo=push_to_hub, adapter_file=adapter)
  said = []
  if output:
    pretrained.save(output, found.model, dtype=dtype)
    if readme:
      files.write_atomic(pathlib.Path(output) / _CARD, readme)
    said += [f"wrote {output}", *_changes(found)]
  if lora_output:
    lora_files.save(
      lora_output, found.lora, scale=found.lora_scale, format=lora_format, dtype=dtype
    )
    said.append(f"wrote {lora_output}")
  if push_to_hub:
    contents = _files(output, lora_output) | ({_CARD: readme.encode()} if readme else {})
    said.append(f"uploaded to {hub.upload(push_to_hub, contents)}")
  return said


def _files(
  output: str | os.PathLike[str] | None, lora_output: str | os.PathLike[str] | None
) -> dict[str, pathlib.Path | bytes]:
  """What was written, by its name in a repository."""
  found: dict[str, pathlib.Path | bytes] = {}
  if output:
    root = pathlib.Path(output)
    found |= {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
  if lora_output:
    found[pathlib.Path(lora_output).name] = pathlib.Path(lora_output)
  return found


def _changes(found: finetuned.Finetuned) -> list[str]:
  """What of a model's configuration is not what it was in its base model: a line for each."""
  said = []
  name = found.model.scheduler.get("_class_name")
  if name not in (None, "DDIMScheduler"):
    said.append(f"  scheduler: DDIM, which rlft samples with, in the place of {name}; same noise")
  if len(found.model.text_encoders) == 1:
    said.append("  no safety checker, whatever the base model had: give diffusers' pipeline one")
  policy = found.config.policy if found.config else None
  if policy and policy.scheduler:
    said.append(f"  scheduler: {policy.scheduler}, as the run was told")
  if policy and policy.image_size:
    height, width = stable_diffusion.image_size(found.model)
    said.append(f"  images of {height}x{width} pixels, as the run was told")
    if height != width and len(found.model.text_encoders) > 1:
      said.append(f"  diffusers' pipeline of XL has to be given {height=} and {width=}")
  return said
