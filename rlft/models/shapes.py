"""Parameter trees, and the shapes that a module expects."""

from collections.abc import Mapping
import functools
from typing import Any, Protocol

import jax

Params = Mapping[str, Any]


class Module(Protocol):
  """A Flax module that says what it takes."""

  def init(self, rngs: Any, *args: Any) -> Mapping[str, Any]: ...

  def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]: ...


def param_shapes(module: Module) -> Params:
  """The parameter tree of a module, as `jax.ShapeDtypeStruct`s; computes nothing."""
  return jax.tree.map(lambda leaf: leaf, _param_shapes(module))  # a tree of the caller's own


@functools.lru_cache(maxsize=64)
def _param_shapes(module: Module) -> Params:
  # Tracing the UNet of SDXL takes seconds.
  return jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())["params"]
