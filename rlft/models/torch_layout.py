"""Parameter trees to and from the names and array layouts of PyTorch's classes.

A module's parameter tree is made of the published names, split at the dots, whatever the module;
only leaves are called otherwise (`_LEAVES`), and kernels are transposed. The modules of Stable
Diffusion, whose trees are those of diffusers' Flax classes, differ in a few more names.

The shapes that a module expects decide what a state dict must hold: each array of the tree is
looked up under its PyTorch name, and whatever is missing, left over or of another shape is an
error.
"""

from collections.abc import Mapping
import re
from typing import Any, Protocol

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from rlft.types import UserError

Params = Mapping[str, Any]


class Module(Protocol):
  """A Flax module that says what it takes."""

  def init(self, rngs: Any, *args: Any) -> Mapping[str, Any]: ...

  def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]: ...


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


def param_shapes(module: Module) -> Params:
  """The parameter tree of a module, as `jax.ShapeDtypeStruct`s; computes nothing."""
  return jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())["params"]


def torch_names(path: tuple[str, ...]) -> tuple[str, ...]:
  """PyTorch's names of the parameter at `path`: today's first, then an older one if any."""
  leaf = _LEAVES.get(path[-1], path[-1])
  parent = ".".join(_LIST_ITEM.sub(r"\1.\2", part) for part in path[:-1])
  today = _VAE_ATTENTION.sub(lambda match: _VAE_NAMES[match[0]], parent)
  return tuple(f"{p}.{leaf}" if p else leaf for p in dict.fromkeys((today, parent)))


def to_torch_layout(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
  """Kernels `[h, w, I, O]` -> `[O, I, h, w]` and `[I, O]` -> `[O, I]`; others stay."""
  if path[-1] != "kernel":
    return array
  return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def from_torch_layout(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
  """The inverse of `to_torch_layout`."""
  if path[-1] != "kernel":
    return array
  return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


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
    ignore: regular expression, searched for in each name of `state` (`re.search`); what matches
      is dropped. Buffers called `position_ids` always are.

  Raises:
    UserError: a parameter is missing, left over, or has another shape or no floating-point type.
  """
  dropped = [_NOT_PARAMETERS, *([re.compile(ignore)] if ignore else [])]
  remaining = {name for name in state if not any(regex.search(name) for regex in dropped)}
  params = {}
  for path, expected in traverse_util.flatten_dict(param_shapes(module)).items():
    names = torch_names(path)
    shape = to_torch_layout(path, np.broadcast_to(np.float32(0), expected.shape)).shape
    name = next((n for n in names if n in remaining), None)
    if name is None:
      raise UserError(
        f"{what}: no {names[0]} (expected shape {shape}); the file is of another model than "
        "config.json, or incomplete: download or export it again"
      )
    array = np.asarray(state[name])
    if array.shape != shape:
      raise UserError(
        f"{what}: {name} has shape {array.shape}, expected {shape}; the file is of another "
        "model than config.json: use the weights and the config of the same model"
      )
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise UserError(
        f"{what}: {name} has type {array.dtype}, expected float32, float16 or bfloat16; quantised "
        "weights are not supported: use the full or half precision file of the same model"
      )
    remaining.remove(name)
    # Not `ascontiguousarray`, which makes scalars 1-D.
    params[path] = np.asarray(from_torch_layout(path, array.astype(np.float32)), order="C")
  if remaining:
    raise UserError(
      f"{what}: {len(remaining)} left-over arrays, the first is {min(remaining)}; the file is of "
      "another model than config.json: use the weights and the config of the same model"
    )
  return traverse_util.unflatten_dict(params)


def to_torch(params: Params, dtype: Any = np.float32) -> dict[str, np.ndarray]:
  """Converts a parameter tree to a PyTorch state dict of numpy arrays with the given dtype."""
  return {
    torch_names(path)[0]: np.array(to_torch_layout(path, np.asarray(array)), dtype, order="C")
    for path, array in traverse_util.flatten_dict(params).items()
  }
