"""What a run writes for its user: numbers while it goes on, and in the end what came of it."""

from rlft.config import stored
from rlft.evaluation import results, summary
from rlft.report import page
from rlft.report.metrics import MetricsWriter
from rlft.report.run_files import read_run
from rlft.report.trackers import open_trackers
from rlft.run.open import Run


def open_writer(run: Run, first_iteration: int) -> MetricsWriter:
  """Opens what takes the numbers of iterations, and the trackers that the settings name."""
  trackers = open_trackers(
    run.config.output.tracker,
    run.workdir,
    first_iteration=first_iteration,
    config=stored.to_dict(run.config),
  )
  return MetricsWriter(run.workdir, first_iteration=first_iteration, trackers=trackers)


def write_report(run: Run) -> None:
  """Writes what a user looks at when the run has ended; the last line says what it came to."""
  history, best = results.read_history(run.workdir), results.read_base(run.workdir)
  if history:
    before, after = history[0][1], history[-1][1]
    results.write_eval_json(run.workdir, before, after, history, stored.to_dict(run.config), best)
    print(summary.table(before, after, best))
  judges = [judge for task in run.tasks if (judge := task.scorer.judge)]
  lower = [judge.name for judge in judges if judge.lower_is_better]
  written = page.write_report(run.workdir, lower_is_better=lower)
  found = read_run(run.workdir, lower_is_better=lower)
  for call in found.calls:
    if call.found.hacked:
      print(call.sentence)
  print(f"report: {written}")
  print(found.verdict.sentence)
