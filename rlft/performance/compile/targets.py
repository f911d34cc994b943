"""Devices to compile for that are not here: the host's CPU split up, or a TPU slice by its name."""

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

from rlft.parallel import cpu
from rlft.types import UserError

GIB = 2**30

# Bytes that a program may use: the memory of a chip less what the runtime keeps, as XLA says it.
_TPU_MEMORY = {
  "v4": 31.75 * GIB,
  "v5e": 15.75 * GIB,
  "v5p": 95.74 * GIB,
  "v6e": 31.25 * GIB,
}
_EXAMPLES = "cpu:8, v5e:8x8, v6e:8x16 or v5p:4x4x8"


@dataclasses.dataclass(frozen=True)
class Target:
  """Devices to compile for.

  Attributes:
    name: as the user wrote it.
    platform: 'cpu' or 'tpu'.
    mesh: of all its devices, ('data', 'fsdp').
    memory: bytes that a program may use on one device; None where it is not limited.
  """

  name: str
  platform: str
  mesh: Mesh
  memory: float | None


def open_target(name: str, fsdp: int) -> Target:
  """The devices called `name`: `cpu:N`, or a TPU's kind and shape. Before JAX has started.

  Raises:
    UserError: there is no such target, `fsdp` does not divide it, or the compiler is not installed.
  """
  kind, _, shape = name.partition(":")
  if kind == "cpu" and re.fullmatch(r"[1-9]\d*", shape):
    cpu.split_host(int(shape))
    devices, memory = jax.devices("cpu")[: int(shape)], None
  elif kind in _TPU_MEMORY and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
    devices = _tpu_devices(name)
    # The two cores of a v4 chip are two devices and share its memory.
    chips = len({tuple(device.coords) for device in devices})
    memory = _TPU_MEMORY[kind] * chips / len(devices)
  else:
    raise UserError(f"--target={name} is not known: give {_EXAMPLES}")
  if len(devices) % fsdp:
    raise UserError(
      f"--fsdp={fsdp} does not divide the {len(devices)} devices of {name}: use a divisor of them"
    )
  mesh = Mesh(
    np.asarray(devices).reshape(-1, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
  )
  return Target(name, "cpu" if kind == "cpu" else "tpu", mesh, memory)


def compiler(target: Target) -> str:
  """Name and version of what compiles for the target, beside jax's own."""
  package = "libtpu" if target.platform == "tpu" else "jaxlib"
  return f"{package} {importlib.metadata.version(package)}"


def _tpu_devices(name: str) -> list[jax.Device]:
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      f"--target={name} needs the TPU compiler: pip install 'rlft[aot]', or give --target=cpu:8"
    )
  # No TPU is here: the compiler must not ask for one, nor for the machine that it is part of.
  for variable, value in (
    ("TPU_SKIP_MDS_QUERY", "1"),
    ("TPU_ACCELERATOR_TYPE", "v6e-1"),
    ("TPU_WORKER_HOSTNAMES", "localhost"),
    ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ("TPU_MIN_LOG_LEVEL", "3"),
  ):
    os.environ.setdefault(variable, value)
  with contextlib.suppress(RuntimeError):  # JAX has started: then on what it found.
    jax.config.update("jax_platforms", "cpu")
  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
  except (RuntimeError, NotImplementedError, ValueError) as error:
    reason = " ".join(str(error).split())[:200]
    raise UserError(
      f"--target={name} is not known to the TPU compiler ({reason}): give {_EXAMPLES}"
    ) from error
