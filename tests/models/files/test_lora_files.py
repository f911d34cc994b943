"""Adapters under the names of PEFT and of Kohya's scripts."""

import json

import models_cases
import numpy as np
import pytest
import safetensors.numpy

from rlft.models import lora
from rlft.models.files import lora_files, torch_layout
from rlft.types import UserError

PATH = "down_blocks_1/attentions_0/transformer_blocks_0/attn2/to_out_0"
# One module of rank 2, from 3 features to 1.
ADAPTER = {
  PATH: {
    "a": np.array([[1.0, -1.0], [2.0, 0.0], [3.0, 5.0]], np.float32),
    "b": np.array([[4.0], [6.0]], np.float32),
  }
}
SCALE = 0.5


@pytest.fixture(scope="module")
def base():
  return models_cases.tiny_pipeline().params["unet"]


@pytest.fixture(scope="module")
def adapter(base):
  rng = np.random.RandomState(0)
  return {
    path: {
      "a": rng.standard_normal((fan_in, 2)).astype(np.float32),
      "b": 0.3 * rng.standard_normal((2, fan_out)).astype(np.float32),
    }
    for path, (fan_in, fan_out) in lora.targets(base).items()
  }


def test_names_and_layout_of_peft():
  state = lora_files.peft_state(ADAPTER, scale=SCALE, dtype=np.float16)
  name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"
  assert set(state) == {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}
  np.testing.assert_array_equal(state[f"{name}.lora_A.weight"], [[1, 2, 3], [-1, 0, 5]])
  # B times the scale: 0.5 * 4, 0.5 * 6.
  np.testing.assert_array_equal(state[f"{name}.lora_B.weight"], [[2, 3]])
  assert {array.dtype for array in state.values()} == {np.dtype(np.float16)}


def test_names_and_layout_of_kohya():
  state = lora_files.kohya_state(ADAPTER, scale=SCALE, dtype=np.float16)
  name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0"
  assert set(state) == {f"{name}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")}
  np.testing.assert_array_equal(state[f"{name}.lora_down.weight"], [[1, 2, 3], [-1, 0, 5]])
  np.testing.assert_array_equal(state[f"{name}.lora_up.weight"], [[4, 6]])
  assert state[f"{name}.lora_up.weight"].dtype == np.float16
  # 0.5 times the rank 2.
  alpha = state[f"{name}.alpha"]
  assert alpha.shape == () and alpha == 1.0


def read_peft(state):
  """Reads as PEFT does: `{module: B A}`, alpha being the rank."""
  end = ".lora_A.weight"
  modules = [name.removesuffix(end) for name in state if name.endswith(end)]
  return {
    module.removeprefix("unet."): state[f"{module}.lora_B.weight"] @ state[f"{module}{end}"]
    for module in modules
  }


def read_kohya(state):
  """Reads as Kohya's scripts do: `{module: alpha / rank * up down}`."""
  end = ".lora_down.weight"
  updates = {}
  for name in (name.removesuffix(end) for name in state if name.endswith(end)):
    down, up = state[f"{name}{end}"], state[f"{name}.lora_up.weight"]
    updates[name.removeprefix("lora_unet_")] = state[f"{name}.alpha"] / len(down) * up @ down
  return updates


@pytest.mark.parametrize(("format", "read"), [("peft", read_peft), ("kohya", read_kohya)])
def test_a_file_holds_what_is_merged(base, adapter, tmp_path, format, read):
  path = tmp_path / "new" / "lora.safetensors"
  lora_files.save(path, adapter, scale=SCALE, format=format)
  updates = read(safetensors.numpy.load_file(path))
  before = torch_layout.to_torch(base)
  after = torch_layout.to_torch(lora.merge(base, adapter, SCALE))
  changed = {name for name in after if not np.array_equal(before[name], after[name])}
  assert len(changed) == len(adapter)
  for name in changed:
    module = name.removesuffix(".weight")
    update = updates.pop(module.replace(".", "_") if format == "kohya" else module)
    np.testing.assert_allclose(before[name] + update, after[name], atol=1e-5)
  assert not updates


def test_a_lora_file_needs_its_suffix(adapter, tmp_path):
  with pytest.raises(UserError, match="end it with .safetensors"):
    lora_files.save(tmp_path / "lora.bin", adapter, scale=1.0)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", lora_files.FORMATS)
def test_what_is_saved_is_loaded(base, adapter, tmp_path, format):
  path = tmp_path / "lora.safetensors"
  lora_files.save(path, adapter, scale=SCALE, format=format)
  assert lora_files.rank(path) == 2
  found = lora_files.load(path, lora.targets(base))
  assert found.keys() == adapter.keys()
  for name, factors in adapter.items():
    np.testing.assert_array_equal(found[name]["a"], factors["a"])
    np.testing.assert_allclose(found[name]["b"], SCALE * factors["b"], rtol=1e-6)


def diffusers_state(prefix="unet."):
  """An adapter of a single module, as diffusers' scripts name it."""
  name = f"{prefix}down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"
  down, up = ADAPTER[PATH]["a"].T.copy(), ADAPTER[PATH]["b"].T.copy()
  return {f"{name}.lora.down.weight": down, f"{name}.lora.up.weight": up}


@pytest.mark.parametrize(("prefix", "said"), [("unet.", "unet."), ("", ""), ("unet.", None)])
def test_what_diffusers_saves_is_loaded(tmp_path, prefix, said):
  header = {f"{said}r": 2, f"{said}lora_alpha": 8, f"{said}rank_pattern": {}}
  metadata = None if said is None else {"lora_adapter_metadata": json.dumps(header)}
  path = tmp_path / "lora.safetensors"
  safetensors.numpy.save_file(diffusers_state(prefix), path, metadata)
  assert lora_files.rank(path) == 2
  found = lora_files.load(path, {PATH: (3, 1), "others/to_q": (3, 3)})
  assert list(found) == [PATH]
  np.testing.assert_array_equal(found[PATH]["a"], ADAPTER[PATH]["a"])
  # alpha / rank = 8 / 2
  expected = ADAPTER[PATH]["b"] * (1 if said is None else 4)
  np.testing.assert_array_equal(found[PATH]["b"], expected)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"lora_te_text_model_layers_0_mlp_fc1.lora_down.weight": np.zeros((2, 3))}, "lora_te_text"),
    ({"unet.mid_block.resnets.0.conv1.lora_A.weight": np.zeros((2, 3))}, "mid_block.resnets"),
    ({"unet.x.lora_A.weight": np.zeros((2, 3)), "y": np.zeros(1)}, " and 1 more: nothing but"),
    ({next(iter(diffusers_state())): np.zeros((2, 4))}, "leads from 4 features to 1, .* 3 to 1"),
    ({next(reversed(diffusers_state())): None}, "is half of a LoRA"),
    ({next(iter(diffusers_state())): np.zeros(3)}, "is no two matrices"),
    ({name: x[:0] if len(x) == 2 else x[:, :0] for name, x in diffusers_state().items()}, "is no"),
  ],
)
def test_adapters_of_something_else(tmp_path, change, words):
  state = {name: x for name, x in (diffusers_state() | change).items() if x is not None}
  path = tmp_path / "lora.safetensors"
  safetensors.numpy.save_file(state, path)
  with pytest.raises(UserError, match=words) as error:
    lora_files.load(path, {PATH: (3, 1)})
  assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_what_is_no_adapter(tmp_path):
  path = tmp_path / "lora.safetensors"
  for function in (lora_files.rank, lambda path: lora_files.load(path, {})):
    with pytest.raises(UserError, match="does not exist: give a safetensors file with a LoRA"):
      function(path)
    with pytest.raises(UserError, match="is no safetensors file: give one with a LoRA"):
      function(__file__)
  safetensors.numpy.save_file({"x": np.zeros(1)}, path)
  with pytest.raises(UserError, match="has no LoRA"):
    lora_files.rank(path)
  safetensors.numpy.save_file(
    {f"{name}.lora_A.weight": np.zeros((rank, 3)) for name, rank in (("x", 2), ("y", 4))}, path
  )
  with pytest.raises(UserError, match="has LoRAs of the ranks 2, 4: give one of a single rank"):
    lora_files.rank(path)
  for shape in ((), (3,), (0, 3)):
    safetensors.numpy.save_file({"x.lora_A.weight": np.zeros(shape)}, path)
    with pytest.raises(UserError, match="lora_A.weight has the shape .* of no LoRA: get the file"):
      lora_files.rank(path)


@pytest.mark.parametrize(
  ("header", "message"),
  [
    ({"unet.r": 2, "unet.lora_alpha": 2, "unet.use_rslora": True}, "use_rslora=True is not supp"),
    ({"unet.r": 0, "unet.lora_alpha": 2}, "lora_adapter_metadata in its header cannot be read"),
    ({"unet.r": 2}, "lora_adapter_metadata in its header cannot be read"),
    ([2], "lora_adapter_metadata in its header cannot be read"),
    ({"unet.r": 2, "unet.lora_alpha": 1e308}, "to_out.0 is not finite"),
  ],
)
def test_what_the_header_says_of_an_adapter(tmp_path, header, message):
  path = tmp_path / "lora.safetensors"
  said = {"lora_adapter_metadata": json.dumps(header)}
  safetensors.numpy.save_file(diffusers_state(), path, said)
  with pytest.raises(UserError, match=message):
    lora_files.load(path, {PATH: (3, 1)})
