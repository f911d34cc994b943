"""What devices ought to tell each other in a program, and what is more than that.

Theory: parameters that are spread over 'fsdp' are gathered once; their gradients are summed and
scattered once, and the shards summed over 'data'; gradients of whole parameters are summed. Nothing
else is of that size, and no activation moves.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

_SLACK = 0.01  # of the parameters' bytes: metrics, norms, advantages
_SUMMED_WHOLE = 0.1  # of the parameters' or the gradients' bytes, at most
_SMALLEST = 2**10  # bytes that nobody has to explain


def expected(mesh: Mesh, *, gathers: Any, scatters: Any) -> dict[str, int]:
  """{kind: bytes} as in `hlo.total`, of one call.

  Args:
    mesh: ('data', 'fsdp').
    gathers: the parameters that are gathered, of the type in which they are; arrays or shapes with
      a sharding.
    scatters: the parameters whose gradient is summed.
  """
  found = {"all-gather": 0, "reduce-scatter": 0, "all-reduce": 0}
  # XLA's collectives on CPUs are at least 32 bits wide.
  least = 4 if mesh.devices.flat[0].platform == "cpu" else 1
  for leaf in jax.tree.leaves(gathers):
    if is_spread(leaf):
      found["all-gather"] += leaf.size * max(leaf.dtype.itemsize, least)
  for leaf in jax.tree.leaves(scatters):
    size = leaf.size * jnp.dtype(jnp.float32).itemsize
    if is_spread(leaf):
      found["reduce-scatter"] += size
      if mesh.shape["data"] > 1:
        found["all-reduce"] += size // mesh.shape["fsdp"]
    elif mesh.size > 1:
      found["all-reduce"] += size
  return found


def sparable(mesh: Mesh, gathers: Any) -> int:
  """Bytes of `expected`'s gathers that the compiler may spare: half of those in float32 on TPUs.

  They multiply float32 in bfloat16 unless told otherwise, and may then gather it in bfloat16.
  """
  if mesh.devices.flat[0].platform != "tpu":
    return 0
  leaves = jax.tree.leaves(gathers)
  return sum(2 * leaf.size for leaf in leaves if leaf.dtype == jnp.float32 and is_spread(leaf))


def surprises(
  found: Mapping[str, tuple[int, int]],
  theory: Mapping[str, int],
  parameter_bytes: int,
  sparable: int = 0,
) -> tuple[str, ...]:
  """A line for each kind of communication that is not what theory says.

  Args:
    found: see `hlo.total`.
    theory: see `expected`.
    parameter_bytes: of all parameters; a hundredth of them is let pass.
    sparable: see `sparable`; gathering less by up to as much is let pass.
  """
  slack = max(_SLACK * parameter_bytes, _SMALLEST)
  sizes, wanted = {kind: size for kind, (_, size) in found.items()}, dict(theory)
  # The TPU's compiler makes an all-reduce and a slice of the reduce-scatter of a small array.
  scattered = wanted.get("reduce-scatter", 0)
  most = _SUMMED_WHOLE * max(scattered, parameter_bytes)
  moved = min(scattered - sizes.get("reduce-scatter", 0), most)
  if moved > 0:
    wanted["reduce-scatter"] = scattered - moved
    wanted["all-reduce"] = wanted.get("all-reduce", 0) + moved
  less = {"all-gather": sparable}
  return tuple(
    f"{kind}: {sizes.get(kind, 0) / 2**20:.1f} MiB in {found.get(kind, (0, 0))[0]}, expected"
    f" {theory.get(kind, 0) / 2**20:.1f} MiB"
    for kind in sorted({*sizes, *wanted})
    if not -slack - less.get(kind, 0) <= sizes.get(kind, 0) - wanted.get(kind, 0) <= slack
  )


def is_spread(leaf: Any) -> bool:
  """Whether each device along 'fsdp' has its own part of the array."""
  return "fsdp" in jax.tree.leaves(tuple(leaf.sharding.spec))
