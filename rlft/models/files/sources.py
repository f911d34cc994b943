"""Weights and configs from wherever they are: a file, a directory, or a model hub.

A source is written as one string:

    /path/to/file.safetensors (or .pt, .pth, .bin)   one file
    /path/to/directory                               the weights in it, in one file or in shards
    org/name@revision                                a repository of the Hugging Face hub
    org/name@revision/file.pt                        one of its files

What exists on disk wins. A hub's repository needs a revision, because its files may change: a
commit hash is for ever, a branch or a tag is not. It may be a pull request's (`refs/pr/11`); in a
branch's name a slash is written `%2F`. Nothing in a file is executed.
"""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
from typing import Any

import numpy as np

from rlft.models.files import arrays, hub
from rlft.storage import files
from rlft.types import UserError

# Files of weights in a directory, best first.
WEIGHTS = (
  "model.safetensors",
  "open_clip_model.safetensors",
  "pytorch_model.bin",
  "open_clip_pytorch_model.bin",
  "model.fp16.safetensors",
)
CONFIG = "config.json"
# Before the suffix of files in half precision.
_HALF = ".fp16"


def open_weights(
  source: str | os.PathLike[str], *, names: Sequence[str] = WEIGHTS, key: str | None = None
) -> Mapping[str, np.ndarray]:
  """The arrays of a source (see the head of this file) by name, each read when it is asked for.

  Args:
    source: where the weights are.
    names: files to look for in a directory or repository; the first that is there, in one file or
      in shards, is read.
    key: a pickled file may keep its arrays in an inner dict of that name; if so, take that.

  Returns:
    read-only arrays; of type float32, float16, bfloat16 (ml_dtypes) or an integer.

  Raises:
    UserError: nothing is there, or it is damaged, or not what its name says.
  """
  return arrays.read_files(_find(source, names), key=key)


def read_config(source: str | os.PathLike[str]) -> dict[str, Any]:
  """The parsed config.json of a source: in the directory or repository, or beside the file.

  Raises:
    UserError: there is none, or it is not JSON.
  """
  return read_json(open_file(source, CONFIG))


def open_file(source: str | os.PathLike[str], name: str) -> pathlib.Path:
  """The path of a small file of a source: in the directory or repository, or beside the file.

  Raises:
    UserError: there is none.
  """
  if (found := find_file(source, name)) is None:
    raise UserError(f"{source}: there is no {name} in it or beside it; put the model's own there")
  return found


def find_file(source: str | os.PathLike[str], name: str) -> pathlib.Path | None:
  """Opens like `open_file`, but gives None if there is none."""
  path = files.local_path(source)
  if path.exists():
    found = (path if path.is_dir() else path.parent) / name
    return found if found.exists() else None
  repository = _hub(str(source))
  folder = (repository.file or "").rpartition("/")[0]
  return repository.fetch(f"{folder}/{name}" if folder else name)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Parses a file of a JSON object; raises `UserError` if it is missing or holds none."""
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
      raise ValueError("it holds no object")
    return found
  except FileNotFoundError as error:
    raise UserError(f"{path} does not exist; put the model's own there") from error
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path} cannot be read as JSON ({error}); get it again") from error


def find_files(source: str | os.PathLike[str], names: Sequence[str]) -> list[pathlib.Path]:
  """The first of `names` in a source: the file, else the shards that its index names.

  Args:
    source: a directory or a repository. Of a repository that cannot be reached, what is in the
      cache counts.
    names: may begin with a folder.

  Returns:
    paths; empty if there is neither. Shards need not exist: reading them says so.
  """
  unreachable = None
  for name in names:
    try:
      if (found := find_file(source, name)) is not None:
        return [found]
    except hub.UnreachableError as error:
      unreachable = unreachable or error
    for index_name in _indices(name):
      try:
        if (index := find_file(source, index_name)) is not None:
          return _find_shards(source, str(pathlib.PurePath(name).parent), _shards(index))
      except hub.UnreachableError as error:
        unreachable = unreachable or error
  if unreachable:
    raise unreachable
  return []


def _indices(name: str) -> tuple[str, ...]:
  """What the index of `name` in shards may be called; in half precision also as it once was."""
  if _HALF not in name:
    return (f"{name}.index.json",)
  whole = name.replace(_HALF, "")
  return f"{whole}.index{_HALF}.json", f"{whole}{_HALF}.index.json"


def _shards(index: pathlib.Path) -> list[str]:
  found = read_json(index)
  try:
    shards = sorted(set(found["weight_map"].values()))
    if not shards or any(pathlib.PurePath(shard).name != shard for shard in shards):
      raise ValueError
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise UserError(
      f"{index} has no 'weight_map' of file names beside it; get the model again"
    ) from error
  return shards


def _find_shards(
  source: str | os.PathLike[str], folder: str, shards: Sequence[str]
) -> list[pathlib.Path]:
  path = files.local_path(source)
  if path.exists():
    return [path / folder / shard for shard in shards]
  repository = _hub(str(source))
  return [_fetch(repository, str(pathlib.PurePath(folder, shard))) for shard in shards]


def _find(source: str | os.PathLike[str], names: Sequence[str]) -> list[pathlib.Path]:
  path = files.local_path(source)
  if path.is_file():
    return [path]
  repository = None if path.exists() else _hub(str(source))
  if repository is not None and repository.file is not None:
    return [_fetch(repository, repository.file)]
  if found := find_files(source, names):
    return found
  raise UserError(
    f"{source} has none of {', '.join(names)}; name the file"
    + (" itself" if repository is None else f": {repository}/<file>")
  )


def _hub(source: str) -> hub.Repository:
  found = hub.parse(source)
  is_file = pathlib.Path(source).suffix in (".safetensors", *arrays.PICKLED)
  if found is None or (is_file and found.revision is None):
    raise UserError(
      f"{source} does not exist; give a file, a directory or a hub's org/name@revision"
    )
  if found.revision is None:
    raise UserError(
      f"{source} does not exist here, and as a hub's repository it needs a revision, since its "
      f"files may change: write {source}@<commit hash>"
    )
  return found


def _fetch(repository: hub.Repository, name: str) -> pathlib.Path:
  if (found := repository.fetch(name)) is None:
    raise UserError(f"{repository} has no file {name!r}; correct the name or the revision")
  return found
