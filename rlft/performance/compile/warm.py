"""Compiles a training's programs into the cache in which its run looks for them."""

import sys
import time

import jax

from rlft.config.settings import Config
from rlft.parallel import compiled, cpu, sharding
from rlft.performance.compile import abstract_run, ahead
from rlft.performance.compile.abstract_run import AbstractRun
from rlft.run import checks
from rlft.types import UserError


def warm(config: Config, architecture: str) -> None:
  """Compiles for the devices that are here, as the run would; prints a line for each program.

  A run on any machine with the same devices, the same versions and the same flags finds them, where
  it sees the same directory. Nothing is computed, and weights need not be those of the run.

  Args:
    config: of the run.
    architecture: names one in the place of `config.pretrained`, or ''.

  Raises:
    UserError: a mistake in the settings, or nothing would be kept.
  """
  config = checks.with_rank(config)
  ahead.check(config, architecture)
  cpu.split_host(config.devices.cpu_devices)
  compiled.keep(config.devices.compilation_cache)
  directory = jax.config.jax_compilation_cache_dir
  if not directory or not jax.config.jax_enable_compilation_cache:
    raise UserError("--warm has nowhere to keep programs: give --compilation_cache=DIRECTORY")
  mesh = sharding.make_mesh(config.devices.fsdp)
  checks.validate_devices(config, device_count=mesh.size, process_count=jax.process_count())
  run = AbstractRun.of(config, mesh, abstract_run.open_model(config, architecture))
  for call in run.calls():
    start = time.perf_counter()
    call.program.lower(*call.args).compile()
    print(f"{call.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
  print(f"compiled for {mesh.size} {mesh.devices.flat[0].device_kind} into {directory}")
