"""Where else a run's numbers and pictures go while it runs: TensorBoard, Weights & Biases."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import hashlib
import logging
import os
import pathlib
import time
from typing import Any, Protocol

import numpy as np
import PIL.Image
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata

from rlft.evaluation import results
from rlft.report import samples, usage
from rlft.storage import files
from rlft.storage import images as images_lib
from rlft.types import UserError

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Picture:
  """Pixels `[H, W, 3]` uint8 under a name, with the prompt that they were drawn for."""

  name: str
  caption: str
  pixels: np.ndarray


class Tracker(Protocol):
  """Takes numbers and pictures of iterations."""

  def write(self, iteration: int, values: Mapping[str, float]) -> None:
    """Numbers by name; may come several times for an iteration."""

  def show(self, iteration: int, pictures: Sequence[Picture]) -> None:
    """Pictures of an iteration."""

  def close(self) -> None:
    """Everything was written before; raises nothing."""


def open_trackers(
  names: str,
  workdir: str | os.PathLike[str],
  *,
  first_iteration: int,
  config: Mapping[str, Any],
) -> list[Tracker]:
  """Opens trackers.

  Args:
    names: 'none', or names joined by '+': tensorboard, wandb.
    workdir: the run's directory.
    first_iteration: the iteration that will be written first.
    config: the run's settings.

  Raises:
    UserError: the library is missing or refuses, or files cannot be written.
  """
  found: list[Tracker] = []
  for name in names.split("+"):
    if name == "tensorboard" and files.is_bucket(workdir):
      _log.warning(
        "no TensorBoard files are written to the bucket of %s: metrics.jsonl has the same numbers",
        workdir,
      )
    elif name == "tensorboard":
      found.append(TensorBoard(workdir, first_iteration=first_iteration))
    elif name == "wandb":
      found.append(Wandb(workdir, config=config))
  return found


def write_evaluation(
  trackers: Sequence[Tracker], workdir: str | os.PathLike[str], iteration: int
) -> None:
  """Gives trackers what `workdir` has of the evaluations after so many iterations.

      eval/<name>/mean, low, high   the mean and its interval
      eval/<name>/found             share of the images that show what is measured, where known
      samples/<name>/<number>       pictures

  Raises:
    UserError: a damaged file in the run's directory, or one that cannot be written.
  """
  if not trackers:
    return
  values = {
    f"eval/{name}/{key}": getattr(result, key)
    for at, found in results.read_history(workdir)
    if at == iteration
    for name, result in found.items()
    for key in ("mean", "low", "high", "found")
    if np.isfinite(getattr(result, key))
  }
  pictures = list(_pictures(workdir, iteration))
  for tracker in trackers:
    tracker.write(iteration, values)
    tracker.show(iteration, pictures)


def _pictures(workdir: str | os.PathLike[str], iteration: int) -> Iterator[Picture]:
  for name, sheet in samples.read_sheets(workdir, iteration).items():
    for number, (prompt, cell) in enumerate(zip(sheet.prompts, sheet.cells, strict=True)):
      yield Picture(f"samples/{name}/{number}", prompt, cell)


class TensorBoard:
  """Event files in `tensorboard/` of the run's directory."""

  def __init__(self, workdir: str | os.PathLike[str], *, first_iteration: int):
    """Opens a file; tells TensorBoard to forget what was written from the iteration on.

    Raises:
      UserError: the directory cannot be written.
    """
    self._directory = pathlib.Path(workdir) / "tensorboard"
    with files.writing(self._directory):
      self._directory.mkdir(parents=True, exist_ok=True)
      # Not tensorboardX's SummaryWriter: it writes in a thread, which dies silently when the disk
      # is full and then blocks the run for ever. Its names repeat within a second, hence ours.
      suffix = f".{os.getpid()}.{time.monotonic_ns()}"
      self._events = EventsWriter(str(self._directory / "events"), suffix)
    self._add(first_iteration, session_log=SessionLog(status=SessionLog.START))

  def write(self, iteration: int, values: Mapping[str, float]) -> None:
    """See `Tracker`.

    Raises:
      UserError: the disk is full.
    """
    found = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    self._add(iteration, summary=Summary(value=found))

  def show(self, iteration: int, pictures: Sequence[Picture]) -> None:
    """See `Tracker`.

    Raises:
      UserError: the disk is full.
    """
    found = []
    for picture in pictures:
      height, width, _ = picture.pixels.shape
      image = Summary.Image(
        height=height,
        width=width,
        colorspace=3,
        encoded_image_string=images_lib.encode_png(picture.pixels),
      )
      about = SummaryMetadata(summary_description=picture.caption)
      found.append(Summary.Value(tag=picture.name, image=image, metadata=about))
    self._add(iteration, summary=Summary(value=found))

  def _add(self, iteration: int, **content: Any) -> None:
    with files.writing(self._directory):
      self._events.write_event(Event(wall_time=time.time(), step=iteration, **content))
      self._events.flush()

  def close(self) -> None:
    """See `Tracker`."""
    # After a write that failed, closing tries it again.
    with contextlib.suppress(OSError):
      self._events.close()


class Wandb:
  """A run of Weights & Biases; the same one again when the training goes on.

  Where no network is, `WANDB_MODE=offline` in the environment keeps it in the run's directory.
  """

  def __init__(self, workdir: str | os.PathLike[str], *, config: Mapping[str, Any]):
    """Opens or continues the run.

    Raises:
      UserError: wandb is not installed, or refuses.
    """
    try:
      import wandb
    except ImportError as error:
      raise UserError("--tracker=wandb needs wandb: pip install 'rlft[wandb]'") from error
    where = os.fspath(workdir) if files.is_bucket(workdir) else os.path.abspath(workdir)
    try:
      self._run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "rlft"),
        name=os.path.basename(where),
        # The same for every start of the run; another for one that was in this directory before.
        id=hashlib.sha256(f"{where} {usage.first_start(workdir)}".encode()).hexdigest()[:16],
        resume="allow",
        dir=None if files.is_bucket(workdir) else where,
        config=dict(config),
      )
    # wandb's errors have no common base, and change from release to release.
    except Exception as error:
      reason = " ".join(str(error).split())[:200] or type(error).__name__
      raise UserError(
        f"--tracker=wandb: {reason}; log in with 'wandb login', or set WANDB_MODE=offline"
      ) from error
    self._image = wandb.Image
    # Iterations that are done again after a crash have numbers that wandb's own step refuses.
    self._run.define_metric("iteration")
    self._run.define_metric("*", step_metric="iteration")

  def write(self, iteration: int, values: Mapping[str, float]) -> None:
    """See `Tracker`."""
    self._run.log({"iteration": iteration, **values})

  def show(self, iteration: int, pictures: Sequence[Picture]) -> None:
    """See `Tracker`."""
    shown = {
      one.name: self._image(PIL.Image.fromarray(one.pixels), caption=one.caption)
      for one in pictures
    }
    self._run.log({"iteration": iteration, **shown})

  def close(self) -> None:
    """See `Tracker`."""
    with contextlib.suppress(Exception):
      self._run.finish()
