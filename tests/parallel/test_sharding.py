"""Layout on the mesh: what is really on each device."""

import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.parallel import sharding
from rlft.types import UserError

TREE = {"conv": np.ones((3, 3, 64, 32), np.float32), "bias": np.ones((32,), np.float32)}


def test_mesh_uses_all_devices():
  assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1}
  assert dict(sharding.make_mesh(4).shape) == {"data": 2, "fsdp": 4}


def test_parameters_are_sharded_by_their_largest_axis():
  mesh = sharding.make_mesh(4)
  placed = sharding.put(TREE, sharding.parameters(mesh, TREE))
  assert placed["conv"].addressable_shards[0].data.shape == (3, 3, 16, 32)
  assert placed["bias"].addressable_shards[0].data.shape == (32,)  # too small to be worth it
  np.testing.assert_array_equal(placed["conv"], TREE["conv"])


def test_one_shard_is_data_parallel():
  mesh = sharding.make_mesh()
  placed = sharding.put(TREE, sharding.parameters(mesh, TREE))
  assert placed["conv"].addressable_shards[0].data.shape == TREE["conv"].shape


def test_gather_is_whole_and_scatter_sums_over_devices():
  mesh = sharding.make_mesh(4)
  where = sharding.specs(mesh, TREE)
  rng = np.random.default_rng(0)
  factors = {k: rng.normal(size=(8, *v.shape)).astype(np.float32) for k, v in TREE.items()}

  def local(tree, factors):
    whole = sharding.gather(tree, where)
    assert jax.tree.map(lambda x: x.shape, whole) == jax.tree.map(lambda x: x.shape, TREE)

    def loss(whole):
      return sum((whole[name] * factors[name][0]).sum() for name in whole)

    return sharding.scatter(jax.grad(loss)(whole), where)

  run = sharding.on_each(mesh, local, in_specs=(where, sharding.ROWS), out_specs=where)
  result = jax.jit(run)(sharding.place(mesh, TREE), factors)
  for name in TREE:
    np.testing.assert_allclose(result[name], factors[name].sum(0), rtol=1e-5, atol=1e-5)
  assert result["conv"].addressable_shards[0].data.shape == (3, 3, 16, 32)


def test_batch_is_spread_over_both_axes():
  mesh = sharding.make_mesh(2)
  rows = sharding.put(np.arange(16.0), sharding.batch(mesh))
  assert [s.data.shape for s in rows.addressable_shards] == [(2,)] * 8
  time_major = jax.device_put(jnp.zeros((3, 16)), jax.NamedSharding(mesh, sharding.COLUMNS))
  assert time_major.addressable_shards[0].data.shape == (3, 2)


def test_the_host_is_not_split_twice():
  jax.devices()  # Has started JAX, with 8.
  sharding.split_host(0)
  sharding.split_host(8)
  with pytest.raises(UserError, match="--cpu_devices=2: JAX has started with 8 devices already"):
    sharding.split_host(2)


_FRESH_PAGES = """
import resource
from rlft.parallel import sharding
sharding.split_host(1)
import jax, jax.numpy as jnp

def local(x):  # Arrays of 100 MB, which are given back after each call.
  large = jnp.sin(x[:, None] + jnp.arange(25e6))
  return jnp.cumsum(large[:, ::-1], axis=1)[:, -1]

mesh = sharding.make_mesh()
program = sharding.jit(
  sharding.on_each(mesh, local, in_specs=sharding.ROWS, out_specs=sharding.ROWS)
)
fresh = []
for _ in range(10):  # The heap grows in the first of them, more or less often.
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  program(jnp.ones(2))
  fresh.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(fresh))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_that_was_freed_is_used_again():
  """Else the kernel clears 100,000 pages for a call of this program."""
  environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")}
  done = subprocess.run(
    [sys.executable, "-c", _FRESH_PAGES], env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert int(done.stdout) < 1000


def test_a_program_has_run_when_its_call_returns():
  """Else devices of a CPU that wait for each other run out of threads: more calls than those."""
  mesh = sharding.make_mesh()

  def local(x):
    x = jax.lax.fori_loop(0, 100, lambda _, x: jnp.tanh(x @ x), x[0])
    return jax.lax.psum(x, ("data", "fsdp"))

  total = sharding.on_each(mesh, local, in_specs=sharding.ROWS, out_specs=sharding.EVERYWHERE)
  program = sharding.jit(lambda x: total(jnp.broadcast_to(x, (8, *x.shape))))
  x = jnp.eye(64)
  for _ in range(30):
    x = program(x)
    assert x.is_ready()
  assert "all_reduce" in program.lower(x).as_text()
