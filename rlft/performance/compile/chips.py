"""What vendors say of their accelerators: the one table of peaks, memories and links.

Peaks are of dense products in bfloat16. Rates of links are of one direction and of all links of a
chip together; vendors write the sum of both directions. Sources, all public:

    v4      cloud.google.com/tpu/docs/v4; links: 6 of 50 GB/s (arXiv 2304.01433, table 4)
    v5e     cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 819 GB/s, links 400 GB/s in both directions
    v5p     cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 2765 GB/s, links 1200 GB/s
    v6e     cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 1638 GB/s, links 800 GB/s
    a100    NVIDIA's data sheet of the A100 80GB SXM; DGX A100: 8 network ports of 200 Gb/s
    h100    NVIDIA's data sheet of the H100 SXM; DGX H100: 8 network ports of 400 Gb/s
    h200    NVIDIA's data sheet of the H200 SXM; DGX H200: as the DGX H100
"""

from collections.abc import Mapping
import dataclasses
import types

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """An accelerator: a TPU chip, which may be two devices, or a GPU.

  Attributes:
    flops: per second, at the peak.
    memory: bytes; of a TPU what a program may use, as its compiler says; of a GPU all.
    memory_rate: bytes per second.
    link_rate: bytes per second that it sends to its neighbours.
    network_rate: bytes per second that it sends to another machine, where links do not reach it;
      0 where they do.
  """

  flops: float
  memory: float
  memory_rate: float
  link_rate: float
  network_rate: float = 0.0


CHIPS: Mapping[str, Chip] = types.MappingProxyType(
  {
    "v4": Chip(275e12, 31.75 * GIB, 1200e9, 300e9),
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 200e9),
    "v5p": Chip(459e12, 95.74 * GIB, 2765e9, 600e9),
    "v6e": Chip(918e12, 31.25 * GIB, 1638e9, 400e9),
    "a100": Chip(312e12, 80e9, 2039e9, 300e9, 25e9),
    "h100": Chip(989e12, 80e9, 3350e9, 450e9, 50e9),
    "h200": Chip(989e12, 141e9, 4800e9, 450e9, 50e9),
  }
)

# What JAX calls a chip (`Device.device_kind`) begins so; the longer names first.
_KINDS = (
  ("TPU v4", "v4"),
  ("TPU v5 lite", "v5e"),
  ("TPU v5e", "v5e"),
  ("TPU v5", "v5p"),
  ("TPU v6", "v6e"),
  ("NVIDIA A100", "a100"),
  ("NVIDIA H100", "h100"),
  ("NVIDIA H200", "h200"),
)


def name_of(device_kind: str) -> str:
  """The chip's name in `CHIPS`; '' for one that is not there."""
  return next((name for kind, name in _KINDS if device_kind.startswith(kind)), "")
