"""Compares trained runs with their base model by the protocol that docs/protocol.md describes."""

from collections.abc import Mapping, Sequence
import dataclasses
import json

from rlft.config import stored
from rlft.config.settings import EvalConfig, PolicySettings, ScoringSettings
from rlft.evaluation import protocol, statistics
from rlft.evaluation.protocol import Base, Comparison, Method
from rlft.inference import reports
from rlft.inference.protocol import DRAWN_ALIKE_BY, Protocol, ProtocolSettings
from rlft.inference.runs import TrainedRun, grouped, open_run
from rlft.report import hacking
from rlft.rewards import grammar
from rlft.storage import files
from rlft.types import UserError

TABLES = "protocol"  # name of the files of tables, without suffix

_DEFAULT = PolicySettings()


@dataclasses.dataclass(frozen=True)
class Compared:
  """What a comparison found.

  Attributes:
    base: the base model.
    methods: by name, in the order in which their first runs were given.
    comparisons: of each method.
    calls: what is said of the rewards of each run: (its seed, what) of each method.
  """

  base: Base
  methods: Mapping[str, Method]
  comparisons: Mapping[str, Sequence[Comparison]]
  calls: Mapping[str, Sequence[tuple[int, hacking.Call]]]


def compare(
  paths: Sequence[str],
  evals: Sequence[EvalConfig],
  settings: ProtocolSettings,
  *,
  policy: PolicySettings = _DEFAULT,
  scoring: ScoringSettings,
) -> str:
  """Compares runs with their base model, and writes the tables.

  Args:
    paths: directories of runs; without any, the base model alone is measured.
    evals: on test prompts, each with its development prompts.
    settings: what is compared, and where it is kept.
    policy: how the base model draws where there is no run, whose own settings it else has.
    scoring: how host metrics are called.

  Returns:
    The tables, as Markdown.

  Raises:
    UserError: something cannot be read, measured or compared.
  """
  groups = grouped([open_run(path) for path in paths])
  runs = [run for group in groups.values() for run in group]
  base = _base_of(runs, settings)
  for name in DRAWN_ALIKE_BY if runs else ():
    if (value := getattr(policy, name)) != getattr(_DEFAULT, name):
      raise UserError(f"--{name}={value} has no effect: the runs say how they draw, leave it out")
  policy = runs[0].config.policy if runs else policy
  with Protocol(settings, evals, base=base, policy=policy, scoring=scoring) as measured:
    found = gather(measured, groups)
  text = markdown(measured, found)
  output = files.path_of(settings.output)
  rows = [one.to_json() for group in found.comparisons.values() for one in group]
  files.write_atomic(output / f"{TABLES}.json", json.dumps(rows, indent=1) + "\n")
  files.write_atomic(output / f"{TABLES}.csv", protocol.flat(rows).csv())
  files.write_atomic(output / f"{TABLES}.md", text)
  return text


def _base_of(runs: Sequence[TrainedRun], settings: ProtocolSettings) -> str:
  """The base model that all runs have."""
  bases = sorted({run.config.pretrained for run in runs})
  if len(bases) > 1:
    raise UserError(
      f"the runs were trained from {bases[0]} and from {bases[1]}: compare those of one base model"
    )
  if not (bases or settings.pretrained):
    raise UserError(
      "there is nothing to compare: give --run, or --pretrained for a base model alone"
    )
  return settings.pretrained or bases[0]


def gather(measured: Protocol, groups: Mapping[str, Sequence[TrainedRun]]) -> Compared:
  """Measures the runs of each method and the base model, as far as that is not done yet."""
  scales = sorted({runs[0].config.policy.guidance_scale for runs in groups.values()})
  base = measured.base(scales)
  methods, calls = {}, {}
  for name, runs in groups.items():
    config = runs[0].config
    is_trained_on = grammar.trained_on(config.task)
    methods[name] = Method(
      name,
      config.policy.guidance_scale,
      {run.config.seed: measured.of_run(run) for run in runs},
      frozenset(entry.name for entry in measured.evals if is_trained_on(entry.metric)),
    )
    calls[name] = [
      (run.config.seed, call)
      for run in runs
      for call in hacking.of_run(
        run.path, stored.to_dict(run.config), lower_is_better=reports.lower_judges(run.path)
      )
    ]
  comparisons = {
    name: protocol.compare(method, base, measured.evals) for name, method in methods.items()
  }
  return Compared(base, methods, comparisons, calls)


def markdown(measured: Protocol, found: Compared) -> str:
  """The tables of a comparison."""
  parts = [
    f"# {measured.base_model} and what was trained from it",
    "How the figures are made: docs/protocol.md of rlft. After a mean stands half the width of its"
    f" {statistics.LEVEL:.0%} interval, over seeds and prompts.",
    "## The base model by guidance, on development prompts, and at its best",
    protocol.sweep(found.base).markdown(),
  ]
  for name, method in found.methods.items():
    numbers = ", ".join(map(str, method.runs))
    about = f"Trained and measured at guidance {method.guidance:g}, with training seeds {numbers}."
    if len(method.runs) == 1:
      about = about.replace("seeds", "seed") + " Intervals say nothing of other seeds."
    parts += [f"## {name}", about, protocol.table(found.comparisons[name]).markdown()]
    lines = [f"- seed {seed}, task {call.sentence}" for seed, call in found.calls[name]]
    parts += ["\n".join(lines)] if lines else []
  return "\n\n".join(parts) + "\n"
