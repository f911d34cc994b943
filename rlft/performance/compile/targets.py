"""Devices to compile for that are not here: the host's CPU split up, TPU slices, GPUs."""

from collections.abc import Sequence
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
import numpy as np

from rlft.config.settings import DeviceSettings
from rlft.parallel import cpu
from rlft.performance.compile import chips
from rlft.performance.compile.chips import CHIPS, Chip
from rlft.types import UserError

_TPUS = ("v4", "v5e", "v5p", "v6e")
_TPUS_OF_A_MACHINE = 4
_GPUS_OF_A_MACHINE = 8
_EXAMPLES = "cpu:8, v5e:8x8, v6e:8x16, v5p:4x4x8, a100:8, h100:8 or h200:16"

# What XLA's compiler asks of a GPU: name, then its share of `_DEVICE`.
_GPUS = {
  "a100": ("NVIDIA A100-SXM4-80GB", 8, 108, 64, 167936, 166912, 41943040, 1.41),
  "h100": ("NVIDIA H100 80GB HBM3", 9, 132, 128, 233472, 232448, 52428800, 1.98),
  "h200": ("NVIDIA H200", 9, 132, 128, 233472, 232448, 52428800, 1.98),
}
_DEVICE = """
platform_name: "CUDA"
device_description_str: "{}"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 8 }}
gpu_device_info {{
  cuda_compute_capability {{ major: {} }}
  core_count: {}
  fpus_per_core: {}
  shared_memory_per_core: {}
  shared_memory_per_block_optin: {}
  l2_cache_size: {}
  clock_rate_ghz: {}
  shared_memory_per_block: 49152
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {:.0f}
  device_memory_size: {:.0f}
}}
"""


@dataclasses.dataclass(frozen=True)
class Target:
  """Devices to compile for.

  Attributes:
    name: as the user wrote it.
    platform: 'cpu', 'tpu' or 'cuda': what programs are lowered for.
    mesh: of all its devices, ('data', 'fsdp').
    memory: bytes that a program may use on one device; None where it is not limited.
    chip: what its devices are, or are parts of; None where that is not known.
    chips: how many.
    processes: that a run has on them.
    compiles: False where the compiler is not installed; devices of the CPU stand in the mesh then.
  """

  name: str
  platform: str
  mesh: Mesh
  memory: float | None
  chip: Chip | None = None
  chips: int = 0
  processes: int = 1
  compiles: bool = True


def open_target(name: str, fsdp: int) -> Target:
  """The devices called `name`: `cpu:N`, a TPU's kind and shape, `GPU:N`. Before JAX has started.

  Raises:
    UserError: there is no such target, or `fsdp` does not divide it.
  """
  kind, _, shape = name.partition(":")
  if kind == "cpu" and re.fullmatch(r"[1-9]\d*", shape):
    return Target(name, "cpu", _mesh(name, _stand_ins(int(shape)), fsdp), None)
  if kind in _TPUS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
    return _open_tpus(name, kind, math.prod(map(int, shape.split("x"))), fsdp)
  if kind in _GPUS and re.fullmatch(r"[1-9]\d*", shape):
    return _open_gpus(name, kind, int(shape), fsdp)
  raise UserError(f"--target={name} is not known: give {_EXAMPLES}")


def open_here(settings: DeviceSettings) -> Target:
  """The devices that a run on this machine, or on all its processes, would have."""
  cpu.split_host(settings.cpu_devices)
  devices, fsdp, processes = jax.devices(), settings.fsdp, jax.process_count()
  backend = jax.default_backend()
  if backend == "cpu":
    name = f"cpu:{len(devices)}"
    return Target(name, "cpu", _mesh(name, devices, fsdp), None, processes=processes)
  kind = chips.name_of(devices[0].device_kind)
  # The two cores of a v4 chip are two devices at one place.
  count = len({tuple(getattr(one, "coords", None) or (one.id,)) for one in devices})
  platform = "tpu" if backend == "tpu" else "cuda"
  name = f"{kind or backend}:{len(devices)}"
  return _accelerators(name, platform, kind, devices, fsdp, chips=count, processes=processes)


def compiler(target: Target) -> str:
  """Name and version of what compiles for the target, beside jax's own."""
  package = {"tpu": "libtpu", "cuda": f"jax-{_cuda_plugin()}-pjrt"}.get(target.platform, "jaxlib")
  return f"{package} {importlib.metadata.version(package)}"


def _accelerators(
  name: str,
  platform: str,
  kind: str,
  devices: Sequence[jax.Device],
  fsdp: int,
  *,
  chips: int,
  processes: int,
  compiles: bool = True,
) -> Target:
  """A target of chips of one kind, which share their memory among the devices that they are."""
  chip, memory = CHIPS.get(kind), None
  if chip:
    memory = chip.memory * chips / len(devices) * (_gpu_share() if platform == "cuda" else 1)
  mesh = _mesh(name, devices, fsdp)
  return Target(name, platform, mesh, memory, chip, chips, processes, compiles)


def _stand_ins(count: int) -> list[jax.Device]:
  cpu.split_host(count)
  return jax.devices("cpu")[:count]


def _gpu_share() -> float:
  """How much of a GPU's memory JAX takes for a program; the variables are JAX's own."""
  names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second was earlier
  return float(next(filter(None, map(os.environ.get, names)), 0.75))


def _mesh(name: str, devices: Sequence[jax.Device], fsdp: int) -> Mesh:
  if len(devices) % fsdp:
    raise UserError(
      f"--fsdp={fsdp} does not divide the {len(devices)} devices of {name}: use a divisor of them"
    )
  return Mesh(
    np.asarray(devices).reshape(-1, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
  )


def _open_tpus(name: str, kind: str, count: int, fsdp: int) -> Target:
  """A slice of `count` chips; without its compiler as so many devices of this CPU."""
  compiles = importlib.util.find_spec("libtpu") is not None
  if compiles:
    # No TPU is here: the compiler must not ask for one, nor for the machine that it is part of.
    for variable, value in (
      ("TPU_SKIP_MDS_QUERY", "1"),
      ("TPU_ACCELERATOR_TYPE", "v6e-1"),
      ("TPU_WORKER_HOSTNAMES", "localhost"),
      ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
      ("TPU_MIN_LOG_LEVEL", "3"),
    ):
      os.environ.setdefault(variable, value)
    devices = _topology(name, platform="tpu", topology_name=name)
  else:
    devices = _stand_ins(2 * count if kind == "v4" else count)  # A core of a v4 is a device.
  # As Google rents them: up to eight chips of these kinds are one machine.
  alone = kind in ("v5e", "v6e") and count <= 8
  machines = 1 if alone else max(1, count // _TPUS_OF_A_MACHINE)
  return _accelerators(
    name, "tpu", kind, devices, fsdp, chips=count, processes=machines, compiles=compiles
  )


def _open_gpus(name: str, kind: str, count: int, fsdp: int) -> Target:
  """GPUs in machines of 8; without their compiler as so many devices of this CPU."""
  machines, rest = divmod(count, _GPUS_OF_A_MACHINE)
  if machines and rest:
    raise UserError(
      f"--target={name} is no number of whole machines: give up to {_GPUS_OF_A_MACHINE}, or a"
      " multiple of it"
    )
  machines, compiles = max(machines, 1), bool(_cuda_plugin())
  if compiles:
    chip = CHIPS[kind]
    devices = _topology(
      name,
      platform="cuda",
      target_config=_DEVICE.format(*_GPUS[kind], chip.memory_rate, chip.memory),
      topology=f"1x{machines}x{count // machines}",
    )
  else:
    devices = _stand_ins(count)
  # A process has all GPUs of its machine, as in launch/slurm.sh.
  return _accelerators(
    name, "cuda", kind, devices, fsdp, chips=count, processes=machines, compiles=compiles
  )


def _cuda_plugin() -> str:
  """'cuda12' or 'cuda13', whichever of JAX's plugins is installed; '' if none is."""
  names = ("cuda12", "cuda13")
  return next((name for name in names if importlib.util.find_spec(f"jax_{name}_plugin")), "")


def _topology(name: str, **described: str) -> list[jax.Device]:
  """The devices of a topology, from the compiler that knows it."""
  with contextlib.suppress(RuntimeError):  # JAX has started: then on what it found.
    jax.config.update("jax_platforms", "cpu")
  try:
    return list(topologies.get_topology_desc(**described).devices)
  except (RuntimeError, NotImplementedError, ValueError) as error:
    reason = " ".join(str(error).split())[:200]
    raise UserError(
      f"--target={name} is not known to the compiler ({reason}): give {_EXAMPLES}"
    ) from error
