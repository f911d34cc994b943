"""Fine-tunes a diffusion model on rewards; run it again to go on after an interruption.

python launch/train.py --flagfile=experiments/emoji_joint.flags
python launch/train.py --flagfile=experiments/emoji_joint.flags --dry_run --target=h100:8
"""

from rlft.config import flags
from rlft.config.settings import Config
from rlft.parallel.join import ProcessSettings, joined
from rlft.performance.compile import plan
from rlft.train import train

flags.define(Config)
flags.define(ProcessSettings)
flags.define(plan.PlanConfig)


def main() -> None:
  config, settings = flags.read(Config), flags.read(plan.PlanConfig)
  processes = flags.read(ProcessSettings)
  plan.check_used(settings, processes)
  if settings.dry_run:
    print(plan.describe(config, settings))
    return
  with joined(processes):
    train(config)


if __name__ == "__main__":
  flags.main(main)
