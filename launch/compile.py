"""Says whether a training fits, and what it costs, for devices that are not here.

python launch/compile.py --flagfile=experiments/sd2_preference.flags --target=v6e:8x16
"""

from rlft.config import flags
from rlft.config.settings import Config
from rlft.performance.compile.ahead import CompileConfig, compile_run

flags.define(Config)
flags.define(CompileConfig)


def main() -> None:
  compile_run(flags.read(Config), flags.read(CompileConfig))


if __name__ == "__main__":
  flags.main(main)
