"""Measures models, runs, or a base with a LoRA, on held-out prompts; docs/evaluation.md says how.

python launch/evaluate.py --model=runs/emoji_joint --eval=emoji --output=eval.json
python launch/evaluate.py --suite=emoji --model=emoji-sd --models=runs/emoji_joint --output=runs/ev
"""

import dataclasses

from rlft.config import flags
from rlft.config.fields import option
from rlft.config.settings import Config
from rlft.inference.best_of import BestOfSettings
from rlft.inference.draw import Drawing
from rlft.inference.measure import measure
from rlft.inference.suites import SuiteSettings, run
from rlft.types import UserError


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
  """What is measured beside --model, and where to; each field is a flag of the same name."""

  models: tuple[str, ...] = option(
    "with --suite: further models, compared with --model; give the flag once for each. Options:"
    " MODEL?name=NAME&guidance_scale=3&sampling_steps=50&eta=1&lora=FILE",
    (),
    path=True,
  )
  output: str = option(
    "JSON file for the results; with --suite a directory, which must be given", "", path=True
  )


flags.define(Drawing)
flags.define(BestOfSettings)
flags.define(SuiteSettings)
flags.define(EvaluateSettings)
flags.define(Config, "eval", "reward_timeout_s", "reward_threads")


def main() -> None:
  config, drawing, choice = flags.read(Config), flags.read(Drawing), flags.read(BestOfSettings)
  suite, given = flags.read(SuiteSettings), flags.read(EvaluateSettings)
  output = given.output or None
  if not suite.suite:
    if given.models or suite != SuiteSettings():
      raise UserError("--models, --weights_dir and --guidance_sweep are for --suite: give one")
    print(measure(drawing, config.eval, scoring=config.scoring, output=output, choice=choice))
    return
  if config.eval or choice != BestOfSettings():
    raise UserError("--eval and --best_of have no effect with --suite: leave them out")
  models = [drawing.model, *given.models]
  print(run(models, suite, drawing, scoring=config.scoring, output=output))


if __name__ == "__main__":
  flags.main(main)
