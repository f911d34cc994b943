"""Asks people which of two pictures is better, on a page of this machine; docs/rating.md says how.

python launch/rate.py --models=emoji-sd --models=runs/emoji_joint --output=runs/rating
"""

import dataclasses

from rlft.config import flags
from rlft.config.fields import option
from rlft.rating.rate import rate
from rlft.rating.settings import PRESETS, PageSettings, StudySettings, parse_set


@dataclasses.dataclass(frozen=True)
class RateSettings:
  """What is compared; each field is a flag of the same name."""

  models: tuple[str, ...] = option(
    "a run, a model, or a folder of pictures with a metadata.jsonl; give the flag once for each, at"
    " least twice, or leave it out to go on with --output. Options:"
    " MODEL?name=NAME&guidance_scale=3&sampling_steps=50&eta=1&lora=FILE",
    (),
    path=True,
  )
  set: tuple[str, ...] = option(
    "a set of prompts whose pictures are compared, as name=NAME,prompts=SOURCE,count=100,images=1,"
    f"ask=quality,oracle=NAME; or a preset: {', '.join(PRESETS)}. images=6,ask=variety compares"
    " groups of 6. Without any: the folders' own prompts, or the preset where emoji-sd is compared",
    (),
  )


flags.define(RateSettings)
flags.define(StudySettings)
flags.define(PageSettings)


def main() -> None:
  given = flags.read(RateSettings)
  sets = [entry for text in given.set for entry in parse_set(text)]
  print(rate(given.models, sets, flags.read(StudySettings), flags.read(PageSettings)))


if __name__ == "__main__":
  flags.main(main)
