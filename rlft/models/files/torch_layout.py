"""Parameter trees to and from the names and array layouts of PyTorch's classes.

A module's parameter tree is made of the published names, split at the dots, whatever the module;
only leaves are called otherwise (`_LEAVES`), and kernels are transposed. The modules of Stable
Diffusion, whose trees are those of diffusers' Flax classes, differ in a few more names.

The shapes that a module expects decide what a state dict must hold: each array of the tree is
looked up under its PyTorch name, and whatever is missing, left over or of another shape is an
error.
"""

from collections.abc import Iterable, Mapping
import re
from typing import Any

from flax import traverse_util
import jax.numpy as jnp
import numpy as np

from rlft.models.shapes import Module, Params, param_shapes
from rlft.types import UserError

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# Buffers, not parameters, that older transformers wrote.
_NOT_PARAMETERS = re.compile(r"\.position_ids$")

# Stable Diffusion: diffusers' Flax classes join the number of a list item with an underscore ...
_LIST_ITEM = re.compile(
  r"^(down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers"
  r"|net|to_out)_(\d+)$"
)
# ... and kept the names that the VAE's attention had in PyTorch before diffusers 0.18.
_VAE_ATTENTION = re.compile(r"(?<=mid_block\.attentions\.0\.)(query|key|value|proj_attn)$")
_VAE_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def torch_names(path: tuple[str, ...]) -> tuple[str, ...]:
  """PyTorch's names of the parameter at `path`: today's first, then an older one if any."""
  leaf = _LEAVES.get(path[-1], path[-1])
  parent = ".".join(_LIST_ITEM.sub(r"\1.\2", part) for part in path[:-1])
  today = _VAE_ATTENTION.sub(lambda match: _VAE_NAMES[match[0]], parent)
  return tuple(f"{p}.{leaf}" if p else leaf for p in dict.fromkeys((today, parent)))


def torch_axes(path: tuple[str, ...], ndim: int) -> tuple[int, ...]:
  """The order of the axes in PyTorch of the parameter at `path`, which has `ndim`.

  Kernels `[h, w, I, O]` -> `[O, I, h, w]` and `[I, O]` -> `[O, I]`; others stay.
  """
  if path[-1] != "kernel":
    return tuple(range(ndim))
  return (3, 2, 0, 1) if ndim == 4 else (1, 0)


def to_torch_layout(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
  """The parameter at `path` as a view with PyTorch's order of axes."""
  return array.transpose(torch_axes(path, array.ndim))


def from_torch_layout(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
  """The inverse of `to_torch_layout`."""
  return array.transpose(np.argsort(torch_axes(path, array.ndim)))


def match(
  shapes: Mapping[tuple[str, ...], Any],
  names: Iterable[str],
  *,
  what: str = "weights",
  ignore: str | None = None,
) -> dict[tuple[str, ...], str]:
  """Which of PyTorch's arrays each parameter is.

  Args:
    shapes: `{path: what has the parameter's shape}`, of the whole tree.
    names: of the arrays in the state dict.
    what: the file, for messages.
    ignore: regular expression, searched for in each name (`re.search`); what matches is dropped.
      Buffers called `position_ids` always are.

  Raises:
    UserError: a parameter is missing, or an array left over.
  """
  dropped = [_NOT_PARAMETERS, *([re.compile(ignore)] if ignore else [])]
  remaining = {name for name in names if not any(regex.search(name) for regex in dropped)}
  found = {}
  for path, expected in shapes.items():
    candidates = torch_names(path)
    found[path] = next((name for name in candidates if name in remaining), None)
    if found[path] is None:
      raise UserError(
        f"{what}: no {candidates[0]} (expected shape {_torch_shape(path, expected.shape)}); the "
        "file is of another model than config.json, or incomplete: download or export it again"
      )
    remaining.remove(found[path])
  if remaining:
    raise UserError(
      f"{what}: {len(remaining)} left-over arrays, the first is {min(remaining)}; the file is of "
      "another model than config.json: use the weights and the config of the same model"
    )
  return found


def check_shape(
  path: tuple[str, ...],
  found: tuple[int, ...],
  expected: tuple[int, ...],
  *,
  name: str,
  what: str = "weights",
) -> None:
  """Raises `UserError` unless PyTorch's array has the shape of the parameter at `path`.

  Args:
    path: of the parameter.
    found: shape of the array, with PyTorch's order of axes.
    expected: shape of the parameter.
    name: of the array, for messages.
    what: the file, for messages.
  """
  if found != _torch_shape(path, expected):
    raise UserError(
      f"{what}: {name} has shape {found}, expected {_torch_shape(path, expected)}; the file is of "
      "another model than config.json: use the weights and the config of the same model"
    )


def convert(
  path: tuple[str, ...], array: np.ndarray, *, name: str, what: str = "weights"
) -> np.ndarray:
  """One of PyTorch's arrays (or a part of it) as the parameter at `path`, contiguous, in float32.

  Raises:
    UserError: it has no floating-point type; `name` and `what` are for the message.
  """
  if not jnp.issubdtype(array.dtype, jnp.floating):
    raise UserError(
      f"{what}: {name} has type {array.dtype}, expected float32, float16 or bfloat16; quantised "
      "weights are not supported: use the full or half precision file of the same model"
    )
  # Not `ascontiguousarray`, which makes scalars 1-D.
  return np.asarray(from_torch_layout(path, array), np.float32, order="C")


def from_torch(
  module: Module,
  state: Mapping[str, np.ndarray],
  *,
  what: str = "weights",
  ignore: str | None = None,
) -> Params:
  """Converts a PyTorch state dict (numpy arrays) to the parameter tree of `module`, in float32.

  Args:
    module: the network.
    state: PyTorch's names and layouts; read once for each name.
    what: the file, for messages.
    ignore: see `match`.

  Raises:
    UserError: a parameter is missing, left over, or has another shape or no floating-point type.
  """
  shapes = traverse_util.flatten_dict(param_shapes(module))
  params = {}
  for path, name in match(shapes, state, what=what, ignore=ignore).items():
    array = np.asarray(state[name])
    check_shape(path, array.shape, shapes[path].shape, name=name, what=what)
    params[path] = convert(path, array, name=name, what=what)
  return traverse_util.unflatten_dict(params)


def _torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(shape[axis] for axis in torch_axes(path, len(shape)))


def to_torch(params: Params, dtype: Any = np.float32) -> dict[str, np.ndarray]:
  """Converts a parameter tree to a PyTorch state dict of numpy arrays with the given dtype."""
  return {
    torch_names(path)[0]: np.array(to_torch_layout(path, np.asarray(array)), dtype, order="C")
    for path, array in traverse_util.flatten_dict(params).items()
  }
