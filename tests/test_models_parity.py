"""UNet, VAE and text encoder against diffusers and transformers: stored numbers, and live."""

import hashlib
import json

import chex
from flax import traverse_util
import jax
import jax.numpy as jnp
import models_cases
import numpy as np
import pytest

from rlft.models import torch_layout

TOLERANCE = 1e-4

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
  tree = models_cases.shapes(torch_layout.param_shapes(modules[name]))
  lines = [f"{path} {shape}" for path, shape in tree.items()]
  expected = json.loads((models_cases.FIXTURES / "trees.json").read_text())[name]
  assert len(lines) == expected["arrays"]
  assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == expected["sha256"]


@pytest.mark.parametrize("name", models_cases.FULL_SIZE)
def test_the_number_of_parameters_of_the_real_models(name):
  module, expected = models_cases.FULL_SIZE[name]
  leaves = jax.tree.leaves(torch_layout.param_shapes(module))
  assert sum(leaf.size for leaf in leaves) == expected
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}


def test_rematerialisation_changes_neither_tree_nor_gradient():
  module, given = models_cases.MODULES["unet_sd2"], models_cases.inputs("unet_sd2")
  remat = module.clone(remat=True)
  chex.assert_trees_all_equal_shapes_and_dtypes(
    torch_layout.param_shapes(module), torch_layout.param_shapes(remat)
  )
  params = models_cases.random_params(module, seed=1)
  weights = np.random.RandomState(0).standard_normal((2, 8, 8, 4)).astype(np.float32)

  def gradient(m):
    function = jax.grad(lambda p: (weights * m.apply({"params": p}, **given)).sum())
    # Compiled in half the time; what is compared is the two networks, not the compiler.
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(function, compiler_options=options)(params)

  exact = gradient(module)
  chex.assert_trees_all_close(gradient(remat), exact, rtol=1e-3, atol=1e-3)
  program = str(jax.make_jaxpr(lambda p: remat.apply({"params": p}, **given))(params))
  assert program.count("remat") >= 12  # 8 resnets and 4 transformers

  # A parameter that is created but not used would pass the comparison of trees.
  for path, leaf in traverse_util.flatten_dict(exact).items():
    assert np.abs(leaf).max() > 0, path


def test_half_precision_networks_take_and_give_float32():
  exact = models_cases.flax_outputs_once("unet_sd2")["sample"]
  rounded = models_cases.flax_outputs("unet_sd2", dtype=jnp.bfloat16)["sample"]
  assert rounded.dtype == np.float32
  # bfloat16 has 8 bits: 0.4 % a rounding; some tens of roundings in a row, outputs of size 1.
  assert 1e-4 < np.abs(rounded - exact).max() < 0.1


def test_sizes_that_do_not_fit_are_refused():
  module, given = models_cases.MODULES["unet_sd1"], models_cases.inputs("unet_sd1")
  variables = {"params": models_cases.random_params(module, seed=1)}
  with pytest.raises(ValueError, match="must be multiples of 4"):
    module.apply(variables, given["latents"][:, :6], given["timesteps"], given["text"])
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
