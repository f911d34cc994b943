"""Results of evaluations that are kept in a file, so that nothing is measured twice."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

from rlft.evaluation import evaluate
from rlft.evaluation.evaluate import EvalSpec
from rlft.evaluation.protocol import Results
from rlft.evaluation.results import EvalResult
from rlft.inference import load as finetuned
from rlft.inference import runs
from rlft.inference.draw import Drawing
from rlft.models.files import pretrained, single_file
from rlft.rewards import grammar
from rlft.storage import files
from rlft.types import UserError


def results(
  file: files.Path,
  about: Mapping[str, Any],
  specs: Sequence[EvalSpec],
  measure: Callable[[list[EvalSpec]], Results],
) -> Results:
  """The results of evaluations: those in a file, and the missing ones measured and added to it.

  Args:
    file: where they are kept; it is written after every set of images.
    about: what was measured and how, as JSON can hold it; results about something else are
      replaced.
    specs: the evaluations.
    measure: measures those that share their images.

  Returns:
    By name, in the order of `specs`.

  Raises:
    UserError: the file is damaged, or cannot be written.
  """
  found, content = _read(file, about)
  asked = {spec.name: _asked(spec) for spec in specs}
  missing = [s for s in specs if content.get(s.name, {}).get("asked") != asked[s.name]]
  for group in evaluate.sharing(missing):
    for name, result in measure(group).items():
      found[name] = result
      content[name] = {"asked": asked[name], **result.to_json()}
    text = json.dumps({"about": about, "results": content}, indent=1)
    files.write_atomic(file, text + "\n")
  return {spec.name: found[spec.name] for spec in specs}


def pictures(file: files.Path) -> files.Path:
  """The directory of the pictures that belong to a file of results."""
  return file.parent / file.stem


def stamp(model: str) -> Any:
  """Tells the files of a model from those that were there before, by their sizes and times."""
  source = pretrained.find(model)
  if isinstance(source, single_file.Source):
    parts = [source.file, *filter(None, [source.tokenizer])]
    return [_stamp(pathlib.Path(part)) for part in parts]
  return _stamp(source)


def _stamp(source: Any) -> Any:
  if not isinstance(source, pathlib.Path) or not source.exists():
    return str(source)  # A revision of a hub's repository stays as it is.
  return _files(source)


def _files(path: pathlib.Path) -> list[list[Any]]:
  """A file, or all in a folder, by what tells them from what was there before."""
  found = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
  names = [(os.path.relpath(one, path), one) for one in found]
  # What is hidden is a library's own: caches, locks.
  return [[name, *status(one)] for name, one in names if not name.startswith(".") or one == path]


def status(path: pathlib.Path) -> list[int]:
  """Size and time of a file, by which it is told from what was there before.

  Raises:
    UserError: it is missing, or cannot be looked at.
  """
  with files.reading(path):
    found = path.stat()
  return [found.st_size, found.st_mtime_ns]


def about(drawing: Drawing) -> dict[str, Any]:
  """What tells what a model drew from what another did, or the same before it was changed.

  Raises:
    UserError: the model, its base or its LoRA is missing.
  """
  found = {k: v for k, v in dataclasses.asdict(drawing).items() if k not in ("batch_size", "seed")}
  base = drawing.model
  if runs.is_run(base):
    run = runs.open_run(base)
    base = drawing.pretrained or run.config.pretrained
    finetuned.check_base(drawing.model, base)
    found["checkpoint"] = run.stamp
  found["files"] = stamp(base)
  if drawing.lora:
    found["lora_file"] = status(pathlib.Path(drawing.lora))
  return found


def check_as_before(drawing: Drawing, before: Mapping[str, Any]) -> None:
  """Refuses a model, once it is loaded, that is no longer what it was when the command began.

  Args:
    drawing: with the model.
    before: what `about` said then.

  Raises:
    UserError: it was trained on, or replaced.
  """
  now = about(drawing)
  if any(now.get(key) != before.get(key) for key in ("checkpoint", "files", "lora_file")):
    raise changed(drawing.model)


def changed(model: str) -> UserError:
  """What is said of a model that is no longer what it was when the command began."""
  return UserError(
    f"{model} has changed since this command began: give it again when nothing trains there, what"
    " has been measured is kept"
  )


def _asked(spec: EvalSpec) -> dict[str, Any]:
  """What an evaluation measures, so that it can be told from another of its name."""
  drawn_for = evaluate.prompts_of(spec)
  prompts = repr([(prompt.text, sorted(prompt.metadata.items())) for prompt in drawn_for])
  name, options = grammar.split(spec.metric.name)
  paths = [files.local_path(part) for part in (*name.split(":"), *options.values()) if part]
  own = {"files": found} if (found := [_files(path) for path in paths if path.exists()]) else {}
  return {
    "metric": spec.metric.name,
    **own,
    "images": spec.images,
    "images_per_prompt": spec.images_per_prompt,
    "prompts": hashlib.sha256(prompts.encode()).hexdigest(),
  }


def _read(file: files.Path, about: Mapping[str, Any]) -> tuple[dict[str, EvalResult], dict]:
  """The kept results, and how they are kept; nothing if they are about something else."""
  if not file.exists():
    return {}, {}
  with files.reading(file):
    text = file.read_text()
  try:
    content = json.loads(text)
    if content["about"] != about:
      return {}, {}
    kept = content["results"]
    return {name: EvalResult.from_json(name, result) for name, result in kept.items()}, kept
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise UserError(f"{file} holds no measurements ({error!r}): move the file away") from error
