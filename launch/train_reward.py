"""Trains one of the emoji world's reward models.

python launch/train_reward.py --flagfile=experiments/reward_tone.flags
"""

from rlft.config import flags
from rlft.emoji.reward_training import RewardConfig, run

flags.define(RewardConfig)


def main() -> None:
  run(flags.read(RewardConfig))


if __name__ == "__main__":
  flags.main(main)
