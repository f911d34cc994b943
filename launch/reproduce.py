"""Trains and measures what the paper's tables show; started again, it goes on where it stopped.

python launch/reproduce.py --scale=miniature --seeds=1 --only=T1,T5
"""

from rlft.config import flags
from rlft.performance.reproduce.reproduce import ReproduceSettings, reproduce

flags.define(ReproduceSettings)


def main() -> None:
  print(reproduce(flags.read(ReproduceSettings)))


if __name__ == "__main__":
  flags.main(main)
