"""What only an accelerator can get wrong: kernels, the ratio, samples, compilations, donation."""

from concurrent import futures
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np

from rlft.models import attention
from rlft.parallel import compiled, sharding
from rlft.performance.accelerator import measuring
from rlft.performance.accelerator.measuring import Say
from rlft.performance.accelerator.scales import Scale
from rlft.performance.accelerator.training import Training, settings
from rlft.performance.compile.abstract_run import device_bytes

_FUSED = {"gpu": "cudnn$fmha", "tpu": "tpu_custom_call"}  # in a program that has the kernel
_AUTO = (AxisType.Auto,) * 2
_RATIO = 1e-5  # --ratio_tolerance
_SAMPLES = 2e-3  # mean difference of pixels in [0, 1], both in float32


# ---------------------------------------------------------------------------- kernels


def kernels(scale: Scale, say: Say) -> None:
  """Which attention is chosen for each shape, whether it is right, and what it gains."""
  with futures.ThreadPoolExecutor() as threads:
    tasks = [(shape, threads.submit(_compile, *shape)) for shape in scale.attention]
  for (_, queries, keys, heads, features), task in tasks:
    name = f"attention {queries} x {keys}, {heads} heads of {features}"
    try:
      is_fused, programs, arrays = task.result()
      # On TPUs the kernel is for long self-attention alone; not all GPUs take wide heads.
      ok = is_fused if jax.default_backend() == "gpu" and features <= 128 else None
      say(f"{name}: chosen", "fused" if is_fused else "xla", ok=ok)
      if is_fused:
        _compare(name, programs, arrays, scale, say)
    except jax.errors.JaxRuntimeError as error:  # Costs this shape alone.
      say(name, note=str(error).partition("\n")[0][:300], ok=False)


def _compile(images: int, queries: int, keys: int, heads: int, features: int) -> Any:
  """Whether a kernel is chosen for a shape; if so also the programs to compare, and arrays.

  The programs are the chosen one, XLA's, and XLA's in float32.
  """
  arrays = tuple(
    jax.random.normal(jax.random.key(i), (images, n, heads, features), jnp.bfloat16)
    for i, n in enumerate((queries, keys, keys))
  )
  chosen = jax.jit(_with_gradient("auto")).lower(*arrays)
  if _FUSED.get(jax.default_backend(), "\0") not in chosen.as_text():
    return False, (), arrays
  plain = jax.jit(_with_gradient("xla"))
  with jax.default_matmul_precision("highest"):
    exact = plain.lower(*(x.astype(jnp.float32) for x in arrays)).compile()
  return True, (chosen.compile(), plain.lower(*arrays).compile(), exact), arrays


def _compare(name: str, programs: Any, arrays: Any, scale: Scale, say: Say) -> None:
  """The chosen kernel's output and gradients beside XLA's, both against float32."""
  *halves, in_full = programs
  exact = in_full(*(x.astype(jnp.float32) for x in arrays))
  errors = [_errors(run(*arrays), exact) for run in halves]
  for what, ours, others in zip(("output", "gradients"), *errors, strict=True):
    note = f"relative; XLA's own in bfloat16: {others:.2g}"
    say(f"{name}: {what}, error", round(ours, 5), note=note, ok=ours <= 2 * others + 1e-3)
  seconds = [
    measuring.median(lambda run=run: run(*arrays), scale.repeats, is_warm=True) for run in halves
  ]
  note = f"XLA's {1e3 * seconds[1]:.3g} ms, {seconds[1] / seconds[0]:.2f} x"
  say(f"{name}: forward and backward", 1e3 * seconds[0], "ms", note=note)


def _with_gradient(implementation: str):
  """Attention with the gradients of a sum that depends on every output."""

  def loss(*arrays):
    output = attention.attention(*arrays, implementation=implementation).astype(jnp.float32)
    return jnp.sum(jnp.sin(3 * output)), output

  return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)


def _errors(found, exact) -> tuple[float, float]:
  """Root mean square errors of output and gradients, relative to what is exact."""

  def error(one, other):
    one = one.astype(jnp.float32)
    return float(jnp.sqrt(jnp.mean((one - other) ** 2) / jnp.mean(other**2)))

  gradients = statistics.fmean(map(error, found[0], exact[0]))
  return error(found[1], exact[1]), gradients


# ---------------------------------------------------------------------------- programs


def agreement(scale: Scale, say: Say) -> None:
  """Two iterations of a small model as a run does them, and its samples beside a CPU's."""
  training = Training(settings(scale.checked, 2), scale.checked)
  training.compile()
  training.as_called()
  with compiled.compilations() as names:
    text = training.encode()
    path, images = training.sample(text)
    before = jax.tree.leaves(training.state)
    deviation = float(training.update(text, path, images)["ratio/max_abs_deviation"])
    say("bf16: |ratio - 1| at the first update", deviation, ok=deviation <= _RATIO)
    kept = sum(not leaf.is_deleted() for leaf in before)
    # To fetch is to wait for the device. The first time, constants of programs may be fetched.
    with jax.transfer_guard_device_to_host("disallow"):
      training.iteration()
    jax.block_until_ready(training.state)
  for name in training.programs:
    count = names.count(f"jit({name})")
    say(f"{name}: compilations in two iterations", count, ok=count == 1)
  aliased, size = training.programs["update"].memory.alias_size_in_bytes, training.run.state
  note = f"{aliased:,} of {device_bytes(size):,} bytes in place"
  ok = kept == 0 and aliased >= device_bytes(size)
  say("update: arrays of the old state that are left", kept, note=note, ok=ok)
  _compare_samples(scale, say)


def _compare_samples(scale: Scale, say: Say) -> None:
  try:
    host = jax.devices("cpu")[:1]
  except RuntimeError:
    say("samples beside a CPU's", "not compared", note="JAX_PLATFORMS leaves the CPU out")
    return
  found = {}
  for where, devices in (("here", jax.devices()[:1]), ("cpu", host)):
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=_AUTO, devices=devices)
    with jax.default_matmul_precision("highest"), jax.default_device(devices[0]):
      config = settings(scale.checked, 2, compute_dtype="float32")
      training = Training(config, scale.checked, mesh=mesh)
      training.compile("encode", "sample")
      _, images = training.sample(training.encode())
    found[where] = sharding.fetch(images)
  difference = np.abs(found["here"] - found["cpu"])
  note = f"at most {difference.max():.2g}"
  ok = bool(difference.mean() <= _SAMPLES)
  say("float32 samples beside a CPU's: mean difference", float(difference.mean()), note=note, ok=ok)
