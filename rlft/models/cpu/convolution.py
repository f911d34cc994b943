"""Convolutions of maps in forms that are fast on CPUs, and so are their gradients."""

from collections.abc import Callable
import functools
import math

import jax
import jax.numpy as jnp

from rlft.models import plain
from rlft.models.cpu import winograd
from rlft.models.cpu.ops import made_once

_SAME = ((1, 1), (1, 1))
_WHOLE = (3, 3, 1, _SAME)  # height, width, stride, padding of a convolution that keeps the size
_WIDTH = ((0, 0), (1, 1))  # padding of one by a row of its kernel
# Where which form is faster (experiments/cpu_kernels.md): numbers of channels, and of pixels.
_NARROW, _WIDE = 48, 128
_SOME, _MANY = 256, 1024
_UNDIVIDED = 2**15  # weights of a pixel, with more of which a convolution takes all threads
# Of F(4, 3) these points have half the error of 0, 1, -1, 2, -2 (experiments/cpu_kernels.md).
_PAIRS, _FOURS = winograd.form(0, 1, -1), winograd.form(0, 5 / 8, -5 / 8, 3 / 2, -3 / 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def conv2d(stride: int, padding: plain.Padding, x: jax.Array, kernel: jax.Array) -> jax.Array:
  """A convolution in the form that is the fastest here, and so are its gradients.

  JAX's gradients are convolutions with permuted dimensions, for which XLA has no fast form in the
  body of a loop on CPUs: there they take 30 to 80 times as long.
  """
  few = _is_few(stride, padding, x, kernel)
  if form := _rows_together(stride, padding, x, kernel):
    by_products = few or form is _FOURS and math.prod(kernel.shape[2:]) <= _UNDIVIDED
    return _winograd(form, _row_product if by_products else _row_convolution, x, kernel)
  return _columns_product(x, kernel) if few else plain.conv2d(stride, padding, x, kernel)


def _conv2d_backward(stride, padding, residuals, d):
  x, kernel = residuals
  few = _is_few(stride, padding, x, kernel)
  form = _rows_together(stride, padding, x, kernel)
  wide = min(kernel.shape[2:]) >= _WIDE
  if few:
    d_x = _columns_input_gradient(kernel, d)
  elif form and wide:
    d_x = _winograd(form, _row_gradient, d, kernel[::-1])
  elif form:
    d_x = _winograd(form, _row_convolution, d, _mirrored(kernel))
  else:
    d_x = _input_gradient(stride, padding, x.shape, kernel, d)
  if form and wide:
    return d_x, _winograd_kernel_gradient(_FOURS if _divides(_FOURS, x) else _PAIRS, x, d)
  if few:
    return d_x, _columns_kernel_gradient(x, d)
  return d_x, _kernel_gradient(stride, padding, x, kernel.shape, d)


def _is_whole(stride, padding, kernel):
  """Whether a convolution is 3x3 and keeps the size; in float32, as sums would be rounded."""
  return (*kernel.shape[:2], stride, padding) == _WHOLE and kernel.dtype == jnp.float32


def _mirrored(kernel):
  return jnp.flip(kernel, (0, 1)).swapaxes(2, 3)


def _input_gradient(stride, padding, shape, kernel, d):
  around = []
  for size, taps, given, (before, _) in zip(
    shape[1:3], kernel.shape[:2], d.shape[1:3], padding, strict=True
  ):
    low = taps - 1 - before
    # The stretched cotangent is stride (given - 1) + 1 long; `size` places of it are to be seen.
    around.append((low, size + taps - 2 - stride * (given - 1) - low))
  return plain.conv2d(1, around, d, _mirrored(kernel), lhs_dilation=(stride, stride))


def _kernel_gradient(stride, padding, x, shape, d):
  # The images take the place of the channels: x [I, H, W, B] by d [H', W', B, O].
  y = plain.conv2d(
    1, padding, x.transpose(3, 1, 2, 0), d.transpose(1, 2, 0, 3), rhs_dilation=(stride, stride)
  )
  height, width = shape[:2]  # A stride can leave pixels over, which add taps.
  return y[:, :height, :width].transpose(1, 2, 0, 3)


conv2d.defvjp(
  lambda stride, padding, x, kernel: (conv2d(stride, padding, x, kernel), (x, kernel)),
  _conv2d_backward,
)


def _is_few(stride: int, padding: plain.Padding, x: jax.Array, kernel: jax.Array) -> bool:
  """Whether a map has so few pixels that the kernel is what takes the time.

  A product then reads it once, as it lies. (With maps of 2 x 2 pixels, XLA exchanges map and
  kernel, and takes 50 times as long.)
  """
  pixels = math.prod(x.shape[:3])
  return _is_whole(stride, padding, kernel) and pixels <= min(kernel.shape[2:])


def _columns(x: jax.Array) -> jax.Array:
  """The 3 x 3 pixels around each one, `[B, H, W, C]` -> `[B H W, 9 C]`."""
  _, height, width, channels = x.shape
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  seen = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
  return jnp.concatenate(seen, -1).reshape(-1, 9 * channels)


def _columns_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return (_columns(x) @ kernel.reshape(-1, kernel.shape[-1])).reshape(*x.shape[:3], -1)


def _columns_input_gradient(kernel: jax.Array, d: jax.Array) -> jax.Array:
  shape = (*d.shape[:3], kernel.shape[2])
  kernel = kernel.reshape(-1, kernel.shape[-1])
  columns = jax.lax.dot_general(d.reshape(-1, d.shape[-1]), kernel, (((1,), (1,)), ((), ())))
  return jax.linear_transpose(_columns, jax.ShapeDtypeStruct(shape, d.dtype))(columns)[0]


def _columns_kernel_gradient(x: jax.Array, d: jax.Array) -> jax.Array:
  d = d.reshape(-1, d.shape[-1])
  kernel = jax.lax.dot_general(_columns(x), d, (((0,), (0,)), ((), ())))
  return kernel.reshape(3, 3, x.shape[-1], d.shape[-1])


def _rows_together(
  stride: int, padding: plain.Padding, x: jax.Array, kernel: jax.Array
) -> winograd.Form | None:
  """The form of Winograd's convolutions that is the fastest here; None if a direct one is."""
  if not _is_whole(stride, padding, kernel):
    return None
  pixels, channels = math.prod(x.shape[:3]), min(kernel.shape[2:])
  if channels < _NARROW or pixels < _SOME:
    return None
  pays = pixels >= _MANY or _is_few(stride, padding, x, kernel)
  if channels >= _WIDE and pays and _divides(_FOURS, x):
    return _FOURS
  return _PAIRS if _divides(_PAIRS, x) else None


def _divides(form: winograd.Form, x: jax.Array) -> bool:
  return x.shape[1] % form.rows == 0


def _winograd(
  form: winograd.Form,
  convolve: Callable[[jax.Array, jax.Array], jax.Array],
  x: jax.Array,
  kernel: jax.Array,
) -> jax.Array:
  rows = map(made_once, winograd.kernel_sums(form, kernel))
  factors = zip(winograd.input_sums(form, x), rows, strict=True)
  return winograd.output(form, [convolve(x, row) for x, row in factors])


def _winograd_kernel_gradient(form: winograd.Form, x: jax.Array, d: jax.Array) -> jax.Array:
  factors = zip(winograd.input_sums(form, x), winograd.cotangent_sums(form, d), strict=True)
  rows = [_row_kernel_gradient(x, d) for x, d in factors]
  return winograd.kernel_cotangent(form, rows).swapaxes(1, 2)


def _row_convolution(x: jax.Array, row: jax.Array) -> jax.Array:
  """`x` `[B, H, W, I]` convolved with a row `[3, I, O]` of a kernel."""
  return plain.conv2d(1, _WIDTH, x, row[None])


def _row_product(x: jax.Array, row: jax.Array) -> jax.Array:
  """Computes `_row_convolution` as one product that reads the row as it lies."""
  seen = jnp.concatenate(_shifted(x), -1)
  return (seen @ row.reshape(-1, row.shape[-1])).reshape(*x.shape[:3], -1)


def _row_gradient(d: jax.Array, row: jax.Array) -> jax.Array:
  """The cotangent of `_row_convolution`'s `x`, by products that leave the kernel as it lies."""
  seen = _shifted(d)[::-1]
  products = (jax.lax.dot_general(seen[i], row[i], (((1,), (1,)), ((), ()))) for i in range(3))
  return sum(products).reshape(*d.shape[:3], -1)


def _row_kernel_gradient(x: jax.Array, d: jax.Array) -> jax.Array:
  """The cotangent of its row, `[I, 3, O]`, by one product that leaves `x` as it lies."""
  channels = x.shape[-1]
  seen = jnp.concatenate(_shifted(d)[::-1], -1)
  product = jax.lax.dot_general(x.reshape(-1, channels), seen, (((0,), (0,)), ((), ())))
  return product.reshape(channels, 3, -1)


def _shifted(x: jax.Array) -> list[jax.Array]:
  """The pixels `[B H W, C]` to the left of each one, itself, and those to the right."""
  width, channels = x.shape[2:]
  padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
  return [padded[:, :, i : i + width].reshape(-1, channels) for i in range(3)]


@jax.custom_vjp
def upsample_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Multiplies the small map by each of the nine matrices, a quarter of the work, then adds up."""
  taps = [[x @ made_once(kernel[i, j]) for j in range(3)] for i in range(3)]
  return _double(*(_double(*row, axis=2) for row in taps), axis=1)


def _double(first: jax.Array, middle: jax.Array, last: jax.Array, *, axis: int) -> jax.Array:
  """A 3-tap convolution of what `axis` repeated twice would hold, given what each tap makes."""
  n = first.shape[axis]
  shift = functools.partial(jnp.pad, pad_width=[(int(a == axis), 0) for a in range(first.ndim)])
  before = jax.lax.slice_in_dim(shift(first), 0, n, axis=axis)
  shift = functools.partial(jnp.pad, pad_width=[(0, int(a == axis)) for a in range(first.ndim)])
  after = jax.lax.slice_in_dim(shift(last), 1, n + 1, axis=axis)
  # Pixel 2m sees m - 1, m, m; pixel 2m + 1 sees m, m, m + 1.
  pairs = jnp.stack([before + middle + last, first + middle + after], axis + 1)
  return pairs.reshape(*first.shape[:axis], 2 * n, *first.shape[axis + 1 :])


def _upsample_conv_forward(x, kernel):
  return upsample_conv(x, kernel), (x, kernel)


def _upsample_conv_backward(residuals, d):
  x, kernel = residuals
  b, h, w, _ = x.shape
  padded = jnp.pad(d, ((0, 0), (1, 1), (1, 1), (0, 0)))

  def halve(y: jax.Array, tap: int, axis: int) -> jax.Array:
    """Sums over the two pixels of `y` that see pixel m through this tap."""
    end = y.shape[axis] - 2
    first = jax.lax.slice_in_dim(y, 2 - tap, 1 - tap + end, 2, axis)
    return first + jax.lax.slice_in_dim(y, 3 - tap, 2 - tap + end, 2, axis)

  rows = [halve(padded, i, 1) for i in range(3)]
  taps = [halve(rows[i], j, 2).reshape(b * h * w, -1) for i in range(3) for j in range(3)]
  matrices = kernel.reshape(9, *kernel.shape[2:])
  d_x = sum(taps[t] @ matrices[t].T for t in range(9)).reshape(x.shape)
  columns = x.reshape(b * h * w, -1).T
  return d_x, jnp.stack([columns @ t for t in taps]).reshape(kernel.shape)


upsample_conv.defvjp(_upsample_conv_forward, _upsample_conv_backward)
