"""Measures models, runs, or a base with a LoRA, on held-out prompts; docs/evaluation.md says how.

python launch/evaluate.py --model=runs/emoji_joint --eval=emoji --output=eval.json
python launch/evaluate.py --suite=emoji --model=emoji-sd --models=runs/emoji_joint --output=runs/ev
"""

from absl import flags

from rlft.config import flags as cli
from rlft.config.settings import Config
from rlft.inference.best_of import BestOfSettings
from rlft.inference.draw import Drawing
from rlft.inference.measure import measure
from rlft.inference.suites import SuiteSettings, run
from rlft.types import UserError

cli.define(Drawing)
cli.define(BestOfSettings)
cli.define(SuiteSettings)
cli.define(Config, "eval", "reward_timeout_s", "reward_threads")
_MODELS = flags.DEFINE_multi_string(
  "models",
  [],
  "further models for --suite, to be given for each: they are compared with --model. Options:"
  " MODEL?name=NAME&guidance_scale=3&sampling_steps=50&eta=1&lora=FILE",
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the figures; the directory of a suite")


def main() -> None:
  config, drawing, choice = cli.read(Config), cli.read(Drawing), cli.read(BestOfSettings)
  settings = cli.read(SuiteSettings)
  if not settings.suite:
    if _MODELS.value or settings != SuiteSettings():
      raise UserError("--models, --weights_dir and --guidance_sweep are for --suite: give one")
    print(
      measure(drawing, config.eval, scoring=config.scoring, output=_OUTPUT.value, choice=choice)
    )
    return
  if config.eval or choice != BestOfSettings():
    raise UserError("--eval and --best_of have no effect with --suite: leave them out")
  models = [drawing.model, *_MODELS.value]
  print(run(models, settings, drawing, scoring=config.scoring, output=_OUTPUT.value))


if __name__ == "__main__":
  cli.main(main)
