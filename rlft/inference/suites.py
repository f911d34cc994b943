"""Measures a suite on several models, each thing once, and writes tables, figures and a page."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
import os
import sys
from typing import Any

from rlft import catalog
from rlft.config import fields
from rlft.config.fields import option
from rlft.config.settings import Config, ScoringSettings
from rlft.evaluation import evaluate, protocol, side_by_side, statistics
from rlft.evaluation import metric as metric_lib
from rlft.evaluation.evaluate import EvalSpec
from rlft.evaluation.protocol import Results
from rlft.evaluation.side_by_side import Row
from rlft.evaluation.suites import Suite
from rlft.inference import contenders as contenders_lib
from rlft.inference import kept, measure
from rlft.inference.contenders import Contender
from rlft.inference.draw import Drawer, Drawing
from rlft.inference.protocol import parse_guidances
from rlft.report import samples
from rlft.report import suite as suite_page
from rlft.rewards import grammar
from rlft.storage import files
from rlft.types import UserError

EVAL_FILE, PAGE_FILE = "eval.json", "suite.html"

_NOISE_SEED = 2000  # of development prompts; that of test prompts is the next
_PICTURES = 4  # of a prompt, on the page
_SPLITS = ("development", "test")


@dataclasses.dataclass(frozen=True)
class SuiteSettings:
  """What is measured of several models; each field is a flag of the same name."""

  suite: str = option(
    "which suite of metrics to measure with --model and --models, as NAME or"
    " 'NAME?key=value&key=value' (docs/evaluation.md)",
    "",
  )
  weights_dir: str = option(
    "with --suite: directory with the weights of reward models, under their published names",
    "",
    path=True,
  )
  guidance_sweep: str = option(
    "with --suite: guidance scales, e.g. 1,2,3,5,7. Each model is measured at the one that is best"
    " for each metric on development prompts",
    "",
  )


def run(
  models: Sequence[str],
  settings: SuiteSettings,
  drawing: Drawing,
  *,
  scoring: ScoringSettings,
  output: str | os.PathLike[str] | None,
) -> str:
  """Measures what has not been measured yet, and writes `eval.json` and `suite.html`.

  Args:
    models: as `contenders.parse` reads them; all are compared with the first.
    settings: what is measured.
    drawing: how all models draw for which nothing else is said; its model is not looked at.
    scoring: how host metrics are called.
    output: directory; also of what was measured, with all scores.

  Returns:
    The tables, as Markdown.

  Raises:
    UserError: something cannot be read, measured or written.
  """
  fields.check(settings)
  fields.check(Config(scoring=scoring))
  if not output:
    raise UserError("--suite writes a directory: give --output=runs/NAME")
  if settings.weights_dir and not files.local_path(settings.weights_dir).is_dir():
    raise UserError(f"--weights_dir={settings.weights_dir} is not a directory: correct it")
  contenders = contenders_lib.parse(models)
  _check(contenders, settings, drawing)
  suite = catalog.make_suite(settings.suite, settings.weights_dir)
  for line in suite.missing:
    _say(line)
  scales = ()
  if settings.guidance_sweep:
    scales = parse_guidances("guidance_sweep", settings.guidance_sweep)
    for entry in suite.evals:
      if not entry.development:
        raise UserError(
          f"--guidance_sweep={settings.guidance_sweep} needs prompts on which to choose, of the"
          f" same kind as those of {entry.name}: add development=... to --suite={settings.suite}"
        )
  files.check_writable(str(output))
  with _Bench(suite, contenders, drawing, scoring, files.path_of(output), scales) as bench:
    measured = [bench.measured(one) for one in contenders]
  models_found = [model for model, _ in measured]
  rows = side_by_side.rows(
    suite.evals, bench.specs("test"), models_found, by=suite.by, of_parts=suite.of_parts
  )
  bases = {model.name: base for model, base in measured if base is not None}
  directory = files.path_of(output)
  content = {
    "suite": settings.suite,
    "models": [
      {"name": one.name, "model": one.source, **bench.settings(one)} for one in contenders
    ],
    "evaluations": [row.to_json() for row in rows],
    "sweeps": {name: _by_guidance(base) for name, base in bases.items()},
    "level": statistics.LEVEL,
    "missing": list(suite.missing),
    "notes": list(suite.notes),
  }
  files.write_atomic(directory / EVAL_FILE, json.dumps(content, indent=1) + "\n")
  html = suite_page.page(
    settings.suite,
    rows=rows,
    models=[(one.name, bench.described(one)) for one in contenders],
    sweeps={name: protocol.sweep(base) for name, base in bases.items()},
    galleries=bench.galleries(models_found),
    missing=suite.missing,
    notes=suite.notes,
  )
  files.write_atomic(directory / PAGE_FILE, html)
  said = [_markdown(rows, bases), *suite.notes, f"wrote {directory / EVAL_FILE} and {PAGE_FILE}"]
  return "\n\n".join(said)


def _by_guidance(base: protocol.Base) -> dict[str, Any]:
  """What a model scored on development prompts, for JSON."""
  return {
    f"{scale:g}": {name: result.summary() for name, result in results.items()}
    for scale, results in base.development.items()
  }


def _markdown(rows: Sequence[Row], bases: Mapping[str, protocol.Base]) -> str:
  """All tables."""
  parts = [side_by_side.table(rows).markdown()]
  for row in rows:
    if row.parts:
      parts += [f"{row.name}, in parts:", side_by_side.parts_table(row).markdown()]
  for name, base in bases.items():
    parts += [f"{name} by guidance, on development prompts:", protocol.sweep(base).markdown()]
  return "\n\n".join(parts)


def _check(contenders: Sequence[Contender], settings: SuiteSettings, drawing: Drawing) -> None:
  """Raises `UserError` if models cannot be told apart, or two things say the guidance."""
  if not contenders:
    raise UserError("there is nothing to measure: give --model, and --models for further ones")
  for one in contenders:
    if "/" in one.name or one.name in (".", ".."):
      raise UserError(f"--models: the name {one.name} is no name of a directory: give another")
    if settings.guidance_sweep and "guidance_scale" in one.drawing:
      raise UserError(
        f"--models={one.source}: guidance_scale has no effect with --guidance_sweep: leave it out"
      )
  if settings.guidance_sweep and drawing.guidance_scale is not None:
    raise UserError("--guidance_scale has no effect with --guidance_sweep: leave it out")


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


class _Bench:
  """Draws with models and scores, as far as that is not done yet."""

  def __init__(
    self,
    suite: Suite,
    contenders: Sequence[Contender],
    drawing: Drawing,
    scoring: ScoringSettings,
    output: files.Path,
    scales: Sequence[float],
  ):
    """Opens prompts and metrics; arguments as of `run`."""
    self._suite, self._scoring, self._output, self._scales = suite, scoring, output, scales
    self._drawings = {
      one.name: contenders_lib.drawing(one, contenders, drawing) for one in contenders
    }
    # Of all before the first is drawn with: what is missing is found at once.
    self._about = {name: kept.about(drawing) for name, drawing in self._drawings.items()}
    self._seed = _NOISE_SEED if drawing.seed is None else drawing.seed
    make = functools.cache(catalog.make_metric)
    entries = {"test": suite.evals}
    if scales:
      entries["development"] = [
        dataclasses.replace(entry, prompts=entry.development) for entry in suite.evals
      ]
    self._specs = {
      split: catalog.make_specs(of_split, make=make) for split, of_split in entries.items()
    }
    self._drawer: tuple[Drawing, Drawer] | None = None
    self._score: metric_lib.MetricScorer | None = None

  def __enter__(self) -> "_Bench":
    return self

  def __exit__(self, *_: object) -> None:
    if self._score is not None:
      self._score.close()

  def specs(self, split: str) -> list[EvalSpec]:
    """The evaluations of a split."""
    return self._specs[split]

  def settings(self, one: Contender) -> dict[str, Any]:
    """How a model draws test prompts; without guidance, where there are several."""
    drawing = {**dataclasses.asdict(self._drawings[one.name]), "seed": self._seed + 1}
    hidden = {"model", "batch_size"} | ({"guidance_scale"} if self._scales else set())
    return {key: value for key, value in drawing.items() if key not in hidden and value != ""}

  def described(self, one: Contender) -> str:
    """The same in words."""
    how = ", ".join(f"{name} {value}" for name, value in self.settings(one).items())
    return f"{one.source} ({how})"

  def measured(self, one: Contender) -> tuple[side_by_side.Model, protocol.Base | None]:
    """A model at its guidance; or at its best of the scales, and what it scored at all of them."""
    names = [entry.name for entry in self._suite.evals]
    if not self._scales:
      guidance = self._drawings[one.name].guidance_scale
      results = self._measure(one, "test", guidance, names)
      return side_by_side.Model(one.name, results, dict.fromkeys(names, guidance)), None
    base = protocol.swept(functools.partial(self._measure, one), names, self._scales)
    best = {name: base.best(name) for name in names}
    results = {name: base.test[scale][name] for name, scale in best.items()}
    return side_by_side.Model(one.name, results, best), base

  def galleries(self, models: Sequence[side_by_side.Model]) -> list[suite_page.Gallery]:
    """Pictures of the evaluations of which all models have some."""
    found = []
    for entry in self._suite.evals:
      sheets = {}
      for model in models:
        file = self._file(model.name, "test", model.guidance[entry.name])
        if kept_sheets := samples.read_samples(kept.pictures(file)).get(entry.name):
          sheets[model.name] = kept_sheets[-1]
      if len(sheets) == len(models):
        found.append(suite_page.gallery(entry.name, sheets))
    return found

  def _file(self, name: str, split: str, guidance: float) -> files.Path:
    return self._output / name / f"{split}-guidance-{guidance:g}.json"

  def _measure(self, one: Contender, split: str, guidance: float, names: Sequence[str]) -> Results:
    """The results of a model: kept ones, and what is missing measured and kept."""
    drawing = dataclasses.replace(self._drawings[one.name], guidance_scale=guidance)
    seed = self._seed + _SPLITS.index(split)
    config = contenders_lib.config_of(one.source)
    is_trained_on = grammar.trained_on(config.task if config else ())
    specs = [
      dataclasses.replace(spec, trained_on=is_trained_on(spec.metric.name))
      for spec in self._specs[split]
      if spec.name in names
    ]
    file = self._file(one.name, split, guidance)

    def measure_missing(missing: list[EvalSpec]) -> Results:
      drawn = evaluate.images(missing)
      _say(f"measuring {one.name}: guidance {guidance:g}, {split}, {drawn:,} images")
      drawer = self._open(drawing, self._about[one.name])
      keep = samples.Keeper(kept.pictures(file), 0, images_per_prompt=_PICTURES)
      score = self._scorer(drawer)
      return measure.of_drawer(drawer, missing, score=score, seed=seed, keep=keep)

    about = {**self._about[one.name], "guidance_scale": guidance, "seed": seed}
    return kept.results(file, about, specs, measure_missing)

  def _open(self, drawing: Drawing, about: Mapping[str, Any]) -> Drawer:
    """The model; one at a time, since each has its weights on the devices."""
    if self._drawer is None or self._drawer[0] != drawing:
      self._drawer = None
      self._drawer = drawing, Drawer(drawing)
      kept.check_as_before(drawing, about)
    return self._drawer[1]

  def _scorer(self, drawer: Drawer) -> metric_lib.MetricScorer:
    """Applies the metrics, which are tried first."""
    if self._score is None:
      specs = [spec for of_split in self._specs.values() for spec in of_split]
      self._score = measure.tried_scorer(metric_lib.uses(specs), drawer, self._scoring)
    return self._score
