"""Reports of runs that are there: written again, or one page for several."""

from collections.abc import Sequence
import json
import logging
import os

from rlft import catalog
from rlft.inference import runs as runs_lib
from rlft.report import page, several
from rlft.report.run_files import CONFIG_FILE, RunFiles, read_run
from rlft.storage import files
from rlft.types import UserError

_log = logging.getLogger(__name__)


def report(workdirs: Sequence[str], *, output: str = "") -> list[str]:
  """Writes the report of one run, or a page that compares several.

  Args:
    workdirs: the runs' directories.
    output: the page that compares; 'compared.html' here if ''. One run's is in its directory.

  Returns:
    Lines that say what each run came to, and what was written.

  Raises:
    UserError: no run, no such run, a damaged file, or the page cannot be written.
  """
  if not workdirs:
    raise UserError("there is no run to report on: give directories, e.g. runs/a runs/b")
  if output and len(workdirs) == 1:
    raise UserError(
      f"--output={output} is for a page that compares runs: leave it out, or give another run"
    )
  for workdir in workdirs:
    runs_lib.check_run(workdir)
  runs = [_read(workdir) for workdir in workdirs]
  if len(runs) == 1:
    written = page.write_report(workdirs[0], lower_is_better=runs[0].lower_is_better)
    return [f"report: {written}", runs[0].verdict.sentence]
  names = [run.name for run in runs]
  for run in runs:
    if names.count(run.name) > 1:
      raise UserError(f"two runs are called {run.name}: give directories whose last parts differ")
  output = output or "compared.html"
  files.write_atomic(output, several.page_of(runs))
  return [*(f"{run.name}: {run.verdict.sentence}" for run in runs), f"report: {output}"]


def _read(workdir: str) -> RunFiles:
  """A run with the directions of its judges, which its files need not say."""
  return read_run(workdir, lower_is_better=lower_judges(workdir))


def lower_judges(workdir: str | os.PathLike[str]) -> list[str]:
  """The judges of a run's tasks that improve by falling, as far as they can still be made."""
  try:
    config = json.loads((files.path_of(workdir) / CONFIG_FILE).read_text())
    names = {task["watch"] for task in config["task"] if task.get("watch")}
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return []  # The page says what it can.
  lower = []
  for name in sorted(names):
    try:
      if catalog.make_reward(name).lower_is_better:
        lower.append(name)
    except UserError as error:
      _log.warning("%s: more of its judge %s is taken for better: %s", workdir, name, error)
  return lower
