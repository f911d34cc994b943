"""The adapter of a run under the names of PEFT; tests/test_launch.py has diffusers load it."""

import models_cases
import numpy as np
import pytest
import safetensors.numpy

from rlft import export, lora
from rlft.models import torch_layout
from rlft.types import UserError

SCALE = 0.5


@pytest.fixture(scope="module")
def base():
  return models_cases.tiny_pipeline()


@pytest.fixture(scope="module")
def adapter(base):
  shapes = lora.targets(base.params["unet"])
  rng = np.random.RandomState(0)
  return {
    path: {
      "a": rng.standard_normal((fan_in, 2)).astype(np.float32),
      "b": 0.3 * rng.standard_normal((2, fan_out)).astype(np.float32),
    }
    for path, (fan_in, fan_out) in shapes.items()
  }


def test_names_and_layout_of_an_adapter():
  path = "down_blocks_1/attentions_0/transformer_blocks_0/attn2/to_out_0"
  a, b = np.array([[1.0], [2.0], [3.0]], np.float32), np.array([[4.0, 6.0]], np.float32)
  state = export.lora_state({path: {"a": a, "b": b}}, scale=0.5, dtype=np.float16)
  name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"
  assert set(state) == {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}
  np.testing.assert_array_equal(state[f"{name}.lora_A.weight"], [[1.0, 2.0, 3.0]])
  # B times the scale: 0.5 * 4, 0.5 * 6.
  np.testing.assert_array_equal(state[f"{name}.lora_B.weight"], [[2.0], [3.0]])
  assert {array.dtype for array in state.values()} == {np.dtype(np.float16)}


def test_adapter_file_holds_what_is_merged(base, adapter, tmp_path):
  path = tmp_path / "new" / "lora.safetensors"
  export.save_lora(path, adapter, scale=SCALE)
  state = safetensors.numpy.load_file(path)
  before = torch_layout.to_torch(base.params["unet"])
  after = torch_layout.to_torch(lora.merge(base.params["unet"], adapter, SCALE))
  changed = {name for name in after if not np.array_equal(before[name], after[name])}
  assert len(changed) == len(adapter)
  for name in changed:
    module = "unet." + name.removesuffix(".weight")
    update = state.pop(f"{module}.lora_B.weight") @ state.pop(f"{module}.lora_A.weight")
    np.testing.assert_allclose(before[name] + update, after[name], atol=1e-5)
  assert not state


def test_a_lora_file_needs_its_suffix(adapter, tmp_path):
  with pytest.raises(UserError, match="end it with .safetensors"):
    export.save_lora(tmp_path / "lora.bin", adapter, scale=1.0)
  assert not list(tmp_path.iterdir())
