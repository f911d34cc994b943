"""Times the operations of a UNet in several forms on this CPU, float32 on one thread.

    python experiments/cpu_kernels.py

The forms in `rlft/models/cpu/` beside the plain ones, Winograd's
F(2x2, 3x3), which is not built in, and PyTorch where it is installed; forms of an operation take
turns. Prints milliseconds, and the largest difference from the plain form. The result, and what
followed from it, is in `cpu_kernels.md`.
"""

from collections.abc import Callable, Mapping
import functools
import importlib.util
import os
import time

os.environ["PJRT_NPROC"] = os.environ["OMP_NUM_THREADS"] = "1"

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from rlft.config import flags as cli
from rlft.models import attention, dispatch, plain
from rlft.models.cpu import convolution, ops, winograd

_REPEATS = flags.DEFINE_integer("repeats", 9, "timed calls of each form", lower_bound=1)

# Images, height and width, channels in and out: of the miniature, and of a UNet with 128, 256 and
# 512 channels, as one of two devices has them; the widest map of Stable Diffusion.
_CONVOLUTIONS = (
  (32, 8, 96, 48),
  (32, 8, 176, 48),
  (32, 4, 256, 128),
  (8, 16, 256, 128),
  (8, 8, 256, 256),
  (8, 4, 512, 512),
  (8, 4, 1024, 512),
  (1, 64, 320, 320),
)
_MAPS = ((32, 8, 48), (32, 4, 128), (8, 16, 128), (8, 8, 256))  # images, height and width, channels
_LAYERS = ((2048, 64, 512), (512, 128, 1024), (512, 512, 128), (2048, 128, 1024))  # rows, in, out
_TOKENS = ((32, 16, 16, 4, 32), (8, 256, 256, 8, 16), (8, 256, 77, 8, 16))  # B, N, M, heads, D

_LAST_FIRST = (((1,), (0,)), ((), ()))  # the product of two matrices

# Of images of 16, as one device has them with guidance.
_ROWS = (
  (16, 8, 96, 48),
  (16, 16, 128, 128),
  (16, 16, 256, 128),
  (16, 8, 256, 256),
  (16, 4, 512, 512),
)
_FORMS = {
  "F(2, 3)": convolution._PAIRS,
  "F(4, 3)": convolution._FOURS,
  "F(4, 3) of whole numbers": winograd.form(0, 1, -1, 2, -2),
}

_INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))


def direct(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """XLA's convolution."""
  return plain.conv2d(1, convolution._SAME, x, kernel)


def conv2d(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Ours."""
  return dispatch.conv2d(x, kernel, stride=1, padding=convolution._SAME)


def nine_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """A matrix product for each element of the kernel."""
  b, h, w, _ = x.shape
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return sum(padded[:, i : i + h, j : j + w] @ kernel[i, j] for i in range(3) for j in range(3))


def winograd_square(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """F(2x2, 3x3) of https://arxiv.org/abs/1509.09308: 16 products in the place of 36."""
  b, h, w, c = x.shape
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  tiles = [[padded[:, i : i + h - 1 : 2, j : j + w - 1 : 2] for j in range(4)] for i in range(4)]
  tiles = _both(_INPUT, tiles)
  factors = _both(_KERNEL, [[kernel[i, j] for j in range(3)] for i in range(3)])
  pixels = _both(_OUTPUT, [[tiles[i][j] @ factors[i][j] for j in range(4)] for i in range(4)])
  return jnp.stack([jnp.stack(row, 3) for row in pixels], 2).reshape(b, h, w, -1)


def _both(matrix, grid):
  """M t M^T of a square of arrays."""

  def apply(values):
    return [sum(f * v for f, v in zip(row, values, strict=True) if f) for row in matrix]

  columns = [apply(column) for column in zip(*grid, strict=True)]
  return [apply(row) for row in zip(*columns, strict=True)]


def comparison(forms: Mapping[str, Callable], *args: jax.Array) -> str:
  """Times each form, forward and backward: 'name 1.23 / 4.56 (2e-7)', in ms, and its error."""
  cotangent = _random(1, jax.eval_shape(next(iter(forms.values())), *args).shape)
  forward = {name: jax.jit(form) for name, form in forms.items()}
  both = {
    name: jax.jit(lambda d, *args, form=form: jax.vjp(form, *args)[1](d))
    for name, form in forms.items()
  }
  first = times({name: functools.partial(f, *args) for name, f in forward.items()})
  second = times({name: functools.partial(f, cotangent, *args) for name, f in both.items()})
  expected = jax.tree.leaves(next(iter(both.values()))(cotangent, *args))
  parts = []
  for name in forms:
    found = jax.tree.leaves(both[name](cotangent, *args))
    error = max(
      float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(found, expected, strict=True)
    )
    parts.append(f"{name} {first[name]:.2f} / {second[name]:.2f} ({error:.0e})")
  return ", ".join(parts)


def times(calls: Mapping[str, Callable]) -> dict[str, float]:
  """Median milliseconds of each call, in turns."""
  seconds: dict[str, list[float]] = {name: [] for name in calls}
  for call in calls.values():
    jax.block_until_ready(call())
  for _ in range(_REPEATS.value):
    for name, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      seconds[name].append(time.perf_counter() - start)
  return {name: 1e3 * float(np.median(values)) for name, values in seconds.items()}


def measure_rows(x: jax.Array, kernel: jax.Array) -> str:
  """Winograd's forms by rows: forward pass, gradients of input and kernel, with their errors."""
  d = _random(1, (*x.shape[:3], kernel.shape[-1]))
  same = convolution._SAME
  plain = (
    jax.jit(direct),
    jax.jit(lambda x, kernel: convolution._input_gradient(1, same, x.shape, kernel, d)),
    jax.jit(lambda x, kernel: convolution._kernel_gradient(1, same, x, kernel.shape, d)),
  )
  calls = {"direct": plain}
  for name, form in _FORMS.items():
    calls[name] = (
      jax.jit(functools.partial(convolution._winograd, form, convolution._row_convolution)),
      jax.jit(
        lambda x, kernel, form=form: convolution._winograd(
          form, convolution._row_gradient, d, kernel[::-1]
        )
      ),
      jax.jit(lambda x, kernel, form=form: convolution._winograd_kernel_gradient(form, x, d)),
    )
  found = [
    times({name: functools.partial(parts[i], x, kernel) for name, parts in calls.items()})
    for i in range(len(plain))
  ]
  words = []
  for name, parts in calls.items():
    errors = [
      float(jnp.abs(part(x, kernel) - true(x, kernel)).max() / jnp.abs(true(x, kernel)).max())
      for part, true in zip(parts, plain, strict=True)
    ]
    numbers = " / ".join(
      f"{part[name]:.2f} ({e:.0e})" for part, e in zip(found, errors, strict=True)
    )
    words.append(f"{name} {numbers}")
  return ", ".join(words)


def torch_conv(x: jax.Array, kernel: jax.Array) -> str:
  """The same of PyTorch's convolution."""
  import torch

  torch.set_num_threads(1)
  image = torch.from_numpy(np.array(x.transpose(0, 3, 1, 2))).requires_grad_()
  weight = torch.from_numpy(np.array(kernel.transpose(3, 2, 0, 1))).requires_grad_()
  with torch.no_grad():
    ahead = times({"": lambda: torch.nn.functional.conv2d(image, weight, padding=1)})
  d = torch.ones(image.shape[0], weight.shape[0], *image.shape[2:])
  settings = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])
  back = times({"": lambda: torch.ops.aten.convolution_backward(d, image, weight, *settings)})
  return f"PyTorch {ahead['']:.2f} / {back['']:.2f}"


def _random(seed: int, shape: tuple[int, ...]) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape)


def main() -> None:
  print("milliseconds: forward pass / gradient, with what it needs of the forward pass")
  print("3x3 convolutions")
  for b, size, channels, features in _CONVOLUTIONS:
    x, kernel = _random(0, (b, size, size, channels)), _random(2, (3, 3, channels, features))
    forms = {"XLA": direct, "ours": conv2d}
    forms |= {"nine products": nine_products, "Winograd": winograd_square}
    line = comparison(forms, x, kernel)
    if importlib.util.find_spec("torch"):
      line += ", " + torch_conv(x, kernel)
    print(f"  {(b, size, channels, features)}: {line}", flush=True)
  print("3x3 convolutions by rows: forward pass / gradient of the input / of the kernel")
  for b, size, channels, features in _ROWS:
    x, kernel = _random(0, (b, size, size, channels)), _random(2, (3, 3, channels, features))
    print(f"  {(b, size, channels, features)}: {measure_rows(x, kernel)}", flush=True)
  print("3x3 convolutions, twice in a loop")
  for b, size, channels, features in _CONVOLUTIONS[:5]:
    x, kernel = _random(0, (2, b, size, size, channels)), _random(2, (3, 3, channels, features))
    forms = {"XLA": direct, "ours": conv2d}
    forms = {
      name: lambda x, kernel, form=form: jax.lax.map(lambda x: form(x, kernel), x)
      for name, form in forms.items()
    }
    print(f"  {(b, size, channels, features)}: {comparison(forms, x, kernel)}", flush=True)
  print("dense layers")
  for rows, channels, features in _LAYERS:
    args = _random(0, (rows, channels)), _random(2, (channels, features))
    forms = {
      "XLA": jnp.matmul,
      "ours": lambda x, kernel: dispatch.dense_product(x, kernel, _LAST_FIRST),
    }
    print(f"  {(rows, channels, features)}: {comparison(forms, *args)}", flush=True)
  print("doubled, then a 3x3 convolution")
  for b, size, channels in _MAPS:
    args = _random(0, (b, size // 2, size // 2, channels)), _random(2, (3, 3, channels, channels))
    forms = {"XLA": dispatch._upsample_conv, "ours": dispatch.upsample_conv}
    print(f"  {(b, size // 2, channels)}: {comparison(forms, *args)}", flush=True)
  print("group normalisation and SiLU")
  for b, size, channels in _MAPS:
    args = _random(0, (b, size, size, channels)), _random(2, (channels,)), _random(3, (channels,))
    forms = {
      "XLA": functools.partial(plain.group_norm, 16, 1e-5, True),
      "ours": functools.partial(dispatch.group_norm, groups=16, epsilon=1e-5, silu=True),
    }
    print(f"  {(b, size, channels)}: {comparison(forms, *args)}", flush=True)
  print("gated GELU")
  for b, size, channels in _MAPS:
    x = _random(0, (b, size * size, 8 * channels))
    forms = {"XLA": plain.gated_gelu, "ours": dispatch.gated_gelu}
    print(f"  {x.shape}: {comparison(forms, x)}", flush=True)
  print("attention")
  for b, n, m, heads, features in _TOKENS:
    args = [_random(i, (b, length, heads, features)) for i, length in enumerate((n, m, m))]
    forms = {
      "XLA": functools.partial(attention.attention, implementation="xla"),
      "ours": ops.attention,
    }
    print(f"  {(b, n, m, heads, features)}: {comparison(forms, *args)}", flush=True)


if __name__ == "__main__":
  cli.main(main)
