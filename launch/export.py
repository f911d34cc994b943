"""Writes a run's model as a directory for diffusers, and its LoRA as a file of its own.

python launch/export.py --workdir=runs/emoji_joint --output=exported
python launch/export.py --workdir=runs/emoji_joint --output=exported --push_to_hub=org/name
"""

from absl import flags
import numpy as np

from rlft.config import flags as cli
from rlft.config.settings import OutputSettings
from rlft.inference.draw import Drawing
from rlft.inference.export import export
from rlft.models.files import lora_files
from rlft.types import UserError

cli.define(OutputSettings, "workdir")
cli.define(Drawing, "pretrained", "ema")
_OUTPUT = flags.DEFINE_string("output", None, "directory for the model, a LoRA merged into it")
_LORA_OUTPUT = flags.DEFINE_string(
  "lora_output", None, "safetensors file for the LoRA alone, to be used with the base model"
)
_LORA_FORMAT = flags.DEFINE_enum(
  "lora_format",
  "peft",
  lora_files.FORMATS,
  "of --lora_output: peft for diffusers; kohya for Kohya's scripts and other interfaces",
)
_PUSH_TO_HUB = flags.DEFINE_string(
  "push_to_hub",
  "",
  "org/name on the Hugging Face hub: what was written is uploaded there, with its model card; a"
  " repository that is not there yet is made, for everybody to read",
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ("float32", "float16"), "of the stored weights")


def main() -> None:
  workdir, output, lora_output = cli.read(OutputSettings).workdir, _OUTPUT.value, _LORA_OUTPUT.value
  if not workdir:
    raise UserError("--workdir is missing: give the directory of a run")
  if not (output or lora_output):
    raise UserError("there is nothing to write: give --output, --lora_output or both")
  dtype = np.dtype(_DTYPE.value)
  said = export(
    workdir,
    output=output,
    lora_output=lora_output,
    lora_format=_LORA_FORMAT.value,
    dtype=dtype,
    ema=flags.FLAGS.ema,
    base=flags.FLAGS.pretrained,
    push_to_hub=_PUSH_TO_HUB.value,
  )
  print("\n".join(said))


if __name__ == "__main__":
  cli.main(main)
