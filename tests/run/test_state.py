"""How a run begins: its parameters, and the adapter of a LoRA run."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_cases as cases

from rlft.config import fields
from rlft.config.settings import Config
from rlft.models import lora
from rlft.models.files import lora_files
from rlft.parallel import sharding
from rlft.run import checks, state
from rlft.types import UserError

SCALE = 0.5


@pytest.fixture(scope="module")
def unet():
  return cases.tiny_model().params["unet"]


@pytest.fixture(scope="module")
def adapter(unet):
  """Factors of rank 2 for all modules but one."""
  (_, *paths) = sorted(lora.targets(unet).items())
  rng = np.random.RandomState(0)
  return {
    path: {
      "a": rng.standard_normal((fan_in, 2)).astype(np.float32),
      "b": rng.standard_normal((2, fan_out)).astype(np.float32),
    }
    for path, (fan_in, fan_out) in paths
  }


def begin(unet, **settings):
  config = checks.with_rank(fields.make(Config, ema_decay=0.5, **settings))
  optimizer = state.optimizer_of(config.optimizer)
  return state.initial_state(config, optimizer, sharding.make_mesh(2), unet, is_kept=True)


def test_in_bfloat16_the_master_and_the_average_keep_every_digit(unet):
  begun = begin(unet, param_dtype="bfloat16")
  for kept in (begun.opt.master, begun.ema):
    chex.assert_trees_all_equal(kept, unet)
    chex.assert_trees_all_equal_dtypes(kept, unet)
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), unet)
  chex.assert_trees_all_equal(begun.params, rounded)
  assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (unet, rounded)), strict=True))


def test_an_adapter_begins_as_the_file_says(unet, adapter, tmp_path):
  path = tmp_path / "lora.safetensors"
  lora_files.save(path, adapter, scale=SCALE, format="kohya")
  new = begin(unet, lora_rank=2)
  begun = begin(unet, init_lora=str(path), lora_alpha=8.0)
  assert jax.tree.map(np.shape, begun.params) == jax.tree.map(np.shape, new.params)
  assert begun.ema is not None
  (left_out,) = begun.params.keys() - adapter.keys()
  jax.tree.map(np.testing.assert_array_equal, begun.params[left_out], new.params[left_out])
  # The run's own scale is alpha / rank = 8 / 2.
  merged = lora.merge(unet, adapter, SCALE)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
    lora.merge(unet, begun.params, 4.0),
    merged,
  )
  shardings = {str(x.sharding.spec) for x in jax.tree.leaves(begun.params)}
  assert shardings == {str(x.sharding.spec) for x in jax.tree.leaves(new.params)}


def test_a_rank_that_is_not_the_files(adapter, tmp_path):
  path = tmp_path / "lora.safetensors"
  lora_files.save(path, adapter, scale=SCALE)
  config = fields.make(Config, init_lora=str(path), lora_rank=4)
  with pytest.raises(UserError, match="--lora_rank=4 is not the rank of .*: give --lora_rank=2"):
    checks.with_rank(config)
  assert checks.with_rank(fields.replace(config, lora_rank=2)).policy.lora_rank == 2
  assert checks.with_rank(Config()) == Config()
  with pytest.raises(UserError, match="--init_lora=none does not exist: give a safetensors file"):
    checks.with_rank(fields.make(Config, init_lora="none"))
