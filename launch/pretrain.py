"""Trains the miniature Stable Diffusion that the package ships: emoji-sd.

python launch/pretrain.py --flagfile=experiments/emoji_pretrain.flags
"""

from rlft.config import flags
from rlft.emoji.base_model import BaseModelConfig, run

flags.define(BaseModelConfig)


def main() -> None:
  run(flags.read(BaseModelConfig))


if __name__ == "__main__":
  flags.main(main)
