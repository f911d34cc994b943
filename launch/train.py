"""Fine-tunes a diffusion model on rewards; run it again to go on after an interruption.

python launch/train.py --flagfile=experiments/emoji_joint.flags
"""

from rlft.config import flags
from rlft.config.settings import Config
from rlft.train import train

flags.define(Config)


def main() -> None:
  train(flags.read(Config))


if __name__ == "__main__":
  flags.main(main)
