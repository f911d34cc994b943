"""The pictures that are compared: drawn by models, or copied from folders."""

from collections.abc import Sequence
import json
import pathlib
import sys
from typing import Any

import numpy as np

from rlft import catalog
from rlft.config import fields
from rlft.data import lines
from rlft.inference import contenders as contenders_lib
from rlft.inference import kept, runs
from rlft.inference.contenders import Contender
from rlft.inference.draw import Drawer, Drawing
from rlft.models.files import pretrained
from rlft.rating.settings import PromptSet, StudySettings
from rlft.rating.study import Item, Study
from rlft.storage import files, images
from rlft.types import Prompt, UserError

_LISTING = "metadata.jsonl"


def is_folder(source: str) -> bool:
  """Whether this is a folder of pictures, not a run or a model."""
  return (files.local_path(source) / _LISTING).is_file()


def prompts_of(entry: PromptSet, contenders: Sequence[Contender]) -> list[Prompt]:
  """The prompts of a set.

  Raises:
    UserError: they cannot be read, or there is no folder to take them from.
  """
  if entry.prompts:
    source = catalog.load_prompts(entry.prompts)
  else:
    folders = [one for one in contenders if is_folder(one.source)]
    if not folders:
      raise UserError(f"--set=name={entry.name} has no prompts: add prompts=...")
    source = [Prompt(text) for text in _listed(folders[0].source)]
  count = min(len(source), entry.count)
  return [source[place * len(source) // count] for place in range(count)]


def check(study: Study) -> None:
  """Finds what is missing before anything is written, or drawn for hours.

  Raises:
    UserError: there is no such model or folder, or a folder lacks a prompt.
  """
  for contender in range(len(study.contenders)):
    source, options = _source(study, contender), study.contenders[contender].drawing
    if is_folder(source):
      if options:
        raise UserError(
          f"--models={source}: {next(iter(options))} has no effect on a folder of pictures: leave"
          " it out"
        )
      for place in range(len(study.sets)):
        for path, _ in _copies(study, contender, place):
          _decode(path)
    else:
      _check_model(source)
      kept.about(_drawing(study, contender, batch_size=1))
  if all(is_folder(one.source) for one in study.contenders):
    given, default = fields.flat(study.settings), fields.flat(StudySettings())
    for name in (*contenders_lib.DRAWN_BY, "image_size", "pretrained"):
      if given[name] != default[name]:
        raise UserError(f"--{name} has no effect on folders of pictures: leave it out")


def collect(study: Study, *, batch_size: int) -> list[str]:
  """Draws or copies the pictures that are not there yet.

  Args:
    study: saved.
    batch_size: images drawn at once.

  Returns:
    A line for each contender, on how it drew.

  Raises:
    UserError: a model or a picture cannot be read, or a folder lacks a prompt.
  """
  said = []
  # What costs nothing comes first: its mistakes are found before anything is drawn.
  order = sorted(range(len(study.contenders)), key=lambda k: not is_folder(_source(study, k)))
  for contender in order:
    source = _source(study, contender)
    missing = [place for place in range(len(study.sets)) if _is_missing(study, contender, place)]
    _note_origin(study, contender, is_whole=not missing)
    if is_folder(source):
      for place in missing:
        for path, target in _copies(study, contender, place):
          images.save_png(target, _decode(path))
      said.append(f"{source}: pictures as they are")
      continue
    drawing = _drawing(study, contender, batch_size)
    how = ", ".join(
      f"{name} {getattr(drawing, name):g}" for name in (*contenders_lib.DRAWN_BY, "seed")
    )
    said.append(f"{source}: {how}")
    if missing:
      print(f"drawing with {said[-1]}", file=sys.stderr, flush=True)
      draw = Drawer(drawing)
      for place in missing:
        _draw(study, contender, place, draw)
  return said


def _source(study: Study, contender: int) -> str:
  return study.contenders[contender].source


def _items(study: Study, place: int) -> list[tuple[int, Item]]:
  """The items of a set with their places among all."""
  return [(number, item) for number, item in enumerate(study.items) if item.set == place]


def _is_missing(study: Study, contender: int, place: int) -> bool:
  paths = (path for item, _ in _items(study, place) for path in study.pictures(item, contender))
  return not all(path.exists() for path in paths)


def _note_origin(study: Study, contender: int, *, is_whole: bool) -> None:
  """Notes what a contender's pictures are made from; says so if that has changed since.

  Raises:
    UserError: it has, and some of its pictures are missing: they would be of something else.
  """
  file = study.directory / "pictures" / f"from-{contender}.json"
  source = _source(study, contender)
  try:
    origin = json.dumps(_origin(study, contender)) + "\n"
  except UserError:
    if is_whole:
      return  # What they were made from is no longer needed.
    raise
  if not file.exists() or not any(file.parent.glob(f"*-{contender}-*.png")):
    files.write_atomic(file, origin)
    return
  with files.reading(file):
    if file.read_text() == origin:
      return
  if not is_whole:
    raise UserError(
      f"{source} has changed since some of its pictures were made: give another --output"
    )
  said = f"{source} has changed since its pictures were made; it is they that are compared"
  print(said, file=sys.stderr, flush=True)


def _origin(study: Study, contender: int) -> Any:
  """What tells a contender from what it was before it was changed, as JSON can hold it."""
  if not is_folder(_source(study, contender)):
    return kept.about(_drawing(study, contender, batch_size=1))
  copies = [pair for place in range(len(study.sets)) for pair in _copies(study, contender, place)]
  return [kept.status(path) for path, _ in copies]


# ---------------------------------------------------------------------------- models


def _check_model(source: str) -> None:
  """Raises `UserError` if there is neither a run nor a model."""
  if runs.is_run(source):
    return
  try:
    pretrained.find(source)
  except UserError:
    folder = files.local_path(source)
    if not folder.is_dir() or all(
      path.suffix.lower() not in images.SUFFIXES for path in folder.iterdir()
    ):
      raise
    raise UserError(
      f"{source} has pictures and no {_LISTING}: add one, with a line"
      ' {"file_name": ..., "text": ...} for each picture and its prompt'
    ) from None


def _drawing(study: Study, contender: int, batch_size: int) -> Drawing:
  """How a model draws."""
  settings = study.settings
  given = Drawing(
    "",
    pretrained=settings.pretrained,
    seed=settings.seed,
    image_size=settings.image_size,
    batch_size=batch_size,
    **{name: getattr(settings, name) for name in contenders_lib.DRAWN_BY},
  )
  return contenders_lib.drawing(study.contenders[contender], study.contenders, given)


def _draw(study: Study, contender: int, place: int, draw: Drawer) -> None:
  """Draws the pictures of a set of prompts; image i has the same noise from every model."""
  items = _items(study, place)
  paths = [path for item, _ in items for path in study.pictures(item, contender)]
  texts = [item.text for _, item in items for _ in range(study.sets[place].images)]
  drawn = draw.batches(texts, seed=study.settings.seed, progress=study.sets[place].name)
  todo = iter(paths)
  for batch in drawn:
    for image in np.asarray(batch):
      images.save_png(next(todo), image)


# ---------------------------------------------------------------------------- folders


def _listed(source: str) -> dict[str, list[pathlib.Path]]:
  """The files of each prompt, in the order of a folder's list.

  Raises:
    UserError: the list cannot be read, or names a file that is not in the folder.
  """
  folder = files.local_path(source).resolve()
  listing = folder / _LISTING
  found: dict[str, list[pathlib.Path]] = {}
  with lines.reading(str(listing)):
    for _, _, row in lines.json_rows(str(listing), ("file_name", "text")):
      path = (folder / row["file_name"]).resolve()
      # Raters see these pictures: a list from elsewhere must not show what else is on the machine.
      if not path.is_relative_to(folder):
        raise UserError(f"{listing} names {row['file_name']}, which is outside: remove its line")
      found.setdefault(row["text"], []).append(path)
  if not found:
    raise UserError(f"{listing} is empty: add a line for each picture")
  return found


def _copies(study: Study, contender: int, place: int) -> list[tuple[pathlib.Path, pathlib.Path]]:
  """A folder's pictures of a set of prompts, the first that it has of each: from where to where.

  Raises:
    UserError: it has not enough of them, or as `_listed`.
  """
  source, entry = _source(study, contender), study.sets[place]
  listed, found = _listed(source), []
  for number, item in _items(study, place):
    paths = listed.get(item.text, [])
    if len(paths) < entry.images:
      raise UserError(
        f"{source} has {len(paths)} pictures of {item.text!r}, of which set {entry.name} needs"
        f" {entry.images}: add them to {_LISTING}, or give other prompts"
      )
    found += zip(paths, study.pictures(number, contender), strict=False)
  return found


def _decode(path: pathlib.Path) -> np.ndarray:
  """An image file as `[H, W, 3]` uint8, upright, on white where it is transparent.

  Only its pixels: what else is in a file may name the model that drew it.
  """
  try:
    return np.asarray(images.upright(path))
  except Exception as error:  # Decoders of two dozen formats raise what they like.
    raise UserError(
      f"picture {path} cannot be decoded ({error}): replace it, or remove its line from {_LISTING}"
    ) from error


def read(paths: Sequence[pathlib.Path]) -> np.ndarray:
  """Pictures of one size `[N, H, W, 3]` float32 in [0, 1].

  Raises:
    UserError: one cannot be decoded, or is of another size than the first.
  """
  found = [_decode(path) for path in paths]
  for path, image in zip(paths, found, strict=True):
    if image.shape != found[0].shape:
      sizes = " and ".join(f"{one.shape[0]}x{one.shape[1]}" for one in (found[0], image))
      raise UserError(
        f"pictures of {sizes} ({path}) cannot be scored together: give folders with pictures of one"
        " size"
      )
  return np.stack(found).astype(np.float32) / 255
