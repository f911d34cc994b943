"""A run's result in the formats of diffusers: a model directory, and the LoRA adapter alone."""

from collections.abc import Mapping
import os
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from rlft import files, finetuned
from rlft.models import pretrained, torch_layout
from rlft.types import UserError

_COMPONENT = "unet."


def export(
  workdir: str | os.PathLike[str],
  *,
  output: str | os.PathLike[str] | None = None,
  lora_output: str | os.PathLike[str] | None = None,
  dtype: Any = np.float32,
  ema: bool = True,
) -> None:
  """Writes what a run has trained so far.

  Args:
    workdir: of the run; its newest checkpoint is taken.
    output: directory for the whole model (a LoRA is merged into it), replaced if it holds a model.
    lora_output: safetensors file for the adapter, for `load_lora_weights` on the base model.
    dtype: of the stored weights of both, float32 or float16.
    ema: the averaged weights, where the run has them.

  Raises:
    UserError: the run cannot be read, has no LoRA, or nothing can be written there.
  """
  found = finetuned.load(os.fspath(workdir), ema=ema)
  if lora_output and found.lora is None:
    raise UserError(
      f"{workdir} has no LoRA to write to {lora_output}: only a run with --lora_rank has one, give"
      " --output for the whole model"
    )
  if lora_output:
    save_lora(lora_output, found.lora, scale=found.lora_scale, dtype=dtype)
  if output:
    pretrained.save(output, found.model, dtype=dtype)


def lora_state(
  adapter: Mapping[str, Mapping[str, jax.Array]], *, scale: float, dtype: Any = np.float32
) -> dict[str, np.ndarray]:
  """An adapter under the names of PEFT: `unet.<module>.lora_A.weight` and `...lora_B.weight`.

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
  for path, factors in adapter.items():
    kernel = torch_layout.torch_names((*path.split("/"), "kernel"))[0]
    module = _COMPONENT + kernel.removesuffix(".weight")
    a, b = np.asarray(factors["a"]), scale * np.asarray(factors["b"])
    state[f"{module}.lora_A.weight"] = np.ascontiguousarray(a.T.astype(dtype))
    state[f"{module}.lora_B.weight"] = np.ascontiguousarray(b.T.astype(dtype))
  return state


def save_lora(
  path: str | os.PathLike[str],
  adapter: Mapping[str, Mapping[str, jax.Array]],
  *,
  scale: float,
  dtype: Any = np.float32,
) -> None:
  """Writes `lora_state` as a safetensors file, whole or not at all.

  Raises:
    UserError: the file has another suffix, by which diffusers would not find it, or cannot be
      written.
  """
  if not os.fspath(path).endswith(".safetensors"):
    raise UserError(f"{path} is no name for a LoRA file: end it with .safetensors")
  state = lora_state(adapter, scale=scale, dtype=dtype)
  # "pt" says that the arrays have PyTorch's layout; some readers refuse files without it.
  files.write_atomic(path, safetensors.numpy.save(state, metadata={"format": "pt"}))
