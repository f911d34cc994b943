"""What is exported is the model that was trained, for rlft and for diffusers."""

import dataclasses

import jax
import models_cases
import numpy as np
import pytest
import safetensors.numpy

from rlft import export, lora
from rlft.models import pretrained, torch_layout
from rlft.sampler import Sampler
from rlft.types import UserError

STEPS, GUIDANCE, SEED, SCALE = 6, 3.0, 11, 0.5


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


@pytest.fixture(scope="module")
def merged(base, adapter):
  """The model with the adapter in its weights."""
  unet = jax.tree.map(np.asarray, lora.merge(base.params["unet"], adapter, SCALE))
  return dataclasses.replace(base, params={**base.params, "unet": unet})


def draw(model):
  """What rlft draws, `[N, H, W, 3]` in [0, 1], and the noise from which it started."""
  prompts = models_cases.PROMPTS
  sampler = Sampler(
    model,
    batch_size=jax.device_count(),
    sampling_steps=STEPS,
    guidance_scale=GUIDANCE,
    eta=0.0,
  )
  return sampler(prompts, SEED), sampler.initial_noise(len(prompts), SEED)


def diffusers_draws(pipe, noise):
  import torch

  pipe.set_progress_bar_config(disable=True)
  return pipe(
    list(models_cases.PROMPTS),
    latents=torch.tensor(noise).permute(0, 3, 1, 2),
    num_inference_steps=STEPS,
    guidance_scale=GUIDANCE,
    eta=0.0,
    output_type="np",
  ).images


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


def test_adapter_file_holds_what_is_merged(base, adapter, merged, tmp_path):
  path = tmp_path / "new" / "lora.safetensors"
  export.save_lora(path, adapter, scale=SCALE)
  state = safetensors.numpy.load_file(path)
  before = torch_layout.to_torch(base.params["unet"])
  after = torch_layout.to_torch(merged.params["unet"])
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


def test_diffusers_draws_the_same_images(merged, tmp_path):
  pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  pretrained.save(tmp_path / "model", merged)
  ours, noise = draw(pretrained.load(tmp_path / "model"))
  pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model")
  np.testing.assert_allclose(diffusers_draws(pipe, noise), ours, atol=1e-3)


def test_diffusers_loads_the_adapter(base, adapter, merged, tmp_path):
  pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  pytest.importorskip("peft")
  pretrained.save(tmp_path / "base", base)
  export.save_lora(tmp_path / "lora.safetensors", adapter, scale=SCALE)
  ours, noise = draw(merged)
  pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "base")
  plain = diffusers_draws(pipe, noise)
  pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
  assert np.abs(plain - ours).max() > 0.05
  np.testing.assert_allclose(diffusers_draws(pipe, noise), ours, atol=1e-3)
