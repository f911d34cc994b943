"""Parameter trees to and from the names and array layouts of PyTorch's classes.

The shapes that the Flax modules expect decide what a state dict must hold: each array of the tree
is looked up under its PyTorch name, and whatever is missing, left over or of another shape is an
error.
"""

from collections.abc import Mapping
import re
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from rlft.models import unet, vae
from rlft.types import UserError

Params = Mapping[str, Any]

# Buffers, not parameters, that older transformers wrote.
_NOT_PARAMETERS = re.compile(r"\.position_ids$")
_LIST_ITEM = re.compile(
  r"^(down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers"
  r"|net|to_out)_(\d+)$"
)
# The VAE's attention: the Flax class kept the names that PyTorch's had before diffusers 0.18.
_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def param_shapes(module: Any) -> Params:
  """The parameter tree of one of the three modules, as `jax.ShapeDtypeStruct`s."""
  if isinstance(module, unet.UNet2DCondition):
    size = 2 ** len(module.config.block_out_channels)
    inputs = (
      jnp.zeros((1, size, size, module.config.in_channels)),
      jnp.zeros((1,), jnp.int32),
      jnp.zeros((1, 1, module.config.cross_attention_dim)),
    )
  elif isinstance(module, vae.AutoencoderKL):
    size = 2 * module.config.downscale
    inputs = (jnp.zeros((1, size, size, module.config.in_channels)),)
  else:
    inputs = (jnp.zeros((1, 1), jnp.int32),)
  return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def torch_names(path: tuple[str, ...]) -> tuple[str, ...]:
  """PyTorch's names of the parameter at `path`: today's first, then the one before 0.18."""
  parts = [_LIST_ITEM.sub(r"\1.\2", part) for part in path[:-1]]
  leaf = _LEAVES[path[-1]]
  old = ".".join([*parts, leaf])
  if parts[-1] in _VAE_ATTENTION:
    return ".".join([*parts[:-1], _VAE_ATTENTION[parts[-1]], leaf]), old
  return (old,)


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


def from_torch(module: Any, state: Mapping[str, np.ndarray], *, what: str = "weights") -> Params:
  """Converts a PyTorch state dict (numpy arrays) to the parameter tree of `module`, in float32.

  Args:
    module: `UNet2DCondition`, `AutoencoderKL` or `CLIPTextEncoder`.
    state: PyTorch's names and layouts; read once for each name.
    what: the file, for messages.

  Raises:
    UserError: a parameter is missing, left over, or has another shape.
  """
  remaining = {name for name in state if not _NOT_PARAMETERS.search(name)}
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
    remaining.remove(name)
    params[path] = np.ascontiguousarray(from_torch_layout(path, array.astype(np.float32)))
  if remaining:
    raise UserError(
      f"{what}: {len(remaining)} left-over arrays, the first is {min(remaining)}; the file is of "
      "another model than config.json: use the weights and the config of the same model"
    )
  return traverse_util.unflatten_dict(params)


def to_torch(params: Params, dtype: Any = np.float32) -> dict[str, np.ndarray]:
  """Converts a parameter tree to a PyTorch state dict of numpy arrays with the given dtype."""
  return {
    torch_names(path)[0]: np.ascontiguousarray(
      to_torch_layout(path, np.asarray(array)).astype(dtype)
    )
    for path, array in traverse_util.flatten_dict(params).items()
  }
