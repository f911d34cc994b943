"""Measures a run's model, or any in the diffusers layout, on held-out prompts.

python launch/evaluate.py --model=runs/emoji_joint --eval=emoji --output=eval.json
"""

from absl import flags

from rlft.config import fieldflags
from rlft.config import flags as cli
from rlft.inference import draw as inference

fieldflags.define(inference.Drawing)
cli.define_flags("eval", "reward_timeout_s", "reward_threads")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the figures")


def main() -> None:
  config = cli.from_flags()
  table = inference.measure(
    fieldflags.read(inference.Drawing),
    config.eval,
    reward_timeout_s=config.reward_timeout_s,
    reward_threads=config.reward_threads,
    output=_OUTPUT.value,
  )
  print(table)


if __name__ == "__main__":
  cli.main(main)
