"""The arrays in files of weights: safetensors, or what PyTorch has pickled.

They are mappings from names to read-only numpy arrays, each read when it is asked for. Nothing in a
file is executed.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

import numpy as np
import safetensors

from rlft.models.files import torch_pickle
from rlft.types import UserError

# Suffixes of files of torch.save.
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_FORMATS = "give a .safetensors, .pt, .pth or .bin file"


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

  def shape(self, name: str) -> tuple[int, ...]:
    return shape(self._states[name], name)

  def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    return read_part(self._states[name], name, index)


class _Safetensors(Mapping):
  """The arrays of a safetensors file, read when asked for.

  The file is opened anew for each: while it stays open, all that was read of it counts as memory of
  this process, a second copy of the model.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    try:
      with self._open() as file:
        self._shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
      raise UserError(f"{path} cannot be read ({error}); get it again") from error

  def __getitem__(self, name: str) -> np.ndarray:
    return self.read_part(name, ())

  def __iter__(self):
    return iter(self._shapes)

  def __len__(self) -> int:
    return len(self._shapes)

  def shape(self, name: str) -> tuple[int, ...]:
    return self._shapes[name]

  def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """`array[index]`, of which only that part is read; () reads the whole."""
    with self._open() as file:
      try:
        return file.get_slice(name)[index] if index else file.get_tensor(name)
      except safetensors.SafetensorError as error:
        raise KeyError(name) from error
      except (AttributeError, TypeError) as error:
        # numpy has no such type: 8-bit floats and the like.
        kind = file.get_slice(name).get_dtype()
        raise UserError(
          f"{self._path}: {name} has type {kind}; quantised weights are not supported: use the full"
          " or half precision file of the same model"
        ) from error

  def _open(self) -> safetensors.safe_open:
    return safetensors.safe_open(self._path, framework="numpy")


def shape(state: Mapping[str, np.ndarray], name: str) -> tuple[int, ...]:
  """`state[name].shape`; of a safetensors file, no array is read."""
  return state.shape(name) if isinstance(state, _Safetensors | _Shards) else state[name].shape


def read_part(state: Mapping[str, np.ndarray], name: str, index: tuple[slice, ...]) -> np.ndarray:
  """`state[name][index]`; of a safetensors file, no more than that is read."""
  if isinstance(state, _Safetensors | _Shards):
    return state.read_part(name, index)
  return state[name][index]


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
  if path.suffix not in PICKLED:
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
