"""Measures a run's model, or any in the diffusers layout, on held-out prompts.

python launch/evaluate.py --model=runs/emoji_joint --eval=emoji --output=eval.json
"""

from absl import flags

from rlft.config import flags as cli
from rlft.config.settings import Config
from rlft.inference.best_of import BestOfSettings
from rlft.inference.draw import Drawing
from rlft.inference.measure import measure

cli.define(Drawing)
cli.define(BestOfSettings)
cli.define(Config, "eval", "reward_timeout_s", "reward_threads")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the figures")


def main() -> None:
  config = cli.read(Config)
  table = measure(
    cli.read(Drawing),
    config.eval,
    scoring=config.scoring,
    output=_OUTPUT.value,
    choice=cli.read(BestOfSettings),
  )
  print(table)


if __name__ == "__main__":
  cli.main(main)
