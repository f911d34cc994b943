"""Trains one of the emoji world's reward models.

python launch/train_reward.py --flagfile=experiments/reward_tone.flags
"""

from rlft.config import fieldflags
from rlft.config import flags as cli
from rlft.emoji.reward_training import RewardConfig, run

fieldflags.define(RewardConfig)


def main() -> None:
  run(fieldflags.read(RewardConfig))


if __name__ == "__main__":
  cli.main(main)
