"""Images a second, the share of the device's rate, memory; beside diffusers on the same device."""

from collections.abc import Callable
import contextlib
import importlib.util
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlft.models.files import diffusers_layout
from rlft.performance.accelerator import measuring, profile
from rlft.performance.accelerator.measuring import Say
from rlft.performance.accelerator.scales import Model, Scale
from rlft.performance.accelerator.training import Training, described, flops, settings, work_of
from rlft.performance.benchmark import ports, reward, torch_policy, torch_ports
from rlft.performance.benchmark.contest import Unavailable
from rlft.storage import files

_ROOT = pathlib.Path(__file__).parents[3]
_GIB = 2**30
_ADAPTER_TIMESTEPS = 2


def large(scale: Scale, say: Say) -> None:
  """All weights of a model: sampling, an update, a whole iteration."""
  training = Training(settings(scale.large, scale.timesteps), scale.large)
  _speed(training, scale.large, scale, say)


def wide(scale: Scale, say: Say) -> None:
  """An adapter of a larger model."""
  training = Training(settings(scale.wide, _ADAPTER_TIMESTEPS), scale.wide)
  _speed(training, scale.wide, scale, say)
  _say_peak("update", training, say)


def _speed(training: Training, model: Model, scale: Scale, say: Say) -> None:
  rate = measuring.matrix_rate(scale.product)
  say(f"bf16 products of {scale.product} x {scale.product}", rate / 1e12, "TFLOP/s")
  work = flops(training.config, training.run.model)
  lora = f", LoRA {model.lora_rank}" if model.lora_rank else ""
  about = (
    f"{model.images} images, {model.steps} steps, guidance, microbatch {model.microbatch}{lora};"
    f" {training.config.algorithm.train_timesteps} updates an iteration"
  )
  say("work", model.name, note=about)
  training.compile()
  for name, program in training.programs.items():
    say(f"{name}: compiled in", program.seconds, "s")
    say(f"{name}: memory predicted", program.needed / _GIB, "GiB")
  text = training.encode()
  path, images = training.sample(text)
  deviation = float(training.update(text, path, images)["ratio/max_abs_deviation"])
  say("|ratio - 1| at the first update", deviation, ok=deviation <= 1e-5)
  finite = bool(np.isfinite(np.asarray(images)).all())
  say("images are numbers", str(finite), ok=finite)
  for name, call in (
    ("update", lambda: (training.update(text, path, images), training.state)),
    ("sampling", lambda: training.sample(training.encode())),
    ("iteration", training.iteration),
  ):
    seconds = measuring.median(call, scale.repeats, is_warm=True)
    say_rate(name, model.images, work[name] / seconds, rate, seconds, say)


def say_rate(name: str, images: int, done: float, rate: float, seconds: float, say: Say) -> None:
  """Images a second, with FLOP/s beside those of matrix products."""
  note = f"{seconds:.3g} s, {done / 1e12:.3g} TFLOP/s, {done / rate:.0%} of the products' rate"
  say(name, images / seconds, "images/s", note=note)


def _say_peak(name: str, training: Training, say: Say) -> None:
  """The most memory that was ever in use, when a program has run that takes more than others."""
  peak, what = measuring.peak_bytes(), f"{name}: most memory in use"
  note = f"predicted {training.programs[name].needed / _GIB:.2f} GiB"
  if peak is None:
    say(what, "not counted here", note=note)
  else:
    say(what, peak / _GIB, "GiB", note=note)


def traced(scale: Scale, say: Say) -> None:
  """Where the time of sampling and of an update goes, and the memory that they take.

  A part of its own: its programs were compiled by another process, so that what a compiler takes to
  try kernels out is not in the memory. Each is recorded in its first call, as sampling takes long.
  """
  training = Training(settings(scale.large, scale.timesteps), scale.large)
  training.compile()
  text = jax.block_until_ready(training.encode())
  drawn = _record("sample", training, lambda: training.sample(text), say)
  _record("update", training, lambda: training.update(text, *drawn), say)


def _record(name: str, training: Training, call: Callable[[], Any], say: Say) -> Any:
  """Says which kernels a call runs, and what memory was in use until then; returns its result."""
  result, trace = profile.record(call)
  _say_peak(name, training, say)
  if not trace.events:
    say(f"{name}: kernels", "none in the trace", ok=False)
    return result
  for kind in profile.by_kind(trace.events):
    say(f"{name}: {kind.name}", kind.share, "share", note=f"of the kernels' time: {kind.note}")
  note = f"of {trace.seconds:.3g} s, with the profiler; also if it misses kernels (loops in graphs)"
  say(f"{name}: no kernel is seen to run", 1 - profile.busy(trace), "share", note=note)
  return result


def levers(scale: Scale, say: Say) -> None:
  """Sampling and updates with other microbatches, and without remat, until one does not fit."""
  rate = measuring.matrix_rate(scale.product)
  training = Training(settings(scale.large, scale.timesteps), scale.large)
  base = {"microbatch": scale.large.microbatch, "remat": True}
  for lever in scale.levers:
    name = ", ".join(f"{key}={value}" for key, value in lever.items())
    training.change(**(base | lever))
    try:
      _try(name, training, scale, rate, say)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      say(name, "does not fit", note="out of memory")
      return  # With the state, which was given up.


def _try(name: str, training: Training, scale: Scale, rate: float, say: Say) -> None:
  work = flops(training.config, training.run.model)
  training.compile()
  text = training.encode()
  drawn = training.sample(text)
  jax.block_until_ready(training.update(text, *drawn))
  for what, call in (
    ("update", lambda: (training.update(text, *drawn), training.state)),
    ("sampling", lambda: training.sample(text)),
  ):
    seconds = measuring.median(call, scale.repeats, is_warm=True)
    say_rate(f"{name}: {what}", scale.large.images, work[what] / seconds, rate, seconds, say)


def diffusers(scale: Scale, say: Say) -> None:
  """The same work by diffusers' PyTorch networks."""
  try:
    torch_ports.start(*torch_policy.PACKAGES)
  except Unavailable as reason:
    say("diffusers", "not measured", note=f"{reason}: carry its wheel along")
    return
  rate = measuring.matrix_rate(scale.product)
  config = settings(scale.large, scale.timesteps)
  model = described(scale.large, config)
  counted = flops(config, model)
  with tempfile.TemporaryDirectory() as folder:
    diffusers_layout.describe(pathlib.Path(folder), model)
    work = work_of(config, model, pathlib.Path(folder))
    for is_compiled in (False, True):
      for what in ("sampling", "update"):
        name = f"diffusers, {'torch.compile' if is_compiled else 'eager'}: {what}"
        try:
          with contextlib.closing(torch_policy.side(what, work, is_compiled=is_compiled)) as side:
            # To compile it was called.
            seconds = measuring.median(side.run, scale.repeats, is_warm=is_compiled)
        except Unavailable as reason:
          say(name, "not measured", note=str(reason))
          continue
        except RuntimeError as error:  # Out of memory, a kernel: costs this figure alone.
          say(name, note=str(error).partition("\n")[0][:300], ok=False)
          continue
        say_rate(name, scale.large.images, counted[what] / seconds, rate, seconds, say)


def rewards(scale: Scale, say: Say) -> None:
  """Reward models as a run scores with them."""
  count, size = scale.reward_images, scale.reward_size
  images = np.random.RandomState(0).uniform(size=(count, size, size, 3)).astype(np.float32)
  for name, config in scale.rewards.items():
    for dtype in ("float32", "bfloat16"):
      scorer = ports.PORTS[name].scorer(config, jnp.dtype(dtype), count)
      side = reward.ours(scorer, images)
      seconds = measuring.median(side.run, scale.repeats)
      note = f"{count} images of {size} x {size}; compiled in {side.compile_s:.0f} s"
      say(f"{name}, {dtype}", count / seconds, "images/s", note=note)


def whole_run(scale: Scale, say: Say) -> None:
  """`launch/train.py` from its start to its report, nothing compiled before."""
  if importlib.util.find_spec("tensorboardX") is None:
    say("a whole run", "not measured", note="no tensorboardX: carry its wheel along")
    return
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    lines = scale.run(root)
    (root / "flags").write_text("\n".join((*lines, f"--workdir={root / 'run'}")) + "\n")
    command = [sys.executable, str(_ROOT / "launch" / "train.py"), f"--flagfile={root / 'flags'}"]
    start = time.perf_counter()
    done = subprocess.run(
      [*command, "--compilation_cache=off"], capture_output=True, text=True, cwd=_ROOT
    )
    seconds = time.perf_counter() - start
    if done.returncode:
      say("a whole run", note=done.stderr.strip().rpartition("\n")[2], ok=False)
      return
    say("a whole run, from its start to its report", seconds, "s", note=scale.run_note)
    metrics = files.read_jsonl(root / "run" / "metrics.jsonl")
    first, *others = (line["time/iteration_s"] for line in metrics)
    say("its first iteration, which compiles", first, "s")
    if others:
      say("an iteration, median of the others", statistics.median(others), "s")
