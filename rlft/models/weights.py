"""Weights and configs from wherever they are: a file, a directory, or a model hub.

A source is written as one string:

    /path/to/file.safetensors (or .pt, .pth, .bin)   one file
    /path/to/directory                               the weights in it, in one file or in shards
    org/name@revision                                a repository of the Hugging Face hub
    org/name@revision/file.pt                        one of its files

What exists on disk wins. A hub's repository needs a revision, because its files may change: a
commit hash is for ever, a branch or a tag is not. Nothing in a file is executed.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np
import safetensors
import transformers

from rlft.models import hub, torch_pickle
from rlft.types import UserError

# Files of weights in a directory, best first.
WEIGHTS = (
  "model.safetensors",
  "open_clip_model.safetensors",
  "pytorch_model.bin",
  "open_clip_pytorch_model.bin",
)
CONFIG = "config.json"
_TOKENIZER = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
# Before the suffix of files in half precision.
_HALF = ".fp16"

_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_FORMATS = "give a .safetensors, .pt, .pth or .bin file"


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
  return read_files(_find(source, names), key=key)


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
  """As `open_file`, but None if there is none."""
  path = pathlib.Path(source)
  if path.exists():
    found = (path if path.is_dir() else path.parent) / name
    return found if found.exists() else None
  repository = _hub(str(source))
  folder = (repository.file or "").rpartition("/")[0]
  return repository.fetch(f"{folder}/{name}" if folder else name)


def open_tokenizer(source: str | os.PathLike[str]) -> transformers.CLIPTokenizer:
  """The CLIP tokenizer of a source: vocab.json and merges.txt, in it or beside the file.

  Raises:
    UserError: there is none.
  """
  try:
    # The others are optional; on a hub all have to be in the cache before they are read.
    vocabulary, merges, *_ = [find_file(source, name) for name in _TOKENIZER]
    if vocabulary is None or merges is None:
      raise OSError("there is none")
    return transformers.CLIPTokenizer.from_pretrained(str(vocabulary.parent), local_files_only=True)
  except (OSError, TypeError, ValueError, UserError) as error:
    first_line = str(error).splitlines()[0]
    raise UserError(
      f"{source}: no CLIP tokenizer can be read from it ({first_line}); "
      "it needs vocab.json and merges.txt"
    ) from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Parses a JSON file; raises `UserError` if it is missing or is none."""
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise UserError(f"{path} does not exist; put the model's own there") from error
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read as JSON ({error}); get it again") from error


def find_files(directory: pathlib.Path, names: Sequence[str]) -> list[pathlib.Path]:
  """The first of `names` in the directory: the file, else the shards that its index names.

  Returns:
    paths, which need not exist if an index names them; empty if there is neither.
  """
  for name in names:
    if (directory / name).exists():
      return [directory / name]
    if (directory / _index(name)).exists():
      return [directory / shard for shard in _shards(directory / _index(name))]
  return []


def read_files(
  files: Sequence[pathlib.Path], *, key: str | None = None
) -> Mapping[str, np.ndarray]:
  """The arrays of all files together; `key` as in `open_weights`."""
  states = [_read(path, key) for path in files]
  return states[0] if len(states) == 1 else _Shards(states)


def strip_prefix(state: Mapping[str, np.ndarray], prefix: str) -> Mapping[str, np.ndarray]:
  """The arrays under names without `prefix`, if every name has it ('module.' of DataParallel)."""
  if not all(name.startswith(prefix) for name in state):
    return state
  return Renamed(state, {name.removeprefix(prefix): name for name in state})


@dataclasses.dataclass(frozen=True)
class Renamed(Mapping):
  """Some arrays of `state` under other names: `names` is `{new name: name in state}`."""

  state: Mapping[str, np.ndarray]
  names: Mapping[str, str]

  def __getitem__(self, name: str) -> np.ndarray:
    return self.state[self.names[name]]

  def __iter__(self):
    return iter(self.names)

  def __len__(self) -> int:
    return len(self.names)


class _Shards(Mapping):
  """Several mappings as one."""

  def __init__(self, states: Sequence[Mapping[str, np.ndarray]]):
    self._states = {name: state for state in states for name in state}

  def __getitem__(self, name: str) -> np.ndarray:
    return self._states[name][name]

  def __iter__(self):
    return iter(self._states)

  def __len__(self) -> int:
    return len(self._states)


class _Safetensors(Mapping):
  """The arrays of a safetensors file, read when asked for."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    try:
      self._handle = safetensors.safe_open(path, framework="numpy")
    except (OSError, safetensors.SafetensorError) as error:
      raise UserError(f"{path} cannot be read ({error}); get it again") from error
    self._names = list(self._handle.keys())

  def __getitem__(self, name: str) -> np.ndarray:
    try:
      return self._handle.get_tensor(name)
    except safetensors.SafetensorError as error:
      raise KeyError(name) from error
    except (AttributeError, TypeError) as error:
      # numpy has no such type: 8-bit floats and the like.
      kind = self._handle.get_slice(name).get_dtype()
      raise UserError(
        f"{self._path}: {name} has type {kind}; quantised weights are not supported: use the full "
        "or half precision file of the same model"
      ) from error

  def __iter__(self):
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


def _read(path: pathlib.Path, key: str | None) -> Mapping[str, np.ndarray]:
  try:
    with path.open("rb") as file:
      head = file.read(1024)
  except FileNotFoundError as error:
    raise UserError(
      f"{path} does not exist, but the index beside it names it; get the model again"
    ) from error
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error}); {_FORMATS}") from error
  # After the length of its header, in eight bytes of any value, a safetensors file has JSON.
  safe = head[8:9] == b"{"
  text = head.lstrip()[:64].lower()
  if text.startswith((b"<!doctype", b"<html", b"<?xml")):
    raise UserError(
      f"{path} is a web page, not weights; download the file itself (a hub's 'resolve' or 'raw' "
      "address, not the page that shows it)"
    )
  if text.startswith(b"version https://git-lfs"):
    raise UserError(f"{path} is a pointer of Git LFS, not weights; run 'git lfs pull' beside it")
  if path.suffix == ".safetensors":
    if not safe and torch_pickle.looks_pickled(head):
      raise UserError(f"{path} is a file of torch.save, not safetensors; rename it to .pt")
    return _Safetensors(path)
  if path.suffix not in _PICKLED:
    raise UserError(f"{path}: unknown kind of file {path.suffix!r}; {_FORMATS}")
  if safe:
    raise UserError(f"{path} is a safetensors file; rename it to .safetensors")
  return _arrays(torch_pickle.load(path), path, key)


def _arrays(loaded: Any, path: pathlib.Path, key: str | None) -> Mapping[str, np.ndarray]:
  """The state dict in what a pickled file holds; raises `UserError` if there is none."""
  if isinstance(loaded, Mapping) and key in loaded:
    loaded = loaded[key]
  if not isinstance(loaded, Mapping):
    raise UserError(
      f"{path} holds {type(loaded).__name__}, expected a dict of arrays; save model.state_dict()"
    )
  for name, value in loaded.items():
    if not isinstance(name, str) or not isinstance(value, np.ndarray):
      inside = "a dict" if isinstance(value, Mapping) else type(value).__name__
      raise UserError(
        f"{path}: {name!r} is {inside}, expected a dict of arrays"
        f"{f' or a dict with the entry {key!r}' if key else ''}; save model.state_dict() alone"
      )
  return loaded


def _index(name: str) -> str:
  """'x.safetensors' -> 'x.safetensors.index.json'; 'x.fp16...' -> 'x....index.fp16.json'."""
  whole = name.replace(_HALF, "")
  return f"{whole}.index{_HALF if _HALF in name else ''}.json"


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


def _find(source: str | os.PathLike[str], names: Sequence[str]) -> list[pathlib.Path]:
  path = pathlib.Path(source)
  if path.is_file():
    return [path]
  if path.is_dir():
    if files := find_files(path, names):
      return files
    raise UserError(f"{path} has none of {', '.join(names)}; name the file itself")
  return _hub_files(_hub(str(source)), names)


def _hub(source: str) -> hub.Repository:
  found = hub.parse(source)
  is_file = pathlib.Path(source).suffix in (".safetensors", *_PICKLED)
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


def _hub_files(repository: hub.Repository, names: Sequence[str]) -> list[pathlib.Path]:
  """As `find_files`, but downloads; the one file if the source names it."""
  if repository.file is not None:
    return [_fetch(repository, repository.file)]
  for name in names:
    if (found := repository.fetch(name)) is not None:
      return [found]
    if (index := repository.fetch(_index(name))) is not None:
      return [_fetch(repository, shard) for shard in _shards(index)]
  raise UserError(
    f"{repository} has none of {', '.join(names)}; name the file: {repository}/<file>"
  )


def _fetch(repository: hub.Repository, name: str) -> pathlib.Path:
  if (found := repository.fetch(name)) is None:
    raise UserError(f"{repository} has no file {name!r}; correct the name or the revision")
  return found
