"""Draws images with a run's model, or any in the diffusers layout, as one PNG.

python launch/sample.py --model=runs/emoji_joint --prompt="a dog and a car" --output=grid.png
"""

from absl import flags

from rlft import catalog
from rlft.config import flags as cli
from rlft.inference.draw import Drawing, save_grid

cli.define(Drawing)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "what to draw; may be given several times")
_PROMPTS = flags.DEFINE_string(
  "prompts",
  None,
  "more to draw: emoji:TASK/SPLIT, records:DIRECTORY/SPLIT or a file, or a part of one",
)
_MAX_PROMPTS = flags.DEFINE_integer(
  "max_prompts", 32, "at most so many of --prompts are drawn, spread evenly", lower_bound=1
)
_IMAGES_PER_PROMPT = flags.DEFINE_integer(
  "images_per_prompt", 4, "images drawn for each prompt", lower_bound=1
)
_OUTPUT = flags.DEFINE_string("output", "grid.png", "the PNG file; a row for each prompt")


def main() -> None:
  texts = list(_PROMPT.value)
  if _PROMPTS.value:
    source = catalog.load_prompts(_PROMPTS.value)
    count = min(len(source), _MAX_PROMPTS.value)
    texts += [source[place * len(source) // count].text for place in range(count)]
  drawing = cli.read(Drawing)
  per_prompt = _IMAGES_PER_PROMPT.value
  print(save_grid(drawing, texts, _OUTPUT.value, images_per_prompt=per_prompt))


if __name__ == "__main__":
  cli.main(main)
