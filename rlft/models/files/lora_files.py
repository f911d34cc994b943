"""The formats in which LoRA adapters are exchanged, as safetensors files.

    peft   unet.down_blocks.0...to_q.lora_A.weight, .lora_B.weight     diffusers, PEFT
    kohya  lora_unet_down_blocks_0_..._to_q.lora_down.weight, .lora_up.weight, .alpha
           Kohya's sd-scripts and the interfaces that read its files; diffusers, too

Both name a module as diffusers does.
"""

from collections.abc import Iterator, Mapping
import os
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from rlft.models.files import torch_layout
from rlft.storage import files
from rlft.types import UserError

FORMATS = ("peft", "kohya")

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


def _modules(adapter: Adapter) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
  """PyTorch's name, a and b of each adapted module."""
  for path, factors in adapter.items():
    kernel = torch_layout.torch_names((*path.split("/"), "kernel"))[0]
    yield kernel.removesuffix(".weight"), np.asarray(factors["a"]), np.asarray(factors["b"])
