"""UNet, VAE and text encoder against diffusers and transformers: stored numbers, and live."""

import dataclasses
import hashlib
import json

import chex
from flax import traverse_util
import jax
import jax.numpy as jnp
import models_cases
import numpy as np
import pytest
import towers_cases

from rlft.models import architectures
from rlft.models.files import torch_layout
from rlft.models.shapes import param_shapes
from rlft.types import Conditioning, UserError

TOLERANCE = 1e-4
LAYOUTS = models_cases.FIXTURES / "layouts.json"

CASES = tuple(models_cases.MODULES)


def largest_difference(found, expected):
  assert found.keys() == expected.keys()
  for name in found:
    assert found[name].shape == expected[name].shape and found[name].dtype == np.float32
  return max(np.abs(found[name] - expected[name]).max() for name in found)


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_that_pytorch_gave(case):
  with np.load(models_cases.FIXTURES / "models.npz") as stored:
    for name, value in models_cases.inputs(case).items():
      np.testing.assert_array_equal(value, stored[f"{case}/input/{name}"])
    prefix = f"{case}/output/"
    expected = {k.removeprefix(prefix): stored[k] for k in stored if k.startswith(prefix)}
  assert largest_difference(models_cases.flax_outputs_once(case), expected) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_that_pytorch_gives(case):
  pytest.importorskip("torch")
  pytest.importorskip("diffusers")
  expected = models_cases.torch_outputs(case)
  assert largest_difference(models_cases.flax_outputs_once(case), expected) <= TOLERANCE


@pytest.mark.parametrize("name", [*CASES, *models_cases.FULL_SIZE])
def test_the_parameter_tree_is_that_of_the_flax_classes(name):
  modules = models_cases.MODULES | {k: v[0] for k, v in models_cases.FULL_SIZE.items()}
  tree = models_cases.shapes(param_shapes(modules[name]))
  lines = [f"{path} {shape}" for path, shape in tree.items()]
  expected = json.loads((models_cases.FIXTURES / "trees.json").read_text())[name]
  assert len(lines) == expected["arrays"]
  assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == expected["sha256"]


@pytest.mark.parametrize("name", models_cases.FULL_SIZE)
def test_every_key_of_the_real_models_has_its_place(name):
  module, parameters = models_cases.FULL_SIZE[name]
  shapes = traverse_util.flatten_dict(param_shapes(module))
  assert {leaf.dtype for leaf in shapes.values()} == {jnp.dtype(jnp.float32)}
  found = towers_cases.flax_tree(module)
  assert len(found) == len(shapes)  # no two parameters have the same name in PyTorch
  assert towers_cases.digest(found) == json.loads(LAYOUTS.read_text())[name]
  assert towers_cases.digest(found)["parameters"] == parameters
  # Each of PyTorch's names leads to the parameter that has it.
  places = torch_layout.match(shapes, found)
  assert {name: path for path, name in places.items()} == {
    torch_layout.torch_names(path)[0]: path for path in shapes
  }


@pytest.mark.parametrize("name", models_cases.FULL_SIZE)
def test_the_stored_layouts_are_those_of_pytorch(name):
  pytest.importorskip("torch")
  pytest.importorskip("diffusers")
  module, _ = models_cases.FULL_SIZE[name]
  expected = json.loads(LAYOUTS.read_text())[name]
  assert towers_cases.digest(models_cases.torch_tree(module)) == expected


def test_architectures_have_all_networks_and_no_weights():
  for name, networks in (("sd2.1", 3), ("sdxl-base", 4)):
    model = architectures.abstract(name, dtype=jnp.bfloat16, remat=True)
    assert len(model.params) == networks and len(model.text_encoders) == networks - 2
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model.params))
    assert model.unet.dtype == jnp.bfloat16 and model.unet.remat
  assert model.zero_empty
  sizes = {name: a.image_size for name, a in architectures.ARCHITECTURES.items()}
  assert sizes == {"sd1.5": 512, "sd2-base": 512, "sd2.1": 768, "sdxl-base": 1024}
  with pytest.raises(UserError, match=r"'sd3' is unknown; choose from sd1.5, sd2-base, sd2.1,"):
    architectures.abstract("sd3")


def test_random_parameters_keep_the_size_of_activations():
  module = models_cases.MODULES["unet_sdxl"]
  params = architectures.random_params(param_shapes(module), seed=0)
  chex.assert_trees_all_equal_shapes_and_dtypes(params, param_shapes(module))
  again = architectures.random_params(param_shapes(module), seed=0)
  chex.assert_trees_all_equal(params, again)
  kernel = params["conv_in"]["kernel"]  # 3 x 3 x 4 inputs
  assert kernel.std() == pytest.approx(1 / 6, rel=0.1) and abs(kernel.mean()) < 0.02
  rows = kernel.reshape(-1, kernel.shape[-1])
  assert np.linalg.matrix_rank(rows) == min(rows.shape)


# Attention to the text from the first level on, from the second on, and twice in a block.
@pytest.mark.parametrize("case", ["unet_sd1", "unet_sdxl", "unet_odd"])
def test_maps_are_computed_once_for_several_texts(case):
  module = models_cases.MODULES[case]
  params = models_cases.random_params(module, seed=1)
  latents, timesteps, conditioning = models_cases.unet_inputs(case)
  other = jax.tree.map(lambda x: 1.5 * x[::-1], conditioning)
  both = jax.tree.map(lambda *rows: jnp.concatenate(rows), other, conditioning)
  apply = jax.jit(module.apply)
  first, second = jnp.split(apply({"params": params}, latents, timesteps, both), 2)
  expected = models_cases.flax_outputs_once(case)["sample"]
  np.testing.assert_allclose(second, expected, rtol=0, atol=1e-5)
  assert np.abs(first - expected).max() > 0.01


def test_prepared_text_gives_the_same_result():
  # In this one, two attentions of a block are to the text; others are in test_end_to_end.py.
  module = models_cases.MODULES["unet_odd"]
  params = models_cases.random_params(module, seed=1)
  latents, timesteps, conditioning = models_cases.unet_inputs("unet_odd")
  prepared = module.apply({"params": params}, conditioning, method="prepare")
  apply = jax.jit(module.apply)
  found = apply({"params": params}, latents, timesteps, prepared)
  expected = models_cases.flax_outputs_once("unet_odd")["sample"]
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
  # Both of each of the three transformers at the top, the second of the one in the middle.
  assert len(jax.tree.leaves(prepared.text)) == 2 * (3 * 2 + 1)


def test_rematerialisation_changes_neither_tree_nor_gradient():
  module, given = models_cases.MODULES["unet_sd2"], models_cases.unet_inputs("unet_sd2")
  config = dataclasses.replace(
    module.config,
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("UpBlock2D",),
    block_out_channels=(32,),
    attention_head_dim=(2,),
    # Each by itself is computed again.
    transformer_layers_per_block=(2,),
  )
  module = module.clone(config=config)
  remat = module.clone(remat=True)
  chex.assert_trees_all_equal_shapes_and_dtypes(param_shapes(module), param_shapes(remat))
  params = models_cases.random_params(module, seed=1)
  weights = np.random.RandomState(0).standard_normal((2, 8, 8, 4)).astype(np.float32)

  def gradient(m):
    function = jax.grad(lambda p: (weights * m.apply({"params": p}, *given)).sum())
    return jax.jit(function)(params)

  exact = gradient(module)
  chex.assert_trees_all_close(gradient(remat), exact, rtol=1e-3, atol=1e-3)
  program = str(jax.make_jaxpr(lambda p: remat.apply({"params": p}, *given))(params))
  assert program.count("remat") >= 5 + 2 + 2  # resnets, blocks on the way down and in the middle

  # A parameter that is created but not used would pass the comparison of trees.
  for path, leaf in traverse_util.flatten_dict(exact).items():
    assert np.abs(leaf).max() > 0, path


def test_half_precision_networks_take_and_give_float32():
  exact = models_cases.flax_outputs_once("unet_sdxl")["sample"]
  rounded = models_cases.flax_outputs("unet_sdxl", dtype=jnp.bfloat16)["sample"]
  assert rounded.dtype == np.float32
  # bfloat16 has 8 bits: 0.4 % a rounding; some tens of roundings in a row, outputs of size 1.
  assert 1e-4 < np.abs(rounded - exact).max() < 0.1


def test_sizes_that_do_not_fit_are_refused():
  module = models_cases.MODULES["unet_sdxl"]
  latents, timesteps, conditioning = models_cases.unet_inputs("unet_sdxl")
  variables = {"params": models_cases.random_params(module, seed=1)}
  with pytest.raises(ValueError, match="must be multiples of 4"):
    module.apply(variables, latents[:, :6], timesteps, conditioning)
  with pytest.raises(ValueError, match="needs the pooled text and the sizes"):
    module.apply(variables, latents, timesteps, Conditioning(conditioning.text))
  encoder = models_cases.MODULES["clip_gelu"]
  variables = {"params": models_cases.random_params(encoder, seed=1)}
  with pytest.raises(ValueError, match="17 tokens, but the text encoder takes at most 16"):
    encoder.apply(variables, np.zeros((1, 17), np.int32))


def test_a_token_does_not_see_those_after_it():
  module = models_cases.MODULES["clip_quick_gelu"]
  variables = {"params": models_cases.random_params(module, seed=1)}
  ids = models_cases.inputs("clip_quick_gelu")["ids"]
  changed = ids.copy()
  changed[:, 9:] = 0
  apply = jax.jit(module.apply)
  before, after = apply(variables, ids), apply(variables, changed)
  np.testing.assert_allclose(before[:, :9], after[:, :9], atol=1e-6)
  assert np.abs(before[:, 9:] - after[:, 9:]).max() > 0.1
