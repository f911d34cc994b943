"""Compares trained runs with their base model at its best guidance; docs/protocol.md says how.

python launch/compare.py --run=runs/emoji_joint --eval=emoji --output=runs/compared
"""

import dataclasses

from rlft.config import flags
from rlft.config.fields import option
from rlft.config.settings import Config
from rlft.inference.compare import compare
from rlft.inference.protocol import ProtocolSettings
from rlft.parallel import cpu


@dataclasses.dataclass(frozen=True)
class CompareSettings:
  """What is compared; each field is a flag of the same name."""

  run: tuple[str, ...] = option(
    "directory of a run; give the flag once for each. Runs that differ in --seed alone are one"
    " method with several seeds",
    (),
    path=True,
  )


flags.define(CompareSettings)
flags.define(ProtocolSettings)
flags.define(Config, "eval", "reward_timeout_s", "reward_threads", "cpu_devices")
flags.define(Config, "scheduler", "image_size", "sampling_steps", "eta")


def main() -> None:
  config, runs = flags.read(Config), flags.read(CompareSettings).run
  cpu.split_host(config.devices.cpu_devices)
  settings = flags.read(ProtocolSettings)
  print(compare(runs, config.eval, settings, policy=config.policy, scoring=config.scoring))


if __name__ == "__main__":
  flags.main(main)
