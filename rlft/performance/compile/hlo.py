"""What a compiled program costs: collectives from XLA's text, memory, work from the jaxpr.

XLA's own cost analysis counts the body of a loop once, and says nothing about communication.
"""

from collections.abc import Callable, Iterator
import dataclasses
import math
import re
from typing import Any

import jax

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r"\s*([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]\d*[a-z]?\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(calls|to_apply|body|branch_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)\}?")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_BITS = re.compile(r"(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
  """Communication that a program does at one place.

  Attributes:
    kind: one of `KINDS`.
    count: how often in one run of the program; 1 for each time in a loop of unknown length.
    bytes: of the whole array each time, on one device: what an all-gather returns, what the others
      are given.
  """

  kind: str
  count: int
  bytes: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  type: str
  operation: str
  operands: tuple[str, ...]
  rest: str


def collectives(text: str) -> list[Collective]:
  """The collectives of an optimised program, `compiled.as_text()`, those in loops multiplied."""
  computations, entry = _parse(text)
  types = {i.name: i.type for body in computations.values() for i in body}
  found = []

  def visit(computation: str, times: int) -> None:
    for one in computations.get(computation, ()):
      kind = one.operation.removesuffix("-start")
      if kind in KINDS:
        given = sum(_size(types.get(name, "")) for name in one.operands)
        size = given
        if kind == "all-gather":  # The start of an asynchronous one returns its operands, too.
          size = _size(one.type) - (given if one.operation.endswith("-start") else 0)
        found.append(Collective(kind, times, size))
      if one.operation in ("async-update", "async-done"):
        continue  # They name what the start has called.
      for role, names in _CALLED.findall(one.rest):
        trips = _trips(one, computations) if role == "body" else 1
        for name in names.split(", "):
          visit(name.strip("%"), times * trips)

  visit(entry, 1)
  return found


def total(found: list[Collective]) -> dict[str, tuple[int, int]]:
  """{kind: (count, bytes of all of them)} of the kinds that are there."""
  return {
    kind: (
      sum(one.count for one in found if one.kind == kind),
      sum(one.count * one.bytes for one in found if one.kind == kind),
    )
    for kind in KINDS
    if any(one.kind == kind for one in found)
  }


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  computations: dict[str, list[_Instruction]] = {}
  entry, current = "", None
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      current = computations.setdefault(match[2], [])
      entry = match[2] if match[1] else entry
    elif current is not None and (match := _INSTRUCTION.match(line)):
      kind, after = _split_type(match[2])
      operation = _OPERATION.match(after)
      if operation:
        inside = after[operation.end() : _closing(after, operation.end() - 1)]
        operands = tuple(re.findall(r"%([\w.\-]+)", inside))
        rest = after[operation.end() :]
        current.append(_Instruction(match[1], kind, operation[1], operands, rest))
  return computations, entry


def _split_type(text: str) -> tuple[str, str]:
  """The type at the start of `text`, which may be a tuple, and what follows it."""
  end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
  return text[:end], text[end:]


def _closing(text: str, start: int) -> int:
  """Where the parenthesis at `start` is closed."""
  depth = 0
  for i in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[i], 0)
    if depth == 0:
      return i
  return len(text)


def _size(kind: str) -> int:
  """Bytes of a type, of all parts of a tuple; without the padding of a layout."""
  size = 0
  for name, shape in _ARRAY.findall(kind):
    bits = _BITS.search(name)
    elements = math.prod(int(n) for n in shape.split(",") if n)
    size += elements * (max(int(bits[1]) // 8, 1) if bits else 1)
  return size


def _trips(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int:
  """How often a loop's body runs: known to XLA, or the one constant of its condition, or 1."""
  if known := _TRIPS.search(loop.rest):
    return int(known[1])
  condition = _CONDITION.search(loop.rest)
  bounds = [
    int(one.rest.split(")")[0])
    for one in computations.get(condition[1] if condition else "", ())
    if one.operation == "constant" and one.type.startswith("s32[]")
  ]
  return bounds[0] if len(bounds) == 1 else 1


# ---------------------------------------------------------------------------- memory


def peak_bytes(memory: Any) -> int:
  """What a program needs of a device at its peak.

  Args:
    memory: the program's `memory_analysis()`; where that does not say the peak, all of it counts.
  """
  whole = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  whole += memory.output_size_in_bytes - memory.alias_size_in_bytes
  return memory.peak_memory_in_bytes or whole


# ---------------------------------------------------------------------------- work of a jaxpr


def flops(jaxpr: Any) -> float:
  """Multiplications and additions in products and convolutions, over all devices.

  Loops of `scan` are multiplied out. Of a choice between platforms the default counts, so that the
  work is the same everywhere, and kernels written by hand, which count nothing, do not hide it; of
  any other choice the largest.

  Args:
    jaxpr: of a traced program, `traced.jaxpr`.
  """
  return _total(jaxpr, _product_flops)


def product_bytes(jaxpr: Any) -> float:
  """Bytes that products and convolutions read and write, over all devices, counted as `flops`.

  So much a device's memory moves at least, where what stands between two of them is fused with one
  of them. Products of a batch of matrices are left out: kernels keep attention's within the chip.

  Args:
    jaxpr: of a traced program, `traced.jaxpr`.
  """
  return _total(jaxpr, _moved_bytes)


def _product_flops(equation: Any) -> float:
  output = equation.outvars[0].aval
  if equation.primitive.name == "dot_general":
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2.0 * output.size * math.prod(shape[i] for i in contracted)
  kernel = equation.invars[1].aval
  outputs = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
  return 2.0 * output.size * kernel.size / outputs


def _moved_bytes(equation: Any) -> float:
  if equation.primitive.name == "dot_general" and any(equation.params["dimension_numbers"][1]):
    return 0.0
  arrays = [x.aval for x in (*equation.invars, *equation.outvars)]
  return float(sum(array.size * array.dtype.itemsize for array in arrays))


def _total(jaxpr: Any, of: Callable[[Any], float]) -> float:
  """The sum over all products and convolutions of a jaxpr."""
  return sum(_of_equation(equation, of) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _of_equation(equation: Any, of: Callable[[Any], float]) -> float:
  name, params = equation.primitive.name, equation.params
  if name in ("dot_general", "conv_general_dilated"):
    return of(equation)
  if name == "pallas_call":
    return 0.0
  if name == "cond":
    platforms = params.get("branches_platforms") or ()
    by_default = [b for b, names in zip(params["branches"], platforms, strict=False) if not names]
    return max(_total(branch, of) for branch in by_default or params["branches"])
  times = params["length"] if name == "scan" else 1
  if name == "shard_map":
    times = params["mesh"].size
  return times * sum(_total(inner, of) for inner in _inner(params))


def _inner(params: dict[str, Any]) -> Iterator[Any]:
  """The jaxprs that an equation runs."""
  for value in params.values():
    for one in value if isinstance(value, tuple | list) else (value,):
      if isinstance(one, jax.extend.core.ClosedJaxpr | jax.extend.core.Jaxpr):
        yield one
