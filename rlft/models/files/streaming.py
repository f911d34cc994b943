"""Parameters from files to where they belong, one at a time.

Nothing is held but the result and the one array that is being read: the peak of the host's memory
is what the parameters placed on it take, and an array.
"""

from collections.abc import Callable, Mapping
import hashlib
from typing import Any

from flax import traverse_util
import jax
from jax.experimental import multihost_utils
import numpy as np

from rlft.models.files import arrays, torch_layout
from rlft.models.shapes import Module, Params, param_shapes

# (path of a parameter, its shape) -> where it belongs.
Place = Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding]


class Fingerprint:
  """SHA-256 of names, shapes, types and bits of a parameter tree, one parameter at a time."""

  def __init__(self):
    self._digest = hashlib.sha256()

  def add(self, path: tuple[str, ...], array: np.ndarray) -> None:
    """Adds a parameter; in the order of the sorted paths."""
    self._digest.update(f"{'/'.join(path)} {array.dtype} {array.shape};".encode())
    self._digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))

  def bytes(self) -> bytes:
    """The 32 bytes of the digest."""
    return self._digest.digest()


def read(
  modules: Mapping[str, Module],
  states: Mapping[str, Mapping[str, np.ndarray]],
  *,
  what: Mapping[str, str],
  place: Place | None = None,
  identify: bool = False,
) -> tuple[Params, str]:
  """Reads the parameters of several modules, in float32.

  Args:
    modules: by name, the first part of each path.
    states: PyTorch's names and layouts for each of them.
    what: the file of each, for messages.
    place: where each parameter belongs; None leaves all on the host, as numpy arrays. Of what is
      sharded, only the shards of this process's devices are read.
    identify: whether to compute the fingerprint. For this, process 0 reads everything, and all
      processes have to call this function.

  Returns:
    the parameters `{name: tree}` and the fingerprint, or '' without `identify`.

  Raises:
    UserError: a parameter is missing, left over, or has another shape or no floating-point type.
  """
  leaves = {}
  for name, module in modules.items():
    shapes = traverse_util.flatten_dict(param_shapes(module))
    names = torch_layout.match(shapes, states[name], what=what[name])
    leaves |= {(name, *path): (names[path], shapes[path].shape) for path in shapes}

  fingerprint = Fingerprint() if identify and jax.process_index() == 0 else None
  params = {}
  for path in sorted(leaves):
    name, shape = leaves[path]
    leaf = _Leaf(states[path[0]], path, name, shape, what[path[0]])
    if fingerprint is not None:
      fingerprint.add(path, leaf[...])
    if place is None:
      params[path] = leaf[...]
    else:
      # Each is waited for: the copies on the host would otherwise pile up.
      params[path] = jax.make_array_from_callback(
        shape, place(path, shape), leaf.__getitem__
      ).block_until_ready()
  digest = fingerprint.bytes() if fingerprint else bytes(32)
  if identify and jax.process_count() > 1:
    digest = multihost_utils.broadcast_one_to_all(np.frombuffer(digest, np.uint8)).tobytes()
  return traverse_util.unflatten_dict(params), digest.hex() if identify else ""


class _Leaf:
  """A parameter in a file; `leaf[index]` is a part of it, `leaf[...]` all; each is read once."""

  def __init__(
    self,
    state: Mapping[str, np.ndarray],
    path: tuple[str, ...],
    name: str,
    shape: tuple[int, ...],
    what: str,
  ):
    torch_layout.check_shape(path, arrays.shape(state, name), shape, name=name, what=what)
    self._state, self._path, self._name, self._shape, self._what = state, path, name, shape, what
    self._parts: dict[Any, np.ndarray] = {}

  def __getitem__(self, index: Any) -> np.ndarray:
    whole = tuple((0, size, 1) for size in self._shape)
    if index is ...:
      index = tuple(slice(None) for _ in self._shape)
    key = tuple(part.indices(size) for part, size in zip(index, self._shape, strict=True))
    if key not in self._parts:
      self._parts[key] = self._parts[whole][index] if whole in self._parts else self._read(key)
    return self._parts[key]

  def _read(self, key: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    axes = torch_layout.torch_axes(self._path, len(key))
    part = arrays.read_part(self._state, self._name, tuple(slice(*key[axis]) for axis in axes))
    return torch_layout.convert(self._path, part, name=self._name, what=self._what)
