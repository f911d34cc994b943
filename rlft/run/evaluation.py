"""The evaluations of a run: on its devices, into its directory."""

from collections.abc import Mapping, Sequence
import dataclasses

from rlft.config.settings import Config
from rlft.diffusion.sampler import Sampler
from rlft.evaluation import results
from rlft.evaluation.evaluate import EvalSpec, evaluate
from rlft.evaluation.results import BestBase, EvalResult
from rlft.models import lora
from rlft.parallel import processes
from rlft.report import samples
from rlft.run.open import Run
from rlft.run.preemption import Stop
from rlft.run.programs import make_run_policy, make_sampler
from rlft.run.scored import check_evaluations


def is_due(config: Config, iteration: int) -> bool:
  """Whether there is an evaluation before this iteration: the first, the end, `eval_every`."""
  every = config.evaluation.eval_every
  due = iteration in (0, config.iterations) or (every and iteration % every == 0)
  return bool(config.eval and due)


def evaluate_run(run: Run, weights: lora.Weights, iteration: int, stop: Stop) -> None:
  """Measures the held-out evaluations; keeps their results and pictures in the workdir.

  Before the first iteration also the base model at its best guidance, where an evaluation says
  what that is.

  Args:
    run: the run.
    weights: of the UNet, on the devices.
    iteration: number of iterations done; 0 is the base model.
    stop: asked for each batch, and while a metric is waited for.

  Raises:
    RewardError: a metric failed.
    UserError: a metric could score none of the images; nothing has been kept of the results.
    Stopped: the run was told to stop; nothing has been kept of the results.
  """
  keep = samples.Keeper(run.workdir, iteration, max_prompts=run.config.evaluation.report_images)
  measured = _measure(
    run, run.programs.sampler, run.evals, weights, stop, keep=keep if run.writes else None
  )
  check_evaluations(measured, iteration)
  if iteration == 0:
    best = _measure_best_base(run, measured, weights, stop)
    with processes.together():
      if run.writes and best:
        results.write_base(run.workdir, best)
  with processes.together():
    if run.writes:
      results.append_history(run.workdir, iteration, measured)


def _measure_best_base(
  run: Run, measured: Mapping[str, EvalResult], weights: lora.Weights, stop: Stop
) -> dict[str, BestBase]:
  """The base model at the guidance that each evaluation says; at the run's own as it is measured.

  Args:
    run: the run.
    measured: the base model at the run's guidance.
    weights: the base model's.
    stop: as of `evaluate_run`.
  """
  own = run.config.policy.guidance_scale
  scales = {one.name: one.base_guidance for one in run.config.eval if one.base_guidance}
  found = dict(measured)
  for scale in sorted({*scales.values()} - {own}):
    settings = dataclasses.replace(run.config.policy, guidance_scale=scale)
    policy = make_run_policy(settings, run.model)
    sampler = make_sampler(run.config, run.model, policy, run.mesh, run.frozen, collect="latents")
    specs = [spec for spec in run.evals if scales.get(spec.name) == scale]
    found |= _measure(run, sampler, specs, weights, stop)
  return {name: BestBase(scale, found[name]) for name, scale in scales.items()}


def _measure(
  run: Run,
  sampler: Sampler,
  specs: Sequence[EvalSpec],
  weights: lora.Weights,
  stop: Stop,
  *,
  keep: samples.Keeper | None = None,
) -> dict[str, EvalResult]:
  """Draws with some sampler, and scores; see `evaluate.evaluate`."""

  def sample(prompts, seed):
    texts = [prompt.text for prompt in prompts]
    progress = "evaluating" if run.writes else ""
    for batch in sampler.batches(texts, seed, weights=weights, progress=progress):
      stop.check()
      yield batch

  with stop.at_once():
    return evaluate(
      specs,
      sample=sample,
      score=run.metrics,
      seed=run.config.evaluation.eval_seed,
      keep=keep,
    )
