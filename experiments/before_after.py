"""Draws the README's picture: a run's model beside its base, the same test prompts and noise.

    python experiments/before_after.py --run=runs/emoji_joint --output=docs/emoji_joint.png

Three panels: the base model at the guidance at which the run samples, the base at the guidance that
is best for each evaluation (`base_guidance` of the preset emoji), and the run's model. A block for
each evaluation. Nothing is chosen: the prompts are spread evenly over the test split, and each has
the noise of its place. Duration: a minute on 2 cores.
"""

import argparse
import itertools
import sys

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from rlft import catalog
from rlft.config.tasks import EVAL_PRESETS
from rlft.inference.draw import Drawer, Drawing
from rlft.storage import images as images_lib
from rlft.types import UserError

# {evaluation: (prompts, images of each)}
BLOCKS = {"parity": (1, 16), "both": (16, 1), "preference": (16, 1)}
ACROSS, SCALE, MARGIN, LINE = 8, 2, 24, 28


def prompts_of(source: str, count: int) -> list[str]:
  """So many of the prompts of a source, spread evenly."""
  found = catalog.load_prompts(source)
  return [found[(place + 1) * len(found) // (count + 1)].text for place in range(count)]


def panel(draws: dict[str, Drawer], texts: dict[str, list[str]]) -> np.ndarray:
  """The blocks of one model below each other, `[H, W, 3]` uint8."""
  blocks = []
  for name, found in texts.items():
    images = draws[name](found, progress=name)
    blocks.append(images_lib.grid(images, ACROSS, scale=SCALE))
  spacer = np.full((MARGIN // 2, blocks[0].shape[1], 3), 255, np.uint8)
  parts = itertools.chain.from_iterable((block, spacer) for block in blocks)
  return np.concatenate(list(parts)[:-1])


def picture(run: str) -> PIL.Image.Image:
  after = Drawer(Drawing(model=run))
  config, guidance = after.found.config, after.settings["guidance_scale"]
  if config is None:
    raise UserError(f"{run} is no run of launch/train.py: give its --workdir")
  presets = {preset.name: preset for preset in EVAL_PRESETS["emoji"]}
  texts = {
    name: [text for text in prompts_of(presets[name].prompts, count) for _ in range(each)]
    for name, (count, each) in BLOCKS.items()
  }

  def base(scale):
    return Drawer(
      Drawing(
        model=config.pretrained,
        guidance_scale=scale,
        sampling_steps=after.settings["sampling_steps"],
        seed=after.settings["seed"],
      )
    )

  best = {name: presets[name].base_guidance for name in BLOCKS}
  drawers = {scale: base(scale) for scale in {guidance, *best.values()}}
  scales = ", ".join(f"{best[name]:g}" for name in BLOCKS)
  panels = {
    f"base, guidance {guidance:g}": {name: drawers[guidance] for name in BLOCKS},
    f"base, each block at its best guidance ({scales})": {n: drawers[best[n]] for n in BLOCKS},
    f"after {config.iterations} iterations, guidance {guidance:g}": {n: after for n in BLOCKS},
  }
  shown = [panel(draws, texts) for draws in panels.values()]
  height, width = shown[0].shape[:2]
  whole = PIL.Image.new("RGB", (len(shown) * (width + MARGIN) - MARGIN, height + LINE), "white")
  write = PIL.ImageDraw.Draw(whole)
  for place, (title, pixels) in enumerate(zip(panels, shown, strict=True)):
    left = place * (width + MARGIN)
    write.text((left, 4), title, fill="black", font=PIL.ImageFont.load_default(18))
    whole.paste(PIL.Image.fromarray(pixels), (left, LINE))
  return whole


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--run", required=True, help="the run's directory")
  parser.add_argument("--output", required=True, help="the PNG file")
  args = parser.parse_args()
  try:
    images_lib.save_png(args.output, np.asarray(picture(args.run)))
  except UserError as error:
    sys.exit(str(error))
  print(args.output)


if __name__ == "__main__":
  main()
