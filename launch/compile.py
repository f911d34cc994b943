"""Says whether a training fits, and what it costs, for devices that are not here.

python launch/compile.py --flagfile=experiments/sd2_preference.flags --target=v6e:8x16

With --warm it compiles for the devices that are here, so that a run that begins later need not.
"""

from rlft.config import flags
from rlft.config.settings import Config
from rlft.performance.compile.ahead import CompileConfig, compile_run
from rlft.performance.compile.warm import warm

flags.define(Config)
flags.define(CompileConfig)


def main() -> None:
  config, settings = flags.read(Config), flags.read(CompileConfig)
  if settings.warm:
    warm(config, settings.architecture)
  else:
    compile_run(config, settings)


if __name__ == "__main__":
  flags.main(main)
