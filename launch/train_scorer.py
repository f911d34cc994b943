"""Trains the network whose judgement the emoji rewards are.

python launch/train_scorer.py --flagfile=experiments/emoji_scorer.flags
"""

import dataclasses

from absl import flags

from rlft import cli
from rlft.emoji.scorer_train import ScorerConfig, run

for _field in dataclasses.fields(ScorerConfig):
  _define = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
  _define[_field.type](_field.name, _field.default, _field.metadata["help"])


def main() -> None:
  run(ScorerConfig(**{f.name: flags.FLAGS[f.name].value for f in dataclasses.fields(ScorerConfig)}))


if __name__ == "__main__":
  cli.main(main)
