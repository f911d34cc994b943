"""Reinforcement learning for text-to-image diffusion models.

Rooms are imported by their names (`from rlft.diffusion import ddim`); of the modules that scripts
used before there were rooms, two keep their short names.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_SHORT = {"ddim": "rlft.diffusion.ddim", "prompts": "rlft.catalog"}


def __getattr__(name: str) -> Any:
  if name in _SHORT:
    return importlib.import_module(_SHORT[name])
  raise AttributeError(f"module 'rlft' has no attribute {name!r}")
