"""Writes a run's model as a directory for diffusers, and its LoRA as a file of its own.

python launch/export.py --workdir=runs/emoji_joint --output=exported
python launch/export.py --workdir=runs/emoji_joint --output=exported --push_to_hub=org/name
"""

import dataclasses

import numpy as np

from rlft.config import flags
from rlft.config.fields import option
from rlft.config.settings import OutputSettings
from rlft.inference.export import export
from rlft.models.files import lora_files
from rlft.types import UserError


@dataclasses.dataclass(frozen=True)
class ExportSettings:
  """What is written, and where to; each field is a flag of the same name."""

  pretrained: str = option("the base model of the run, if it has moved since", "", path=True)
  ema: bool = option("use the averaged weights (EMA), if the run has them", True)
  output: str = option(
    "directory for the whole model in the diffusers layout; a LoRA is merged into it", "", path=True
  )
  lora_output: str = option(
    "safetensors file for the LoRA alone, to be used with the base model", "", path=True
  )
  lora_format: str = option(
    "format of --lora_output: peft for diffusers; kohya for Kohya's scripts and other programs",
    "peft",
    choices=lora_files.FORMATS,
  )
  push_to_hub: str = option(
    "org/name on the Hugging Face hub: upload what was written, with a model card; a repository"
    " that does not exist is created as a PUBLIC one",
    "",
  )
  dtype: str = option("type of the stored weights", "float32", choices=("float32", "float16"))


flags.define(OutputSettings, "workdir")
flags.define(ExportSettings)


def main() -> None:
  workdir, settings = flags.read(OutputSettings).workdir, flags.read(ExportSettings)
  if not workdir:
    raise UserError("--workdir is missing: give the directory of a run")
  if not (settings.output or settings.lora_output):
    raise UserError("there is nothing to write: give --output, --lora_output or both")
  said = export(
    workdir,
    output=settings.output or None,
    lora_output=settings.lora_output or None,
    lora_format=settings.lora_format,
    dtype=np.dtype(settings.dtype),
    ema=settings.ema,
    base=settings.pretrained,
    push_to_hub=settings.push_to_hub,
  )
  print("\n".join(said))


if __name__ == "__main__":
  flags.main(main)
