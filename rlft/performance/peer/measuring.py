"""Measures what both sides have trained, with the same prompts and noise in the same programs."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import pathlib
import tempfile

from rlft import catalog
from rlft.config.settings import Config, EvalConfig
from rlft.evaluation.results import EvalResult
from rlft.inference import measure
from rlft.inference.draw import Drawer, Drawing
from rlft.models.files import pretrained
from rlft.storage import files
from rlft.types import UserError

Found = Mapping[str, EvalResult]


class Measurer:
  """Measures models that differ from a base model in their UNet alone."""

  def __init__(self, config: Config, evals: Sequence[EvalConfig]):
    """Opens prompts and metrics.

    Args:
      config: of a run, whose base model, way of drawing and noise are taken.
      evals: what is measured.

    Raises:
      UserError: a metric, prompts or the base model cannot be read, or it is no directory.
    """
    policy = config.policy
    self._specs = catalog.make_specs(evals, trained_on=config.task)
    self._score = measure.scorer(config.scoring)
    self._drawing = Drawing(
      config.pretrained,
      seed=config.evaluation.eval_seed,
      sampling_steps=policy.sampling_steps,
      guidance_scale=policy.guidance_scale,
      eta=policy.eta,
    )
    self._base_path = pretrained.find(config.pretrained)
    if not isinstance(self._base_path, pathlib.Path):
      raise UserError(f"--pretrained={config.pretrained} is no directory: TRL needs one")
    self._base: Drawer | None = None

  def base(self) -> Found:
    """The base model."""
    return self._measured(self._base_drawer())

  def run(self, workdir: pathlib.Path) -> Found:
    """What a run of ours has trained."""
    return self._model(workdir)

  def network(self, folder: pathlib.Path) -> Found:
    """The base model with the UNet in `folder/unet`, in the layout of diffusers."""
    with tempfile.TemporaryDirectory() as made:
      for part in self._base_path.iterdir():
        source = folder if part.name == "unet" else self._base_path
        (pathlib.Path(made) / part.name).symlink_to((source / part.name).absolute())
      return self._model(pathlib.Path(made))

  def _model(self, path: pathlib.Path) -> Found:
    drawing = dataclasses.replace(self._drawing, model=str(path))
    return self._measured(Drawer(drawing, like=self._base_drawer()))

  def _base_drawer(self) -> Drawer:
    if self._base is None:
      self._base = Drawer(self._drawing)
    return self._base

  def _measured(self, drawer: Drawer) -> Found:
    return measure.of_drawer(drawer, self._specs, score=self._score, seed=self._drawing.seed)


def on_test(evals: Sequence[EvalConfig]) -> list[EvalConfig]:
  """Evaluations on development prompts, on the test prompts of the same kind.

  Raises:
    UserError: one is on others.
  """
  end = "/development"
  for entry in evals:
    if not entry.prompts.endswith(end):
      raise UserError(f"prompts={entry.prompts} are no development prompts: give SOURCE{end}")
  return [
    dataclasses.replace(entry, prompts=entry.prompts.removesuffix(end) + "/test") for entry in evals
  ]


def kept(file: pathlib.Path, make: Callable[[], Found]) -> Found:
  """The results in a file, which are measured and written if there is none."""
  if not file.exists():
    found = make()
    content = {name: result.to_json() for name, result in found.items()}
    files.write_atomic(file, json.dumps(content) + "\n")
  content = json.loads(file.read_text())
  return {name: EvalResult.from_json(name, result) for name, result in content.items()}
