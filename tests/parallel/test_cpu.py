"""Devices of a host: when they start, what memory they keep, how they wait, the sizes of parts."""

import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from rlft.parallel import cpu, microbatch, sharding
from rlft.types import UserError


def test_the_host_is_not_split_twice():
  jax.devices()  # Has started JAX, with 8.
  cpu.split_host(0)
  cpu.split_host(8)
  with pytest.raises(UserError, match="--cpu_devices=2: JAX has started with 8 devices already"):
    cpu.split_host(2)


_FRESH_PAGES = """
import resource
from rlft.parallel import sharding
from rlft.parallel import cpu
cpu.split_host(1)
import jax, jax.numpy as jnp

def local(x):  # Arrays of 40 MB, which are given back after each call.
  large = jnp.sin(x[:, None] + jnp.arange(5e6))
  return jnp.cumsum(large[:, ::-1], axis=1)[:, -1]

mesh = sharding.make_mesh()
program = sharding.jit(
  sharding.on_each(mesh, local, in_specs=sharding.ROWS, out_specs=sharding.ROWS)
)
fresh = []
for _ in range(6):  # The heap grows in the first of them, more or less often.
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  program(jnp.ones(2))
  fresh.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(fresh))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_that_was_freed_is_used_again():
  """Else the kernel clears 20,000 pages for a call of this program."""
  others = ("JAX_NUM_CPU_DEVICES", "PJRT_NPROC", "JAX_DISABLE_MOST_OPTIMIZATIONS")
  environment = {k: v for k, v in os.environ.items() if k not in others}
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


@pytest.mark.parametrize(
  ("count", "found"), [(64, 16), (30, 15), (48, 16), (8, 8), (4, 0), (34, 0), (17, 0)]
)
def test_on_cpus_parts_are_as_large_as_their_caches_like(count, found):
  mesh = sharding.make_mesh()
  assert microbatch.size(0, count, mesh, jnp.float32) == found
  assert microbatch.size(0, count, mesh, jnp.bfloat16) == 0


@pytest.mark.parametrize(
  ("count", "steps", "found"), [(4, 3, 3), (4, 6, 3), (4, 5, 1), (1, 20, 10), (17, 2, 1), (8, 1, 1)]
)
def test_on_cpus_parts_are_of_several_timesteps_where_images_are_few(count, steps, found):
  mesh = sharding.make_mesh()
  assert cpu.steps_at_once(count, steps, mesh, jnp.float32) == found
  assert cpu.steps_at_once(count, steps, mesh, jnp.bfloat16) == 1
