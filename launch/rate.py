"""Asks people which of two pictures is better, on a page of this machine; docs/rating.md says how.

python launch/rate.py --models=emoji-sd --models=runs/emoji_joint --output=runs/rating
"""

from absl import flags

from rlft.config import flags as cli
from rlft.rating.rate import rate
from rlft.rating.settings import PRESETS, PageSettings, StudySettings, parse_set

_MODELS = flags.DEFINE_multi_string(
  "models",
  [],
  "a run, a model, or a folder of pictures with a metadata.jsonl; to be given for each. Options:"
  " MODEL?name=NAME&guidance_scale=3&sampling_steps=50&eta=1. Without any, --output goes on",
)
_SETS = flags.DEFINE_multi_string(
  "set",
  [],
  "prompts whose pictures are compared, as name=NAME,prompts=SOURCE,count=100,images=1,ask=quality,"
  f"oracle=NAME; or a preset: {', '.join(PRESETS)}. images=6,ask=variety compares groups of 6",
)
cli.define(StudySettings)
cli.define(PageSettings)


def main() -> None:
  sets = [entry for text in _SETS.value for entry in parse_set(text)]
  print(rate(_MODELS.value, sets, cli.read(StudySettings), cli.read(PageSettings)))


if __name__ == "__main__":
  cli.main(main)
