"""Draws images with a run's model, or any in the diffusers layout, as one PNG.

python launch/sample.py --model=runs/emoji_joint --prompt="a dog and a car" --output=grid.png
"""

import dataclasses

from rlft import catalog
from rlft.config import flags
from rlft.config.fields import option
from rlft.inference.draw import Drawing, save_grid


@dataclasses.dataclass(frozen=True)
class SampleSettings:
  """What is drawn, and where to; each field is a flag of the same name."""

  prompt: tuple[str, ...] = option("a prompt to draw; may be given several times", ())
  prompts: str = option(
    "a source of further prompts, as for a task of launch/train.py, e.g. prompts.txt[:10]", ""
  )
  max_prompts: int = option(
    "at most this many of --prompts are drawn, spread evenly over the source", 32, least=1
  )
  images_per_prompt: int = option("images drawn for each prompt", 4, least=1)
  output: str = option("the PNG file; a row for each prompt", "grid.png", path=True)


flags.define(Drawing)
flags.define(SampleSettings)


def main() -> None:
  settings = flags.read(SampleSettings)
  texts = list(settings.prompt)
  if settings.prompts:
    source = catalog.load_prompts(settings.prompts)
    count = min(len(source), settings.max_prompts)
    texts += [source[place * len(source) // count].text for place in range(count)]
  per_prompt = settings.images_per_prompt
  print(save_grid(flags.read(Drawing), texts, settings.output, images_per_prompt=per_prompt))


if __name__ == "__main__":
  flags.main(main)
