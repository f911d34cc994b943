"""Fine-tunes a diffusion model on rewards; run it again to go on after an interruption.

python launch/train.py --flagfile=experiments/emoji_joint.flags
"""

from rlft.config import flags as cli
from rlft.train import train

cli.define_flags()


def main() -> None:
  train(cli.from_flags())


if __name__ == "__main__":
  cli.main(main)
