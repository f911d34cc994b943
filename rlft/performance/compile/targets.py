"""Devices to compile for that are not here: the host's CPU split up, TPU slices, GPUs."""

from collections.abc import Sequence
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
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
    compiles: False where the compiler is not installed, and devices of the CPU stand in the mesh.
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
    UserError: there is no such target, `fsdp` does not divide it, or the compiler is not installed.
  """
  kind, _, shape = name.partition(":")
  if kind == "cpu" and re.fullmatch(r"[1-9]\d*", shape):
    cpu.split_host(int(shape))
    return Target(name, "cpu", _mesh(name, jax.devices("cpu")[: int(shape)], fsdp), None)
  if kind in _TPUS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
    return _described(name, kind, _tpu_devices(name), fsdp)
  if kind in _GPUS and re.fullmatch(r"[1-9]\d*", shape):
    return _open_gpus(name, kind, int(shape), fsdp)
  raise UserError(f"--target={name} is not known: give {_EXAMPLES}")


def open_here(settings: DeviceSettings) -> Target:
  """The devices that a run on this machine, or on all its processes, would have."""
  cpu.split_host(settings.cpu_devices)
  devices = jax.devices()
  if jax.default_backend() == "cpu":
    name = f"cpu:{len(devices)}"
    mesh = _mesh(name, devices, settings.fsdp)
    return Target(name, "cpu", mesh, None, processes=jax.process_count())
  kind = chips.name_of(devices[0].device_kind)
  return _described(f"{kind or jax.default_backend()}:{len(devices)}", kind, devices, settings.fsdp)


def compiler(target: Target) -> str:
  """Name and version of what compiles for the target, beside jax's own."""
  package = {"tpu": "libtpu", "cuda": f"jax-{_cuda_plugin()}-pjrt"}.get(target.platform, "jaxlib")
  return f"{package} {importlib.metadata.version(package)}"


def _described(name: str, kind: str, devices: Sequence[jax.Device], fsdp: int) -> Target:
  """Accelerators that JAX has described, with what is known of their kind."""
  chip = CHIPS.get(kind)
  # The two cores of a v4 chip are two devices and share its memory.
  parts = {tuple(getattr(one, "coords", None) or (one.id,)) for one in devices}
  is_tpu = devices[0].platform == "tpu"
  memory = chip and (chip.memory if is_tpu else chip.memory * _gpu_share())
  return Target(
    name,
    "tpu" if is_tpu else "cuda",
    _mesh(name, devices, fsdp),
    memory and memory * len(parts) / len(devices),
    chip,
    len(parts),
    len({device.process_index for device in devices}),
  )


def _gpu_share() -> float:
  """How much of a GPU's memory JAX takes for a program; the variable is JAX's own."""
  return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))


def _mesh(name: str, devices: Sequence[jax.Device], fsdp: int) -> Mesh:
  if len(devices) % fsdp:
    raise UserError(
      f"--fsdp={fsdp} does not divide the {len(devices)} devices of {name}: use a divisor of them"
    )
  return Mesh(
    np.asarray(devices).reshape(-1, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
  )


def _tpu_devices(name: str) -> list[jax.Device]:
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      f"--target={name} needs the TPU compiler: pip install 'rlft[aot]', or give --target=cpu:8"
    )
  # No TPU is here: the compiler must not ask for one, nor for the machine that it is part of.
  return _topology(
    name,
    {
      "TPU_SKIP_MDS_QUERY": "1",
      "TPU_ACCELERATOR_TYPE": "v6e-1",
      "TPU_WORKER_HOSTNAMES": "localhost",
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
      "TPU_MIN_LOG_LEVEL": "3",
    },
    platform="tpu",
    topology_name=name,
  )


def _open_gpus(name: str, kind: str, count: int, fsdp: int) -> Target:
  """GPUs in machines of 8; without their compiler as so many devices of this CPU."""
  machines, rest = divmod(count, _GPUS_OF_A_MACHINE)
  if machines and rest:
    raise UserError(
      f"--target={name} is no number of whole machines: give up to {_GPUS_OF_A_MACHINE}, or a"
      " multiple of it"
    )
  processes = max(machines, 1)  # One has all GPUs of its machine, as in launch/slurm.sh.
  if not _cuda_plugin():
    cpu.split_host(count)
    mesh = _mesh(name, jax.devices("cpu")[:count], fsdp)
    memory = CHIPS[kind].memory * _gpu_share()
    return Target(name, "cuda", mesh, memory, CHIPS[kind], count, processes, compiles=False)
  chip, described = CHIPS[kind], _GPUS[kind]
  devices = _topology(
    name,
    {"TF_CPP_MIN_LOG_LEVEL": "2"},  # Else it says, three times, that there is no GPU.
    platform="cuda",
    target_config=_DEVICE.format(*described, chip.memory_rate, chip.memory),
    topology=f"1x{max(machines, 1)}x{count // max(machines, 1)}",
  )
  return dataclasses.replace(_described(name, kind, devices, fsdp), processes=processes)


def _cuda_plugin() -> str:
  """'cuda12' or 'cuda13', whichever of JAX's plugins is installed; '' if none is."""
  names = ("cuda12", "cuda13")
  return next((name for name in names if importlib.util.find_spec(f"jax_{name}_plugin")), "")


def _topology(name: str, variables: dict[str, str], **described: str) -> list[jax.Device]:
  """The devices of a topology, from the compiler that knows it; `variables` are for this one."""
  for variable, value in variables.items():
    os.environ.setdefault(variable, value)
  with contextlib.suppress(RuntimeError):  # JAX has started: then on what it found.
    jax.config.update("jax_platforms", "cpu")
  try:
    return list(topologies.get_topology_desc(**described).devices)
  except (RuntimeError, NotImplementedError, ValueError) as error:
    reason = " ".join(str(error).split())[:200]
    raise UserError(
      f"--target={name} is not known to the compiler ({reason}): give {_EXAMPLES}"
    ) from error
