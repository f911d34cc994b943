"""A model as it is, without training: a grid of what it draws, and its held-out measures."""

from collections.abc import Iterator, Sequence
import dataclasses
import json
import math
import os
import pathlib

import jax
import numpy as np

from rlft import catalog
from rlft.config import fields
from rlft.config.fields import option
from rlft.config.settings import Config, EvalConfig, ScoringSettings
from rlft.diffusion import sampler
from rlft.evaluation import evaluate as evaluate_lib
from rlft.evaluation import summary
from rlft.evaluation.metric import MetricScorer
from rlft.inference import load as finetuned
from rlft.parallel import sharding
from rlft.rewards import grammar
from rlft.storage import files
from rlft.storage import images as images_lib
from rlft.types import UserError

_SHOWN_SIZE = 128  # pixels; smaller images are enlarged in a grid, to be seen at all


@dataclasses.dataclass(frozen=True)
class Drawing:
  """Which model draws, and how; each field is a flag of the same name.

  Where a field is None, the value is the run's own, else the default of training: guidance and
  noise are part of what was trained, and other values give other pictures.
  """

  model: str = option("a run's directory, a model in the diffusers layout, or emoji-sd", path=True)
  ema: bool = option("the averaged weights, where the run has them", default=True)
  seed: int | None = option(
    "of the noise; if not given, that of the run's evaluations",
    default=None,
    least=0,
    most=2**32 - 1,
  )
  sampling_steps: int | None = option(
    "DDIM steps per image; if not given, the run's", default=None, least=1
  )
  guidance_scale: float | None = option(
    "classifier-free guidance, 1 is none; if not given, the run's", default=None, least=0.0
  )
  eta: float | None = option(
    "noise of the DDIM steps, 0 is none, 1 as DDPM; if not given, the run's",
    default=None,
    least=0.0,
    most=1.0,
  )
  batch_size: int = option(
    "images drawn at once, rounded up to a multiple of the devices", default=16, least=1
  )


class Drawer:
  """A loaded model and its sampler, on all devices.

  Attributes:
    found: the model, and the settings of the run that trained it, if one did.
    settings: what is used of seed, sampling_steps, guidance_scale and eta.
  """

  def __init__(self, drawing: Drawing):
    """Loads the model.

    Raises:
      UserError: it cannot be read, or cannot be sampled in this way.
    """
    self.found = finetuned.load(drawing.model, ema=drawing.ema)
    trained = fields.flat(self.found.config or Config())

    def setting(name, own):
      value = getattr(drawing, name)
      return trained[own] if value is None else value

    policy = {name: setting(name, name) for name in ("sampling_steps", "guidance_scale", "eta")}
    if not math.isfinite(policy["guidance_scale"]):
      raise UserError("--guidance_scale is not a finite number: give one, e.g. 7")
    self.settings = {"seed": setting("seed", "eval_seed"), **policy}
    devices = jax.device_count()
    size = math.ceil(drawing.batch_size / devices) * devices
    self._sampler = sampler.Sampler(self.found.model, batch_size=size, **policy)

  def __call__(self, texts: Sequence[str], *, progress: str) -> np.ndarray:
    """`[N, H, W, 3]` float32 in [0, 1]; image i depends on (seed, i, its prompt) alone."""
    return self._sampler(texts, self.settings["seed"], progress=progress)

  def batches(self, texts: Sequence[str], *, progress: str) -> Iterator[np.ndarray]:
    """The same images, a batch at a time."""
    return self._sampler.batches(texts, self.settings["seed"], progress=progress)


def save_grid(
  drawing: Drawing,
  texts: Sequence[str],
  output: str | os.PathLike[str],
  *,
  images_per_prompt: int,
) -> str:
  """Draws images and writes them as one PNG: a row for each prompt.

  Where there is one image for each prompt, the grid is as good as square.

  Args:
    drawing: the model, and how it draws.
    texts: P prompts.
    output: the PNG file.
    images_per_prompt: G.

  Returns:
    A line that says what was drawn.

  Raises:
    UserError: no prompts, a model that cannot be read, or a file that cannot be written.
  """
  if not texts:
    raise UserError("there is nothing to draw: give --prompt or --prompts")
  _check_output(output)
  draw = Drawer(drawing)
  # Only for its warning about prompts that are too long.
  draw.found.model.tokenize(texts, source="--prompt and --prompts")
  images = draw([text for text in texts for _ in range(images_per_prompt)], progress="sampling")
  columns = images_per_prompt if images_per_prompt > 1 else math.ceil(len(texts) ** 0.5)
  scale = max(1, _SHOWN_SIZE // images.shape[1])
  images_lib.save_png(output, images_lib.grid(images, columns, scale=scale))
  how = ", ".join(f"{name} {value:g}" for name, value in draw.settings.items())
  return f"{output}: {len(texts)} prompts, {images_per_prompt} images each ({how})"


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
    _check_output(output)
  specs = catalog.make_specs(evals)
  draw = Drawer(drawing)
  trained = draw.found.config
  if trained is not None:
    specs = specs or catalog.make_specs(trained.eval)
    is_trained_on = grammar.trained_on(trained.task)
    specs = [dataclasses.replace(s, trained_on=is_trained_on(s.metric.name)) for s in specs]
  if not specs:
    raise UserError(f"{drawing.model} has no evaluations of its own: give --eval=emoji or others")
  rows = sharding.batch(sharding.make_mesh())

  def sample(prompts, seed):
    return draw.batches([prompt.text for prompt in prompts], progress="evaluating")

  with MetricScorer(rows=rows, scoring=scoring) as score:
    measured = evaluate_lib.evaluate(specs, sample=sample, score=score, seed=draw.settings["seed"])
  if output:
    content = {
      "model": drawing.model,
      "settings": draw.settings,
      "results": {name: result.summary() for name, result in measured.items()},
    }
    files.write_atomic(output, json.dumps(content, indent=2) + "\n")
  return summary.table(measured)


def _check_output(path: str | os.PathLike[str]) -> None:
  """Says before hours of sampling what would be said after them."""
  path = pathlib.Path(path)
  if path.is_dir():
    raise UserError(f"{path} is a directory: give the name of a file")
  with files.writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
  if not os.access(path.parent, os.W_OK):
    raise UserError(f"cannot write in {path.parent}: give a file in another directory")
