"""The formats in which LoRA adapters are exchanged, as safetensors files.

    peft   unet.down_blocks.0...to_q.lora_A.weight, .lora_B.weight     diffusers, PEFT
    kohya  lora_unet_down_blocks_0_..._to_q.lora_down.weight, .lora_up.weight, .alpha
           Kohya's sd-scripts and the interfaces that read its files; diffusers, too

Both name a module as diffusers does. What is read may also be as diffusers' scripts write it
(unet.down_blocks.0...to_q.lora.down.weight, .lora.up.weight), and without the prefix 'unet.'.
"""

from collections.abc import Iterator, Mapping
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from rlft.models.files import arrays, torch_layout
from rlft.storage import files
from rlft.types import UserError

FORMATS = ("peft", "kohya")
# Ends of arrays' names: A is down, B is up.
_ENDS = {
  ".lora_A.weight": "a",
  ".lora.down.weight": "a",
  ".lora_down.weight": "a",
  ".lora_B.weight": "b",
  ".lora.up.weight": "b",
  ".lora_up.weight": "b",
  ".alpha": "alpha",
}
_METADATA = "lora_adapter_metadata"  # in the header: PEFT's configuration, as diffusers stores it

Adapter = Mapping[str, Mapping[str, jax.Array]]


def peft_state(adapter: Adapter, *, scale: float, dtype: Any = np.float32) -> dict[str, np.ndarray]:
  """An adapter under the names of PEFT.

  The file says nothing of alpha, which readers then take to be the rank, a scale of 1; hence the
  scale is multiplied into B.

  Args:
    adapter: `{module path: {'a': [in, r], 'b': [r, out]}}`.
    scale: alpha / rank.
    dtype: of the arrays.

  Returns:
    A `[r, in]` and B `[out, r]` for each module.
  """
  state = {}
  for module, a, b in _modules(adapter):
    state[f"unet.{module}.lora_A.weight"] = np.ascontiguousarray(a.T.astype(dtype))
    state[f"unet.{module}.lora_B.weight"] = np.ascontiguousarray((scale * b).T.astype(dtype))
  return state


def kohya_state(
  adapter: Adapter, *, scale: float, dtype: Any = np.float32
) -> dict[str, np.ndarray]:
  """An adapter under the names of Kohya's scripts; arguments as in `peft_state`.

  Returns:
    down `[r, in]`, up `[out, r]` and alpha (a float32 scalar, scale * r) for each module.
  """
  state = {}
  for module, a, b in _modules(adapter):
    name = f"lora_unet_{module.replace('.', '_')}"
    state[f"{name}.lora_down.weight"] = np.ascontiguousarray(a.T.astype(dtype))
    state[f"{name}.lora_up.weight"] = np.ascontiguousarray(b.T.astype(dtype))
    state[f"{name}.alpha"] = np.array(scale * a.shape[1], np.float32)
  return state


def save(
  path: str | os.PathLike[str],
  adapter: Adapter,
  *,
  scale: float,
  format: str = "peft",
  dtype: Any = np.float32,
) -> None:
  """Writes an adapter as a safetensors file, whole or not at all.

  Args:
    path: the file.
    adapter, scale, dtype: see `peft_state`.
    format: one of `FORMATS`.

  Raises:
    UserError: the file has another suffix, by which readers would not find it, or cannot be
      written.
  """
  if not os.fspath(path).endswith(".safetensors"):
    raise UserError(f"{path} is no name for a LoRA file: end it with .safetensors")
  make_state = {"peft": peft_state, "kohya": kohya_state}[format]
  state = make_state(adapter, scale=scale, dtype=dtype)
  # "pt" says that the arrays have PyTorch's layout; some readers refuse files without it.
  files.write_atomic(path, safetensors.numpy.save(state, metadata={"format": "pt"}))


def rank(path: str | os.PathLike[str]) -> int:
  """The rank of the adapter in a file, of which the header alone is read.

  Raises:
    UserError: it cannot be read, holds no adapter, or one of several ranks.
  """
  state = _open(path)
  shapes = {name: arrays.shape(state, name) for name in state if _split(name)[1] == "a"}
  for name, shape in shapes.items():
    if len(shape) < 2 or not shape[0]:
      raise UserError(f"{path}: {name} has the shape {list(shape)}, of no LoRA: get the file again")
  found = {shape[0] for shape in shapes.values()}
  if not found:
    raise UserError(f"{path} has no LoRA: give a safetensors file of PEFT, diffusers or Kohya")
  if len(found) > 1:
    raise UserError(
      f"{path} has LoRAs of the ranks {', '.join(map(str, sorted(found)))}: give one of a single"
      " rank"
    )
  return found.pop()


def load(
  path: str | os.PathLike[str], targets: Mapping[str, tuple[int, int]]
) -> dict[str, dict[str, np.ndarray]]:
  """Reads an adapter from a safetensors file.

  Args:
    path: the file.
    targets: modules that may be adapted, `{module path: (in, out)}`.

  Returns:
    `{module path: {'a': [in, r], 'b': [r, out]}}` float32 for the modules in the file; with a scale
    of 1, as what the file says of its scale is multiplied into b.

  Raises:
    UserError: the file cannot be read, or holds something else, or an adapter of another model or
      of other modules.
  """
  state = _open(path)
  modules: dict[str, str] = {}
  for target in targets:
    module = _torch_name(target)
    for name in (module, f"unet.{module}", f"lora_unet_{module.replace('.', '_')}"):
      modules[name] = target
  names: dict[str, dict[str, str]] = {}
  strange = []
  for name in state:
    module, factor = _split(name)
    if module in modules and factor:
      names.setdefault(modules[module], {})[factor] = name
    else:
      strange.append(name)
  if strange:
    more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
    raise UserError(
      f"{path}: {strange[0]}{more}: nothing but the attention projections of the UNet can be"
      " adapted (to_q, to_k, to_v and to_out.0, under diffusers' names): give an adapter of these"
      " alone, or merge this one into the model and start from that"
    )
  stored = _scale(path, state)
  adapter = {}
  for target, found in names.items():
    if not {"a", "b"} <= found.keys():
      raise UserError(f"{path}: {next(iter(found.values()))} is half of a LoRA: get it again")
    a, b = (np.asarray(state[found[factor]], np.float32).T for factor in ("a", "b"))
    fan_in, fan_out = targets[target]
    alpha = state[found["alpha"]] if "alpha" in found else None
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != len(b) or not len(b) or np.size(alpha) != 1:
      raise UserError(f"{path}: the LoRA of {_torch_name(target)} is no two matrices: get it again")
    if (len(a), b.shape[1]) != (fan_in, fan_out):
      raise UserError(
        f"{path}: the LoRA of {_torch_name(target)} leads from {len(a)} features to"
        f" {b.shape[1]}, the model's module from {fan_in} to {fan_out}: give an adapter of this"
        " model"
      )
    scale = stored if alpha is None else float(alpha.reshape(())) / len(b)
    with np.errstate(over="ignore"):
      b = np.float32(scale) * b
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
      raise UserError(f"{path}: the LoRA of {_torch_name(target)} is not finite: get it again")
    adapter[target] = {"a": a, "b": b}
  return adapter


def _open(path: str | os.PathLike[str]) -> Mapping[str, np.ndarray]:
  if not os.path.isfile(path):
    what = "is no file" if os.path.exists(path) else "does not exist"
    raise UserError(f"{path} {what}: give a safetensors file with a LoRA")
  if not os.fspath(path).endswith(".safetensors"):
    raise UserError(f"{path} is no safetensors file: give one with a LoRA")
  return arrays.read_files([pathlib.Path(path)])


def _scale(path: str | os.PathLike[str], state: Mapping[str, np.ndarray]) -> float:
  """alpha / rank of all modules, as the file's header says it; 1 if it says nothing."""
  text = arrays.metadata(state).get(_METADATA, "{}")
  try:
    said = {key.removeprefix("unet."): value for key, value in json.loads(text).items()}
    scale = float(said["lora_alpha"] / said["r"]) if said else 1.0
  except (
    ArithmeticError,
    AttributeError,
    KeyError,
    RecursionError,
    TypeError,
    ValueError,
  ) as error:
    raise UserError(
      f"{path}: {_METADATA} in its header cannot be read: get the file again"
    ) from error
  for key in ("alpha_pattern", "rank_pattern", "use_dora", "use_rslora"):
    if said.get(key):
      raise UserError(f"{path}: {key}={said[key]} is not supported: give an adapter without it")
  return scale


def _split(name: str) -> tuple[str, str]:
  """Module and factor ('a', 'b' or 'alpha') of an array's name; the factor is '' if it is none."""
  for end, factor in _ENDS.items():
    if name.endswith(end):
      return name.removesuffix(end), factor
  return name, ""


def _torch_name(path: str) -> str:
  """PyTorch's name of the module at 'a/b/c'."""
  return torch_layout.torch_names((*path.split("/"), "kernel"))[0].removesuffix(".weight")


def _modules(adapter: Adapter) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
  """PyTorch's name, a and b of each adapted module."""
  for path, factors in adapter.items():
    yield _torch_name(path), np.asarray(factors["a"]), np.asarray(factors["b"])
