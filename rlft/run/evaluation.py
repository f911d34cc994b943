"""The evaluations of a run: on its devices, into its directory."""

from rlft.evaluation import results
from rlft.evaluation.evaluate import evaluate
from rlft.models import lora
from rlft.report import samples
from rlft.run.open import Run
from rlft.run.preemption import Stop
from rlft.run.scored import check_evaluations


def is_due(run: Run, iteration: int) -> bool:
  """Whether there is an evaluation before this iteration: the first, the end, `eval_every`."""
  every = run.config.evaluation.eval_every
  due = iteration in (0, run.config.iterations) or (every and iteration % every == 0)
  return bool(run.evals and due)


def evaluate_run(run: Run, weights: lora.Weights, iteration: int, stop: Stop) -> None:
  """Measures the held-out evaluations; keeps their results and pictures in the workdir.

  Args:
    run: the run.
    weights: of the UNet, on the devices.
    iteration: number of iterations done; 0 is the base model.
    stop: asked for each batch, and while a metric is waited for.

  Raises:
    RewardError: a metric failed.
    UserError: a metric could score none of the base model's images.
    Stopped: the run was told to stop; nothing has been kept of the results.
  """

  def sample(prompts, seed):
    texts = [prompt.text for prompt in prompts]
    progress = "evaluating" if run.writes else ""
    for batch in run.programs.sampler.batches(texts, seed, weights=weights, progress=progress):
      stop.check()
      yield batch

  keep = samples.Keeper(run.workdir, iteration, max_prompts=run.config.evaluation.report_images)
  with stop.at_once():
    measured = evaluate(
      run.evals,
      sample=sample,
      score=run.metrics,
      seed=run.config.evaluation.eval_seed,
      keep=keep if run.writes else None,
    )
  if iteration == 0:
    check_evaluations(measured)
  if run.writes:
    results.append_history(run.workdir, iteration, measured)
