"""Reads what `torch.save` wrote, without torch and without executing anything.

Two formats: a zip archive (torch >= 1.6) of one pickle and the raw bytes of every storage, and a
stream of pickles followed by the storages (before). The unpickler knows a fixed list of names,
each of which stands for a harmless function of this file; any other name in the pickle, such as
`os.system`, is refused, whatever it would do. A tensor becomes a read-only numpy view into the
mapped file, so that only what is used is read.

The formats are described by `torch/serialization.py` and `torch/_utils.py` of PyTorch.
"""

from collections.abc import Callable
import io
import math
import os
import pathlib
import pickle
import struct
from typing import Any, BinaryIO, NamedTuple, NoReturn
import zipfile

import jax.numpy as jnp
import numpy as np

from rlft.types import UserError

_ZIP = b"PK\x03\x04"
# First of a legacy stream: this number as a pickle, then the version of the protocol.
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_STORAGES = {
  "FloatStorage": np.float32,
  "DoubleStorage": np.float64,
  "HalfStorage": np.float16,
  "BFloat16Storage": jnp.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}
_AGAIN = "download or export it again"
_HARMLESS = (
  "save model.state_dict() with torch.save, or convert the file to safetensors where it is trusted"
)


def looks_pickled(head: bytes) -> bool:
  """Whether a file that begins with `head` may be one of `torch.save`."""
  return head.startswith((_ZIP, b"\x80"))


def load(path: str | os.PathLike[str]) -> Any:
  """Reads a file that `torch.save` wrote.

  Args:
    path: the file.

  Returns:
    what was saved: dicts, lists, tuples, strings, numbers, and a read-only numpy array for every
    tensor, of the same type (bfloat16 is that of ml_dtypes).

  Raises:
    UserError: the file is missing, truncated, of another kind, names something that is not on the
      list, or has a tensor that does not lie within its storage.
  """
  path = pathlib.Path(path)
  try:
    with path.open("rb") as file:
      head = file.read(len(_ZIP))
      if not looks_pickled(head):
        _fail(path, f"is not a file of torch.save (it begins with {head!r}); {_AGAIN}")
      file.seek(0)
      data = np.memmap(path, np.uint8, "r")
      return _load_zip(path, file, data) if head == _ZIP else _load_stream(path, file, data)
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error}); give a file of torch.save") from error


def _fail(path: pathlib.Path, message: str) -> NoReturn:
  raise UserError(f"{path} {message}")


class _Storage(NamedTuple):
  """`size` numbers of type `dtype`: `data`, or None in a first reading.

  A tuple, because a pickle may try to change the attributes of any object that it has made.
  """

  size: int
  dtype: np.dtype
  data: np.ndarray | None


class _Dict(dict):
  """In the place of OrderedDict; without its attributes, such as `_metadata` of a state dict."""

  def __setstate__(self, state: Any) -> None:
    del state


class _Refused(Exception):
  """The message is the end of a sentence that begins with the file's name."""


class _Unpickler(pickle.Unpickler):
  """Knows the names that tensors and state dicts need, and no other.

  Attributes:
    storage: `(key, dtype, size, view) -> _Storage`, called for each reference to a storage.
  """

  def __init__(self, file: BinaryIO, storage: Callable[[str, np.dtype, int, Any], _Storage]):
    # Python 2 wrote byte strings for text.
    super().__init__(file, encoding="utf-8")
    self._storage = storage

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) in _KNOWN:
      return _KNOWN[module, name]
    if module in ("torch", "torch.cuda") and name in _STORAGES:
      return name
    raise _Refused(f"names {module}.{name}, which is not allowed in a file of weights")

  def persistent_load(self, pid: Any) -> _Storage:
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
      raise _Refused("refers to something that is not a storage of numbers")
    _, kind, key, _, size, *view = pid
    if kind not in _STORAGES or not isinstance(key, str) or not _is_count(size):
      raise _Refused(f"has a storage of the unknown type {str(kind)[:60]!r}")
    return self._storage(key, np.dtype(_STORAGES[kind]), size, view[0] if view else None)


def _is_count(value: Any) -> bool:
  return type(value) is int and value >= 0


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *unused: Any) -> Any:
  """`torch._utils._rebuild_tensor_v2`: a strided view of a storage."""
  del unused  # requires_grad and hooks
  numbers = [offset, *shape, *strides]
  if (
    not isinstance(storage, _Storage)
    or len(shape) != len(strides)
    or not all(_is_count(number) for number in numbers)
  ):
    raise _Refused("has a tensor with a shape, strides or an offset that cannot be")
  last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
  if math.prod(shape) and last >= storage.size:
    raise _Refused(
      f"has a tensor of shape {tuple(shape)}, strides {tuple(strides)} and offset {offset}, which "
      f"reaches outside its storage of {storage.size} numbers"
    )
  if storage.data is None:
    return None
  if not math.prod(shape):
    return np.empty(shape, storage.dtype)
  steps = [stride * storage.dtype.itemsize for stride in strides]
  return np.lib.stride_tricks.as_strided(storage.data[offset:], shape, steps, writeable=False)


def _first(value: Any, *unused: Any) -> Any:
  """`torch._utils._rebuild_parameter`: the tensor."""
  del unused  # requires_grad and hooks
  return value


# What the names in a pickle stand for. Storage types stand for themselves, see `find_class`: no
# object from here or from a pickle may have a state that the pickle can change.
_KNOWN = {
  ("collections", "OrderedDict"): _Dict,
  ("torch", "Size"): tuple,
  ("torch._utils", "_rebuild_tensor"): _rebuild,
  ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
  ("torch._utils", "_rebuild_parameter"): _first,
}


def _unpickle(
  path: pathlib.Path, file: BinaryIO, storage: Callable[[str, np.dtype, int, Any], _Storage]
) -> Any:
  try:
    return _Unpickler(file, storage).load()
  except _Refused as error:
    raise UserError(f"{path} {error}; nothing was executed: {_HARMLESS}") from None
  except UserError:
    raise
  except Exception as error:
    # A pickle is a program of stack operations: a damaged one fails in many ways.
    cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    raise UserError(f"{path} is damaged or no file of torch.save ({cause}); {_AGAIN}") from error


def _view(data: np.ndarray, start: int, dtype: np.dtype, size: int) -> np.ndarray | None:
  """`size` numbers from byte `start` of the file; None if it ends before."""
  end = start + size * dtype.itemsize
  if start < 0 or end > len(data):
    return None
  return np.asarray(data[start:end]).view(dtype)


def _load_zip(path: pathlib.Path, file: BinaryIO, data: np.ndarray) -> Any:
  try:
    with zipfile.ZipFile(file) as archive:
      entries = {entry.filename: entry for entry in archive.infolist()}
  except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
    raise UserError(f"{path} is a truncated or damaged archive ({error}); {_AGAIN}") from error
  pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
  if len(pickles) != 1:
    _fail(path, f"is a zip archive, but not one of torch.save (no data.pkl); {_AGAIN}")
  root = pickles[0].removesuffix("data.pkl")
  if f"{root}constants.pkl" in entries:
    _fail(path, f"is a TorchScript program, not only weights; {_HARMLESS}")

  def content(name: str) -> tuple[int, int]:
    """First byte and length of an entry."""
    entry = entries[name]
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
      _fail(path, f"is compressed or encrypted, which torch.save never does; {_AGAIN}")
    # The local header repeats the name, and has another extra field than the directory.
    header = data[entry.header_offset : entry.header_offset + 30].tobytes()
    if len(header) < 30 or not header.startswith(_ZIP):
      _fail(path, f"is a damaged archive (entry {name}); {_AGAIN}")
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + entry.file_size > len(data):
      _fail(path, f"is a damaged archive (entry {name} ends beyond the file); {_AGAIN}")
    return start, entry.file_size

  def read(name: str) -> bytes:
    start, length = content(name)
    return data[start : start + length].tobytes()

  order = f"{root}byteorder"
  if order in entries and read(order) != b"little":
    _fail(path, "was written on a big-endian machine, which is not supported; convert it there")

  def storage(key: str, dtype: np.dtype, size: int, view: Any) -> _Storage:
    if view is not None or f"{root}data/{key}" not in entries:
      raise _Refused(f"refers to the storage {key!r}, which it has not")
    start, length = content(f"{root}data/{key}")
    if length < size * dtype.itemsize:
      raise _Refused(f"has {length} bytes in storage {key!r}, expected {size} numbers of {dtype}")
    if (numbers := _view(data, start, dtype, size)) is None:
      raise _Refused(f"has the storage {key!r} in an impossible place")
    return _Storage(size, dtype, numbers)

  return _unpickle(path, io.BytesIO(read(f"{root}data.pkl")), storage)


def _load_stream(path: pathlib.Path, file: BinaryIO, data: np.ndarray) -> Any:
  def refuse(key: str, dtype: np.dtype, size: int, view: Any) -> NoReturn:
    raise _Refused(f"refers to the storage {key!r} too early")

  magic, protocol, system = (_unpickle(path, file, refuse) for _ in range(3))
  if magic != _MAGIC or protocol != _PROTOCOL:
    _fail(path, f"is a pickle, but not one of torch.save; {_HARMLESS}")
  if not isinstance(system, dict) or not system.get("little_endian", True):
    _fail(path, "was written on a big-endian machine, which is not supported; convert it there")

  # The storages come after the tensors that view them: read once for their types, then again.
  types: dict[str, tuple[np.dtype, int]] = {}

  def note(key: str, dtype: np.dtype, size: int, view: Any) -> _Storage:
    if types.setdefault(key, (dtype, size)) != (dtype, size):
      raise _Refused(f"refers to the storage {key!r} in two ways")
    return _part(_Storage(size, dtype, None), view)

  begin = file.tell()
  _unpickle(path, file, note)
  keys = _unpickle(path, file, refuse)
  position = file.tell()
  if not isinstance(keys, list) or not all(type(key) is str for key in keys):
    _fail(path, f"is damaged: it has no list of its storages; {_AGAIN}")
  if sorted(keys) != sorted(types):
    _fail(path, f"is damaged: its list of storages is not that of its tensors; {_AGAIN}")
  storages = {}
  for key in keys:
    dtype, size = types[key]
    length = _view(data, position, np.dtype("<i8"), 1)
    numbers = _view(data, position + 8, dtype, size)
    if length is None or numbers is None:
      _fail(path, f"is truncated: the {size} numbers of storage {key!r} are not there; {_AGAIN}")
    if length[0] != size:
      _fail(path, f"is damaged: {length[0]} numbers in storage {key!r}, expected {size}; {_AGAIN}")
    storages[key] = _Storage(size, dtype, numbers)
    position += 8 + numbers.nbytes

  file.seek(begin)
  return _unpickle(path, file, lambda key, dtype, size, view: _part(storages[key], view))


def _part(storage: _Storage, view: Any) -> _Storage:
  """The part of a storage that a legacy reference names: `(key, offset, size)`, or all of it."""
  if view is None:
    return storage
  if not isinstance(view, tuple) or len(view) != 3 or not all(map(_is_count, view[1:])):
    raise _Refused("has a view of a storage that cannot be")
  _, offset, size = view
  if offset + size > storage.size:
    raise _Refused(f"has a view that reaches outside its storage of {storage.size} numbers")
  data = None if storage.data is None else storage.data[offset : offset + size]
  return _Storage(size, storage.dtype, data)
