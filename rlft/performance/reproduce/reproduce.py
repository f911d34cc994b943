"""Runs what is missing of the paper's tables, measures it by the protocol, and writes the results.

Each training is a process of its own; whatever stops it or this one, the same command goes on.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import pathlib
import shlex
import sys

from rlft.config import fields
from rlft.config.fields import option
from rlft.config.settings import Config, ScoringSettings
from rlft.evaluation import results
from rlft.evaluation.tables import Table
from rlft.inference.best_of import BestOfSettings
from rlft.inference.protocol import Protocol, ProtocolSettings
from rlft.inference.runs import open_run
from rlft.parallel import cpu
from rlft.performance.compile.cost import drawn_by_evaluation
from rlft.performance.reproduce import figures, paper, runner, tables
from rlft.performance.reproduce import scale as scale_lib
from rlft.performance.reproduce.findings import Findings, Trained
from rlft.performance.reproduce.paper import ABLATION, PaperTable, Row
from rlft.performance.reproduce.scale import Experiment, Scale
from rlft.performance.reproduce.tables import Section
from rlft.storage import files
from rlft.types import UserError

_PROTOCOL = "protocol"  # directory of what the base model was measured, in the workdir
_SECTIONS = (*paper.TABLES, "curves", "hacking")  # in the order of the page
_CURVES = (paper.T1, paper.T3, paper.T4, paper.T5)  # tables whose runs have their curves drawn


@dataclasses.dataclass(frozen=True)
class ReproduceSettings:
  """What is reproduced; each field is a flag of the same name."""

  scale: str = option("the experiments of a file experiments/NAME.toml", "miniature")
  seeds: int = option("how many training seeds each method has: 0, 1, ...", 3, least=1)
  only: str = option(
    f"only these parts, separated by commas: {', '.join(_SECTIONS)}; if empty, all", ""
  )
  workdir: str = option("directory of all runs", "runs/reproduce", path=True)
  output: str = option("directory for the results", "experiments/results", path=True)
  dry_run: bool = option("only list what would be trained and measured", False)

  def sections(self) -> list[str]:
    """The parts of the results that are asked for.

    Raises:
      UserError: an unknown one.
    """
    asked = [name.strip() for name in self.only.split(",") if name.strip()]
    for name in asked:
      if name not in _SECTIONS:
        raise UserError(f"--only={self.only}: {name}: {fields.suggestion(name, _SECTIONS)}")
    return [name for name in _SECTIONS if name in asked or not asked]


def _tables_of(section: str) -> Sequence[PaperTable]:
  """The tables whose runs a part of the results needs."""
  if section == "curves":
    return _CURVES
  return (paper.T1, ABLATION) if section == "hacking" else (paper.TABLES[section],)


def plan(scale: Scale, sections: Iterable[str], seeds: int) -> list[Experiment]:
  """All trainings that these parts of the results need."""
  pairs = []
  for section in sections:
    for table in _tables_of(section):
      pairs += table.trained
      pairs += [(name, table.on) for name in scale.added(table.name)]
    if section not in paper.TABLES:
      pairs += [(name, paper.T1.on) for name in scale.added(section)]
  return scale_lib.experiments(pairs, range(seeds))


@dataclasses.dataclass(frozen=True)
class _Run:
  """A training and how it is started."""

  experiment: Experiment
  config: Config
  flags: Sequence[str]

  @property
  def images(self) -> int:
    """Drawn for training and for its own evaluations."""
    config = self.config
    every = config.evaluation.eval_every or config.iterations
    evaluated = 1 + -(-config.iterations // every)
    drawn = config.iterations * sum(task.batch_size for task in config.task)
    return drawn + evaluated * sum(drawn_by_evaluation(config.eval))


def reproduce(
  settings: ReproduceSettings,
  *,
  scale: Scale | None = None,
  start: runner.Start = runner.start,
  say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> str:
  """Trains, measures and writes what is missing.

  Args:
    settings: what is asked for.
    scale: in the place of the one that the settings name.
    start: runs a process to its end, see `runner.start`.
    say: takes a line about what is done.

  Returns:
    The results as Markdown, or with `dry_run` the plan.

  Raises:
    UserError: a mistake in the scale, a training that was stopped; once all is written, also if
      trainings failed.
  """
  scale = scale or scale_lib.load(settings.scale)
  sections = settings.sections()
  workdir = pathlib.Path(settings.workdir)
  runs = []
  for experiment in plan(scale, sections, settings.seeds):
    line = experiment.flags(scale, workdir)
    runs.append(_Run(experiment, experiment.config(scale, workdir), line))
  if settings.dry_run:
    return _listed(runs, scale)
  failed = _train(runs, say, start)
  done = [run for run in runs if runner.done(run.config)]
  findings = _measure(done, runs, scale, workdir / _PROTOCOL, say, chosen="T1" in sections)
  text = _write(pathlib.Path(settings.output), sections, findings, settings.seeds)
  if failed:
    raise UserError(
      f"{len(failed)} of {len(runs)} trainings failed ({'; '.join(failed)}): the tables are without"
      " them; mend it, then the same command goes on"
    )
  return text


def _train(runs: Sequence[_Run], say: Callable[[str], None], start: runner.Start) -> list[str]:
  """Trains what is missing; what is said of those that failed."""
  missing = [run for run in runs if not runner.done(run.config)]
  failed = []
  for number, run in enumerate(missing, 1):
    rest = sum(one.images for one in missing[number - 1 :])
    say(
      f"training {number} of {len(missing)}: {run.experiment.name}, {run.images:,} of"
      f" {rest:,} images that are left"
    )
    if reason := runner.train(run.config, run.flags, say=say, start=start):
      failed.append(reason)
  return failed


def _listed(runs: Sequence[_Run], scale: Scale) -> str:
  """The plan, and how many images it takes at most."""
  rows = []
  for run in runs:
    history = results.read_history(run.config.output.workdir)
    state = f"evaluated at {history[-1][0]}" if history else "missing"
    state = "done" if runner.done(run.config) else state
    iterations = f"{run.config.iterations:,}"
    rows.append((run.experiment.name, state, iterations, f"{run.images:,}"))
  evaluated = sum(drawn_by_evaluation(scale.protocol()))
  scales = len(ProtocolSettings("", guidance_scales=scale.guidance_scales).guidances())
  left = [run for run in runs if not runner.done(run.config)]
  lines = [
    Table(("run", "state", "iterations", "images"), rows).markdown(),
    f"{len(left)} of {len(runs)} trainings are left, with {sum(r.images for r in left):,} images.",
    f"The protocol draws {evaluated:,} images of each run, and of the base model as many at each of"
    f" {scales} guidance scales and again at those that are best.",
  ]
  return "\n\n".join(lines)


def _measure(
  done: Sequence[_Run],
  planned: Sequence[_Run],
  scale: Scale,
  output: pathlib.Path,
  say: Callable[[str], None],
  *,
  chosen: bool,
) -> Findings:
  """Measures what is finished, and the base model, as far as that is not done yet."""
  cpu.split_host(scale.cpu_devices)
  settings = ProtocolSettings(str(output), guidance_scales=scale.guidance_scales)
  policies = [run.config.policy for run in planned]
  found: dict[tuple[str, tuple[str, ...]], dict[int, Trained]] = {}
  with Protocol(
    settings,
    scale.protocol(),
    base=scale.base,
    policy=policies[0],
    scoring=ScoringSettings(),
    say=say,
  ) as measured:
    base = measured.base(sorted({policy.guidance_scale for policy in policies}))
    for run in done:
      experiment = run.experiment
      trained = Trained(run.config, measured.of_run(open_run(run.config.output.workdir)))
      found.setdefault((experiment.method, experiment.tasks), {})[experiment.seed] = trained
    evals = {entry.name: entry for entry in measured.evals}
    findings = Findings(scale, base, evals, found, output)
    if chosen and scale.best_of > 1:
      choice = BestOfSettings(scale.best_of, scale.reward(paper.T1.on[0]))
      guidances = {column.measure: findings.guidance(column) for column in paper.T1.columns}
      best: dict[str, results.EvalResult] = {}
      for guidance in dict.fromkeys(guidances.values()):
        names = [name for name, its in guidances.items() if its == guidance]
        best |= measured.best_of(choice, guidance, names)
      findings = dataclasses.replace(findings, chosen=best)
  return findings


def _section(name: str, findings: Findings) -> Section:
  """A part of the results."""
  if name == "curves":
    # Some runs are in several tables, under other titles: the first counts.
    by_task: dict[str, dict[tuple[str, tuple[str, ...]], Row]] = {}
    for table in _CURVES:
      for row in findings.rows(table).values():
        for task in row.tasks:
          by_task.setdefault(task, {}).setdefault((row.method, row.tasks), row)
    shown = {task: list(rows.values()) for task, rows in by_task.items()}
    return figures.curves_section(shown, findings)
  if name == "hacking":
    (task,) = on = paper.T1.on
    rows = {**findings.rows(paper.T1), **findings.rows(ABLATION), **findings.added(name, on)}
    trained = [row for row in rows.values() if row.method]
    return figures.hacking_section(task, trained, findings)
  table = paper.TABLES[name]
  if table is paper.T2:
    return tables.convergence_section(table, findings)
  section = tables.section(table, findings)
  if table in (paper.T1, paper.T4, ABLATION):
    return figures.with_pictures(section, table.columns[0], findings.rows(table), findings)
  return section


def _write(output: pathlib.Path, names: Sequence[str], findings: Findings, seeds: int) -> str:
  """Writes each part, and one page of all parts that are there, also from earlier."""
  for name in names:
    section = _section(name, findings)
    flags = f"--scale={findings.scale.name}", f"--seeds={seeds}", f"--only={name}"
    command = shlex.join(["python", "launch/reproduce.py", *flags])
    text = f"{section.text}\nMade by `{command}`.\n"
    for file, content in {**section.files, f"{name}.md": text}.items():
      files.write_atomic(output / file, content)
  kept = [output / f"{name}.md" for name in _SECTIONS]
  parts = [path.read_text() for path in kept if path.exists()]
  head = (
    f"# Results at the scale {findings.scale.name!r}\n\nBelow each part stands the command that"
    " made it; docs/protocol.md says how runs are measured. The .csv files beside this page have"
    " the numbers behind it.\n"
  )
  if findings.scale.note:
    head += f"\n{findings.scale.note.strip()}\n"
  text = "\n".join([head, *parts])
  files.write_atomic(output / "README.md", text)
  return text
