"""Says whether a training fits, and what it costs, for devices that are not here.

python launch/compile.py --flagfile=experiments/sd2_preference.flags --target=v6e:8x16
"""

from rlft.config import fieldflags
from rlft.config import flags as cli
from rlft.performance.compile.ahead import CompileConfig, compile_run

cli.define_flags()
fieldflags.define(CompileConfig)


def main() -> None:
  compile_run(cli.from_flags(), fieldflags.read(CompileConfig))


if __name__ == "__main__":
  cli.main(main)
