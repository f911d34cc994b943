"""The sums of Winograd's convolutions along the height (https://arxiv.org/abs/1509.09308).

F(m, 3) makes m neighbouring rows of a convolution by a 3x3 kernel with m + 2 convolutions by a
single row in the place of 3 m: each takes a sum of the m + 2 rows of the input that are seen, and a
sum of the kernel's rows; rows of the output are sums of what they make.
"""

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial import polynomial

Matrix = tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True)
class Form:
  """Coefficients of F(m, 3); a line for each sum.

  Attributes:
    input: `[m + 2, m + 2]`.
    kernel: `[m + 2, 3]`.
    output: `[m, m + 2]`.
  """

  input: Matrix
  kernel: Matrix
  output: Matrix

  @property
  def rows(self) -> int:
    """m."""
    return len(self.output)


def form(*points: float) -> Form:
  """F(m, 3) by the method of Toom and Cook, from m + 1 points and infinity.

  A convolution is a product of polynomials: both are evaluated at the points, the values
  multiplied, and the product is interpolated. F(2, 3) with 0, 1 and -1 is the usual one.
  """
  count = len(points) + 1
  others = [[q for q in points if q != p] for p in points]
  lengths = [np.prod([p - q for q in rest]) for p, rest in zip(points, others, strict=True)]
  inputs = [np.pad(polynomial.polyfromroots(rest), (0, 1)) for rest in others]
  kernels = [np.power(p, range(3)) / n for p, n in zip(map(float, points), lengths, strict=True)]
  outputs = np.vander(points, count - 2, increasing=True).T
  infinity = np.eye(1, count - 2, count - 3).T
  return Form(
    input=_matrix([*inputs, polynomial.polyfromroots(points)]),
    kernel=_matrix([*kernels, (0, 0, 1)]),
    output=_matrix(np.hstack([outputs, infinity])),
  )


def _matrix(lines: Sequence[Sequence[float]]) -> Matrix:
  return tuple(tuple(map(float, line)) for line in lines)


def _sums(matrix: Sequence[Sequence[float]], arrays: Sequence[jax.Array]) -> list[jax.Array]:
  """The sums of the arrays with the coefficients of each line of the matrix."""
  return [sum(f * x for f, x in zip(line, arrays, strict=True) if f) for line in matrix]


def input_sums(form: Form, x: jax.Array) -> list[jax.Array]:
  """m + 2 arrays `[B, H / m, W, C]` from `[B, H, W, C]`, which is padded to keep its size."""
  padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
  last = x.shape[1] - form.rows + 1
  seen = [padded[:, i : i + last : form.rows] for i in range(form.rows + 2)]
  return _sums(form.input, seen)


def kernel_sums(form: Form, kernel: jax.Array) -> list[jax.Array]:
  """m + 2 rows `[3, I, O]` from the three of `[3, 3, I, O]`."""
  return _sums(form.kernel, kernel)


def output(form: Form, products: Sequence[jax.Array]) -> jax.Array:
  """`[B, H, W, C]` from the m + 2 products `[B, H / m, W, C]`."""
  batch, height, width, channels = products[0].shape
  rows = jnp.stack(_sums(form.output, products), 2)
  return rows.reshape(batch, form.rows * height, width, channels)


def cotangent_sums(form: Form, d: jax.Array) -> list[jax.Array]:
  """The cotangents of `output`'s products, given its own, `[B, H, W, C]`."""
  rows = [d[:, i :: form.rows] for i in range(form.rows)]
  return _sums(zip(*form.output, strict=True), rows)


def kernel_cotangent(form: Form, sums: Sequence[jax.Array]) -> jax.Array:
  """The cotangent of `kernel_sums`'s argument, `[3, 3, I, O]`, given those of its results."""
  return jnp.stack(_sums(zip(*form.kernel, strict=True), sums))
