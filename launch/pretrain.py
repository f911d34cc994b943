"""Trains the miniature Stable Diffusion that the package ships: emoji-sd.

python launch/pretrain.py --flagfile=experiments/emoji_pretrain.flags
"""

from rlft.config import fieldflags
from rlft.config import flags as cli
from rlft.emoji.base_model import PretrainConfig, run

fieldflags.define(PretrainConfig)


def main() -> None:
  run(fieldflags.read(PretrainConfig))


if __name__ == "__main__":
  cli.main(main)
