"""Measures a model as it is, without training, on held-out prompts."""

from collections.abc import Sequence
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
from rlft.inference.draw import Drawer, Drawing, check_output
from rlft.models import stable_diffusion
from rlft.parallel import sharding
from rlft.rewards import grammar
from rlft.rewards.scoring import trial
from rlft.storage import files
from rlft.types import UserError


def measure(
  drawing: Drawing,
  evals: Sequence[EvalConfig],
  *,
  scoring: ScoringSettings,
  output: str | os.PathLike[str] | None = None,
) -> str:
  """Measures a model on held-out prompts.

  Args:
    drawing: the model, and how it draws.
    evals: what to measure; if empty, what the run measured itself.
    scoring: how host metrics are called.
    output: JSON file for the figures.

  Returns:
    The table.

  Raises:
    UserError: nothing to measure, a model or prompts that cannot be read, a metric that fails.
  """
  fields.check(Config(eval=tuple(evals), scoring=scoring))
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
  trial.try_each(
    metric_lib.uses(specs),
    image_shape=(*stable_diffusion.image_size(draw.found.model), 3),
    timeout_s=scoring.reward_timeout_s,
  )
  with scorer(scoring) as score:
    measured = of_drawer(draw, specs, score=score, seed=draw.settings["seed"])
  if output:
    given = {name: getattr(drawing, name) for name in ("scheduler", "image_size")}
    content = {
      "model": drawing.model,
      "settings": draw.settings | {name: value for name, value in given.items() if value},
      "results": {name: result.summary() for name, result in measured.items()},
    }
    files.write_atomic(output, json.dumps(content, indent=2) + "\n")
  return summary.table(measured)


def scorer(scoring: ScoringSettings) -> metric_lib.MetricScorer:
  """What applies metrics on all devices, to be closed."""
  return metric_lib.MetricScorer(rows=sharding.batch(sharding.make_mesh()), scoring=scoring)


def of_drawer(
  draw: Drawer, specs: Sequence[EvalSpec], *, score: metric_lib.MetricScorer, seed: int
) -> dict[str, EvalResult]:
  """Evaluates what a drawer draws; see `evaluate.evaluate`."""

  def sample(prompts, seed):
    return draw.batches([prompt.text for prompt in prompts], seed=seed, progress="evaluating")

  return evaluate_lib.evaluate(specs, sample=sample, score=score, seed=seed)


def _specs_of_run(path: str, evals: Sequence[EvalConfig], started_in: str) -> list[EvalSpec]:
  """A run's own evaluations; relative paths of prompts count from here, or where it was started."""

  def found(entry):
    there = os.path.join(started_in, entry.prompts)
    elsewhere = not os.path.exists(entry.prompts) and os.path.isfile(there)
    return dataclasses.replace(entry, prompts=there) if elsewhere else entry

  try:
    return catalog.make_specs([found(entry) for entry in evals])
  except UserError as error:
    raise UserError(
      f"the evaluations of the run in {path} cannot be done here: {error}; or give others with"
      " --eval"
    ) from error
