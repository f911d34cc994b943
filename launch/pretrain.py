"""Trains the miniature Stable Diffusion that the package ships: emoji-sd.

python launch/pretrain.py --flagfile=experiments/emoji_pretrain.flags
"""

from rlft.config import flags
from rlft.emoji.base_model import PretrainConfig, run

flags.define(PretrainConfig)


def main() -> None:
  run(flags.read(PretrainConfig))


if __name__ == "__main__":
  flags.main(main)
