"""Draws with a model as it is, without training."""

from collections.abc import Iterator, Sequence
import dataclasses
import math
import os

import jax
import numpy as np

from rlft.config import fields
from rlft.config.fields import option
from rlft.config.settings import Config
from rlft.diffusion.policy import make_policy
from rlft.diffusion.sampler import Sampler
from rlft.inference import load as finetuned
from rlft.models import lora
from rlft.parallel import sharding
from rlft.storage import files
from rlft.storage import images as images_lib
from rlft.types import UserError

_SHOWN_SIZE = 128  # pixels; smaller images are enlarged in a grid, to be seen at all


@dataclasses.dataclass(frozen=True)
class Drawing:
  """Which model draws, and how; each field is a flag of the same name.

  Where a field is None or empty, the value is the run's own, else the default of training: guidance
  and noise are part of what was trained, and other values give other pictures.
  """

  model: str = option(
    "a run's directory, or a model as --pretrained of launch/train.py takes it", path=True
  )
  pretrained: str = option(
    "the base model of the run, if it has moved since", default="", path=True
  )
  lora: str = option(
    "a LoRA to add to the model: a safetensors file of PEFT, diffusers or Kohya",
    default="",
    path=True,
  )
  ema: bool = option("use the averaged weights (EMA), if the run has them", default=True)
  seed: int | None = option(
    "seed of the noise; if not given, the run's --eval_seed, 1000 for other models, 2000 for a"
    " suite",
    default=None,
    least=0,
    most=2**32 - 1,
  )
  sampling_steps: int | None = option(
    "DDIM steps per image; if not given, the run's, or 50", default=None, least=1
  )
  guidance_scale: float | None = option(
    "scale of classifier-free guidance, 1 is no guidance; if not given, the run's, or 7",
    default=None,
    least=0.0,
  )
  eta: float | None = option(
    "noise of the DDIM steps, 0 is none, 1 is as much as DDPM; if not given, the run's, or 1",
    default=None,
    least=0.0,
    most=1.0,
  )
  scheduler: str = option(
    "KEY=VALUE,... that replace options of the run and of the model's scheduler_config.json",
    default="",
  )
  image_size: str = option(
    "height x width of the images in pixels, e.g. 512 or 512x768; if empty, the run's, or the"
    " model's own",
    default="",
  )
  batch_size: int = option(
    "images drawn at once, rounded up to a multiple of the number of devices",
    default=16,
    least=1,
  )


class Drawer:
  """A loaded model and its sampler, on all devices.

  Attributes:
    found: the model, and the settings of the run that trained it, if one did.
    settings: what is used of seed, sampling_steps, guidance_scale and eta.
  """

  def __init__(self, drawing: Drawing, *, like: "Drawer | None" = None):
    """Loads the model.

    Args:
      drawing: which, and how it draws.
      like: draws in the same way with another model of the same base, and so has the programs;
        they are made if it is None.

    Raises:
      UserError: the model cannot be read, or cannot be sampled in this way.
    """
    self.found = finetuned.load(
      drawing.model,
      ema=drawing.ema,
      base=drawing.pretrained,
      scheduler=drawing.scheduler,
      image_size=drawing.image_size,
      lora=drawing.lora,
    )
    trained = fields.flat(self.found.config or Config())

    def setting(name, own):
      value = getattr(drawing, name)
      return trained[own] if value is None else value

    policy = {name: setting(name, name) for name in ("sampling_steps", "guidance_scale", "eta")}
    if not math.isfinite(policy["guidance_scale"]):
      raise UserError("--guidance_scale is not a finite number: give one, e.g. 7")
    self.settings = {"seed": setting("seed", "eval_seed"), **policy}
    model, self._weights = self.found.model, None
    if like is not None:
      self._sampler = like._sampler
      self._weights = lora.Weights(sharding.place(sharding.make_mesh(), model.params["unet"]))
      return
    devices = jax.device_count()
    size = math.ceil(drawing.batch_size / devices) * devices
    self._sampler = Sampler(model, make_policy(model, **policy), batch_size=size)

  def __call__(self, texts: Sequence[str], *, progress: str) -> np.ndarray:
    """`[N, H, W, 3]` float32 in [0, 1]; image i depends on (seed, i, its prompt) alone."""
    batches = self.batches(texts, seed=self.settings["seed"], progress=progress)
    return np.concatenate(list(batches))

  def batches(self, texts: Sequence[str], *, seed: int, progress: str) -> Iterator[np.ndarray]:
    """The same images, by any seed, a batch at a time."""
    return self._sampler.batches(texts, seed, weights=self._weights, progress=progress)


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
  check_output(output)
  draw = Drawer(drawing)
  # Only for its warning about prompts that are too long.
  draw.found.model.tokenize(texts, source="--prompt and --prompts")
  images = draw([text for text in texts for _ in range(images_per_prompt)], progress="sampling")
  columns = images_per_prompt if images_per_prompt > 1 else math.ceil(len(texts) ** 0.5)
  scale = max(1, _SHOWN_SIZE // images.shape[1])
  images_lib.save_png(output, images_lib.grid(images, columns, scale=scale))
  how = ", ".join(f"{name} {value:g}" for name, value in draw.settings.items())
  return f"{output}: {len(texts)} prompts, {images_per_prompt} images each ({how})"


def check_output(path: str | os.PathLike[str]) -> None:
  """Says before hours of sampling what would be said after them.

  Raises:
    UserError: no file of that name can be written.
  """
  path = files.path_of(path)
  if files.is_bucket(path):
    files.check_writable(str(path.parent))
    return
  if path.is_dir():
    raise UserError(f"{path} is a directory: give the name of a file")
  with files.writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
  if not os.access(path.parent, os.W_OK):
    raise UserError(f"cannot write in {path.parent}: give a file in another directory")
