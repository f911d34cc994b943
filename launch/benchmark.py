"""Measures how fast things run on this machine, beside PyTorch where that is installed.

python launch/benchmark.py --what=rewards --port=clip-score,yolov3-tiny --batch_size=4
"""

from rlft.config import flags
from rlft.performance.benchmark.contest import BenchmarkConfig
from rlft.performance.benchmark.suites import run

flags.define(BenchmarkConfig)


def main() -> None:
  run(flags.read(BenchmarkConfig))


if __name__ == "__main__":
  flags.main(main)
