"""Measures a model as it is, without training, on held-out prompts."""

from collections.abc import Iterable, Sequence
import dataclasses
import json
import os

from rlft import catalog
from rlft.config import fields
from rlft.config.settings import Config, EvalConfig, ScoringSettings
from rlft.evaluation import evaluate as evaluate_lib
from rlft.evaluation import metric as metric_lib
from rlft.evaluation import summary
from rlft.evaluation.evaluate import EvalSpec
from rlft.evaluation.results import EvalResult
from rlft.inference import best_of
from rlft.inference.best_of import BestOf, BestOfSettings
from rlft.inference.draw import Drawer, Drawing, check_output
from rlft.models import stable_diffusion
from rlft.parallel import sharding
from rlft.rewards import grammar
from rlft.rewards.scoring import trial
from rlft.rewards.scoring.trial import Use
from rlft.storage import files
from rlft.types import UserError

_NO_CHOICE = BestOfSettings()


def measure(
  drawing: Drawing,
  evals: Sequence[EvalConfig],
  *,
  scoring: ScoringSettings,
  output: str | os.PathLike[str] | None = None,
  choice: BestOfSettings = _NO_CHOICE,
) -> str:
  """Measures a model on held-out prompts.

  Args:
    drawing: the model, and how it draws.
    evals: what to measure; if empty, what the run measured itself.
    scoring: how host metrics are called.
    output: JSON file for the figures.
    choice: among how many images each that is measured is chosen.

  Returns:
    The table.

  Raises:
    UserError: nothing to measure, a model or prompts that cannot be read, a metric that fails.
  """
  fields.check(Config(eval=tuple(evals), scoring=scoring))
  fields.check(choice)
  if output:
    check_output(output)
  specs = catalog.make_specs(evals)
  draw = Drawer(drawing)
  trained = draw.found.config
  if trained is not None:
    specs = specs or _specs_of_run(drawing.model, trained.eval, draw.found.started_in)
    is_trained_on = grammar.trained_on(trained.task)
    specs = [dataclasses.replace(s, trained_on=is_trained_on(s.metric.name)) for s in specs]
  if not specs:
    raise UserError(f"{drawing.model} has no evaluations of its own: give --eval=emoji or others")
  uses, how = metric_lib.uses(specs), best_of.make(choice, specs)
  if how:
    uses += best_of.uses(how, specs)
    chosen_by = how.reward.name
    specs = [
      dataclasses.replace(s, trained_on=s.trained_on or s.metric.name == chosen_by) for s in specs
    ]
  with tried_scorer(uses, draw, scoring) as score:
    measured = of_drawer(draw, specs, score=score, seed=draw.settings["seed"], how=how)
  drawn = evaluate_lib.images(specs) * choice.best_of
  if output:
    given = {name: getattr(drawing, name) for name in ("scheduler", "image_size", "lora")}
    given |= how.about() if how else {}
    content = {
      "model": drawing.model,
      "settings": draw.settings | {name: value for name, value in given.items() if value},
      "images_drawn": drawn,
      "results": {name: result.summary() for name, result in measured.items()},
    }
    files.write_atomic(output, json.dumps(content, indent=2) + "\n")
  said = f"\neach is the best of {how.count} by {how.reward.name}: {drawn:,} drawn" if how else ""
  return summary.table(measured) + said


def scorer(scoring: ScoringSettings) -> metric_lib.MetricScorer:
  """What applies metrics on all devices, to be closed."""
  return metric_lib.MetricScorer(rows=sharding.batch(sharding.make_mesh()), scoring=scoring)


def tried_scorer(
  uses: Iterable[Use], draw: Drawer, scoring: ScoringSettings
) -> metric_lib.MetricScorer:
  """`scorer`, after the metrics and rewards were tried on images like those of a drawer."""
  trial.try_each(
    uses,
    image_shape=(*stable_diffusion.image_size(draw.found.model), 3),
    timeout_s=scoring.reward_timeout_s,
  )
  return scorer(scoring)


def of_drawer(
  draw: Drawer,
  specs: Sequence[EvalSpec],
  *,
  score: metric_lib.MetricScorer,
  seed: int,
  how: BestOf | None = None,
  keep: evaluate_lib.Keep | None = None,
) -> dict[str, EvalResult]:
  """Evaluates what a drawer draws, or the best of it; see `evaluate.evaluate`."""

  def sample(prompts, seed):
    return draw.batches([prompt.text for prompt in prompts], seed=seed, progress="evaluating")

  sample = best_of.sample(how, draw, score) if how else sample
  return evaluate_lib.evaluate(specs, sample=sample, score=score, seed=seed, keep=keep)


def _specs_of_run(path: str, evals: Sequence[EvalConfig], started_in: str) -> list[EvalSpec]:
  """A run's own evaluations; relative paths of prompts count from here, or where it was started."""

  def found(entry):
    return dataclasses.replace(entry, prompts=catalog.prompts_from(entry.prompts, started_in))

  try:
    return catalog.make_specs([found(entry) for entry in evals])
  except UserError as error:
    raise UserError(
      f"the evaluations of the run in {path} cannot be done here: {error}; or give others with"
      " --eval"
    ) from error
