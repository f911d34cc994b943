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
  return Pieces(state, {name.removeprefix(prefix): Piece(name) for name in state})


class _Lazy(Mapping):
  """A mapping that knows shapes without reading, and reads parts; `()` is the whole."""

  def shape(self, name: str) -> tuple[int, ...]:
    raise NotImplementedError

  def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    raise NotImplementedError

  def __getitem__(self, name: str) -> np.ndarray:
    return self.read_part(name, ())

  def __contains__(self, name: object) -> bool:
    # That of `Mapping` would read the array.
    return name in iter(self)


@dataclasses.dataclass(frozen=True)
class Piece:
  """What an array in a file is to be, before its parts are read.

  Attributes:
    name: of the array in the file.
    third: 0, 1 or 2, of its rows; None for all. Query, key and value may be one array.
    transposed: whether rows and columns change places.
    flat: whether `[O, I, 1, 1]` becomes `[O, I]`, as a 1x1 convolution is a dense layer.
  """

  name: str
  third: int | None = None
  transposed: bool = False
  flat: bool = False

  def shape(self, state: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    """The shape of the piece."""
    found = self._rows(shape(state, self.name))
    return found[::-1] if self.transposed else found

  def read(self, state: Mapping[str, np.ndarray], index: tuple[slice, ...]) -> np.ndarray:
    """`piece[index]`, of which only that part is read; () reads the whole."""
    whole = shape(state, self.name)
    sizes = self._rows(whole)
    index = (index[::-1] if self.transposed else index) or (slice(None),) * len(sizes)
    if self.third is not None:
      start, stop, step = index[0].indices(sizes[0])
      offset = self.third * sizes[0]
      index = (slice(offset + start, offset + stop, step), *index[1:])
    part = read_part(state, self.name, (*index, *(slice(None),) * (len(whole) - len(index))))
    part = part.reshape(part.shape[: len(sizes)])
    return part.T if self.transposed else part

  def _rows(self, whole: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of what is taken of an array of that shape, before it is transposed."""
    if self.flat and whole[2:] == (1, 1):
      whole = whole[:2]
    return whole if self.third is None else (whole[0] // 3, *whole[1:])


class Pieces(_Lazy):
  """Pieces of the arrays of `state`, under names of their own: `pieces` is `{name: piece}`."""

  def __init__(self, state: Mapping[str, np.ndarray], pieces: Mapping[str, Piece]):
    self._state, self._pieces = state, pieces

  def __iter__(self):
    return iter(self._pieces)

  def __len__(self) -> int:
    return len(self._pieces)

  def shape(self, name: str) -> tuple[int, ...]:
    return self._pieces[name].shape(self._state)

  def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    return self._pieces[name].read(self._state, index)


class _Shards(_Lazy):
  """Several mappings as one."""

  def __init__(self, states: Sequence[Mapping[str, np.ndarray]]):
    self._states = {name: state for state in states for name in state}

  def __iter__(self):
    return iter(self._states)

  def __len__(self) -> int:
    return len(self._states)

  def shape(self, name: str) -> tuple[int, ...]:
    return shape(self._states[name], name)

  def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    return read_part(self._states[name], name, index)


class _Safetensors(_Lazy):
  """The arrays of a safetensors file, read when asked for.

  The file is opened anew for each: while it stays open, all that was read of it counts as memory of
  this process, a second copy of the model.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    try:
      with self._open() as file:
        self._shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        self.metadata = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
      raise UserError(f"{path} cannot be read ({error}); get it again") from error

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


def metadata(state: Mapping[str, np.ndarray]) -> Mapping[str, str]:
  """What the head of a safetensors file says about it; nothing of other files."""
  return state.metadata if isinstance(state, _Safetensors) else {}


def shape(state: Mapping[str, np.ndarray], name: str) -> tuple[int, ...]:
  """`state[name].shape`; of a safetensors file, no array is read."""
  return state.shape(name) if isinstance(state, _Lazy) else state[name].shape


def read_part(state: Mapping[str, np.ndarray], name: str, index: tuple[slice, ...]) -> np.ndarray:
  """`state[name][index]`; of a safetensors file, no more than that is read."""
  if isinstance(state, _Lazy):
    return state.read_part(name, index)
  return state[name][index] if index else state[name]


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
