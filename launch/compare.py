"""Compares trained runs with their base model at its best guidance; docs/protocol.md says how.

python launch/compare.py --run=runs/emoji_joint --eval=emoji --output=runs/compared
"""

from absl import flags

from rlft.config import flags as cli
from rlft.config.settings import Config
from rlft.inference.compare import compare
from rlft.inference.protocol import ProtocolSettings
from rlft.parallel import cpu

_RUN = flags.DEFINE_multi_string(
  "run",
  [],
  "directory of a run; to be given for each. Those that differ in their seeds alone are one method",
)
cli.define(ProtocolSettings)
cli.define(Config, "eval", "reward_timeout_s", "reward_threads", "cpu_devices")
cli.define(Config, "scheduler", "image_size", "sampling_steps", "eta")


def main() -> None:
  config = cli.read(Config)
  cpu.split_host(config.devices.cpu_devices)
  settings = cli.read(ProtocolSettings)
  print(compare(_RUN.value, config.eval, settings, policy=config.policy, scoring=config.scoring))


if __name__ == "__main__":
  cli.main(main)
