"""Measures a base model and what was trained from it as docs/protocol.md says, each thing once.

What was measured is kept, and is not measured again: of a run in its directory, of the base model
in the directory of the comparison.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import os
import sys
from typing import Any

from rlft import catalog
from rlft.config import fields
from rlft.config.fields import option
from rlft.config.settings import EvalConfig, PolicySettings, ScoringSettings
from rlft.evaluation import evaluate, protocol
from rlft.evaluation import metric as metric_lib
from rlft.evaluation.evaluate import EvalSpec
from rlft.evaluation.protocol import Base, Results
from rlft.inference import best_of, kept, measure
from rlft.inference.best_of import BestOfSettings
from rlft.inference.draw import Drawer, Drawing
from rlft.inference.runs import TrainedRun, open_run
from rlft.report import samples
from rlft.storage import files
from rlft.types import UserError

# Settings of drawing in which methods that are compared must not differ.
DRAWN_ALIKE_BY = ("scheduler", "image_size", "sampling_steps", "eta")
_NO_CHOICE = BestOfSettings()


@dataclasses.dataclass(frozen=True)
class ProtocolSettings:
  """How runs and their base model are compared; each field is a flag of the same name."""

  output: str = option(
    "directory for the tables and for the measurements of the base model", path=True
  )
  pretrained: str = option(
    "the base model of the runs, if it has moved; without --run: the model to measure",
    "",
    path=True,
  )
  guidance_scales: str = option(
    "guidance scales at which the base model is measured; the best for each metric is compared",
    "1,2,3,5,7",
  )
  noise_seed: int = option(
    "seed of the noise for development prompts; test prompts have this seed plus 1",
    2000,
    least=0,
    below=2**32 - 1,
  )
  batch_size: int = option("images drawn at once", 16, least=1)

  def guidances(self) -> tuple[float, ...]:
    """The scales in rising order.

    Raises:
      UserError: they are no numbers above 0.
    """
    return parse_guidances("guidance_scales", self.guidance_scales)


class Protocol:
  """Measures a base model and what was trained from it, each thing once."""

  def __init__(
    self,
    settings: ProtocolSettings,
    evals: Sequence[EvalConfig],
    *,
    base: str,
    policy: PolicySettings,
    scoring: ScoringSettings,
    say: Callable[[str], None] | None = None,
  ):
    """Opens prompts and metrics.

    Args:
      settings: what is compared, and where it is kept.
      evals: on test prompts, each with its development prompts.
      base: the base model.
      policy: how all models draw, but for guidance.
      scoring: how host metrics are called.
      say: takes a line about what is done; stderr if None.

    Raises:
      UserError: no evaluations, one without development prompts, or prompts that cannot be read.
    """
    if not evals:
      raise UserError("there is nothing to compare by: give --eval=emoji-protocol or others")
    for entry in evals:
      if not entry.development:
        raise UserError(
          f"--eval=name={entry.name} has no prompts on which the base model's guidance can be"
          " chosen: add development=... with prompts of the same kind"
        )
    self.evals = tuple(evals)
    self.base_model = settings.pretrained or base
    self._settings, self._scoring = settings, scoring
    self._how = {name: getattr(policy, name) for name in DRAWN_ALIKE_BY}
    self._say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    make = functools.cache(catalog.make_reward)
    moved = [dataclasses.replace(entry, prompts=entry.development) for entry in evals]
    self._specs = {
      split: {spec.name: spec for spec in catalog.make_specs(entries, make=make)}
      for split, entries in (("development", moved), ("test", evals))
    }
    self._base_drawer: tuple[float, Drawer] | None = None
    self._score: metric_lib.MetricScorer | None = None

  def __enter__(self) -> "Protocol":
    return self

  def __exit__(self, *_: object) -> None:
    if self._score is not None:
      self._score.close()

  def base(self, guidances: Sequence[float] = ()) -> Base:
    """The base model: at all scales on development prompts; on test prompts as far as is needed.

    Args:
      guidances: at which methods were trained.
    """
    names = [entry.name for entry in self.evals]
    return protocol.swept(self._base, names, self._settings.guidances(), also=guidances)

  def of_run(self, run: TrainedRun) -> Results:
    """A run on the test prompts, at the guidance at which it was trained.

    Raises:
      UserError: it draws in another way than the base model is drawn here, for example.
    """
    for name, value in self._how.items():
      if (own := getattr(run.config.policy, name)) != value:
        raise UserError(
          f"{run.path} draws with --{name}={own}, others with {value or 'none'}: compare them"
          " apart, each with another --output"
        )
    file = _file_of_run(run.path)
    guidance = run.config.policy.guidance_scale
    about = {"checkpoint": run.stamp, "base": kept.stamp(self.base_model)}
    return self._measured("test", file, guidance, about, run=run)

  def best_of(self, choice: BestOfSettings, guidance: float, names: Sequence[str]) -> Results:
    """The best of several of the base model's images by a reward, on the test prompts.

    Args:
      choice: of how many, by which reward.
      guidance: of the base model.
      names: of evaluations.
    """
    file = _file_of_base(self._settings.output, "test", guidance)
    file = file.with_name(f"{file.stem}-best-of-{choice.best_of}.json")
    about = {**self._about_base(), **dataclasses.asdict(choice)}
    return self._measured("test", file, guidance, about, names=names, choice=choice)

  def _base(self, split: str, guidance: float, names: Sequence[str]) -> Results:
    file = _file_of_base(self._settings.output, split, guidance)
    return self._measured(split, file, guidance, self._about_base(), names=names)

  def _about_base(self) -> dict[str, Any]:
    return {"model": self.base_model, "files": kept.stamp(self.base_model)}

  def _measured(
    self,
    split: str,
    file: files.Path,
    guidance: float,
    about: Mapping[str, Any],
    *,
    run: TrainedRun | None = None,
    names: Sequence[str] | None = None,
    choice: BestOfSettings = _NO_CHOICE,
  ) -> Results:
    """The results of a model: kept ones, and what is missing measured and kept."""
    seed = self._settings.noise_seed + (split == "test")
    about = {**about, **self._how, "guidance_scale": guidance, "seed": seed}
    specs = [self._specs[split][name] for name in (self._specs[split] if names is None else names)]

    drawer_of = functools.cache(lambda: self._drawer(guidance, run))

    def measure_missing(missing: list[EvalSpec]) -> Results:
      where = run.path if run else self.base_model
      drawn = evaluate.images(missing) * choice.best_of
      self._say(f"measuring {where}: guidance {guidance:g}, {split}, {drawn:,} images")
      drawer = drawer_of()
      # Some pictures beside the figures: the same prompts and noise of every model.
      keep = samples.Keeper(kept.pictures(file), 0)
      score = self._scorer(drawer)
      how = best_of.make(choice, missing)
      return measure.of_drawer(drawer, missing, score=score, seed=seed, how=how, keep=keep)

    return kept.results(file, about, specs, measure_missing)

  def _drawer(self, guidance: float, run: TrainedRun | None) -> Drawer:
    """The base model at a scale, or a run's model in its programs."""
    size = self._settings.batch_size
    drawing = Drawing(self.base_model, guidance_scale=guidance, batch_size=size, **self._how)
    # One at a time: each has the weights on the devices.
    if self._base_drawer is None or self._base_drawer[0] != guidance:
      self._base_drawer = None
      self._base_drawer = guidance, Drawer(drawing)
    if run is None:
      return self._base_drawer[1]
    drawing = dataclasses.replace(drawing, model=run.path, pretrained=self._settings.pretrained)
    drawer = Drawer(drawing, like=self._base_drawer[1])
    if open_run(run.path).stamp != run.stamp:  # Measurements would be kept as the former one's.
      raise kept.changed(run.path)
    return drawer

  def _scorer(self, drawer: Drawer) -> metric_lib.MetricScorer:
    """Applies the metrics, which are tried first."""
    if self._score is None:
      specs = [spec for by_name in self._specs.values() for spec in by_name.values()]
      self._score = measure.tried_scorer(metric_lib.uses(specs), drawer, self._scoring)
    return self._score


def parse_guidances(flag: str, text: str) -> tuple[float, ...]:
  """Guidance scales in rising order, from a flag like '1,2,3'.

  Raises:
    UserError: they are no numbers above 0.
  """
  try:
    scales = {fields.convert(part, float) for part in text.split(",")}
    if min(scales) <= 0:
      raise ValueError("is not above 0: give others")
  except ValueError as error:
    raise UserError(f"--{flag}={text} {error}, e.g. 1,2,3") from None
  return tuple(sorted(scales))


def pictures_of(output: str | os.PathLike[str], run: str, guidance: float) -> files.Path:
  """Where pictures of test prompts are, for `samples.read_samples`.

  Args:
    output: directory of the comparison.
    run: directory of a run; '' for the base model.
    guidance: of the base model.
  """
  return kept.pictures(_file_of_run(run) if run else _file_of_base(output, "test", guidance))


def _file_of_run(run: str) -> files.Path:
  return files.path_of(run) / "measured" / "test.json"


def _file_of_base(output: str | os.PathLike[str], split: str, guidance: float) -> files.Path:
  return files.path_of(output) / "base" / f"{split}-guidance-{guidance:g}.json"
