"""On CPUs the forms of operations compute what the plain ones do, which accelerators run."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.models import attention, dispatch
from rlft.models.dispatch import conv2d, upsample_conv

SAME = ((1, 1), (1, 1))


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def direct(x, kernel, *, stride=1, padding=SAME):
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def dense(x, kernel):
  return dispatch.dense_product(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision=None)


def convolution(size, stride, padding):
  """A map of 9 x 6 convolved with a kernel of this size: our form, the plain one, arguments."""
  settings = {"stride": stride, "padding": (padding, padding)}
  forms = (functools.partial(form, **settings) for form in (conv2d, direct))
  return *forms, (normal(0, 2, 9, 6, 5), normal(1, size, size, 5, 3))


def doubled(x, kernel):
  return direct(x.repeat(2, axis=1).repeat(2, axis=2), kernel)


def group_norm(x, scale, bias, *, silu):
  """As in the paper, https://arxiv.org/abs/1803.08494, equations 1 and 2."""
  groups = jnp.split(x, 4, axis=-1)
  normal = [(g - m) / jnp.sqrt(v + 1e-5) for g in groups for m, v in [moments(g)]]
  y = jnp.concatenate(normal, axis=-1) * scale + bias
  return y * jax.nn.sigmoid(y) if silu else y


def moments(x):
  mean = x.mean((1, 2, 3), keepdims=True)
  return mean, ((x - mean) ** 2).mean((1, 2, 3), keepdims=True)


def gated_gelu(x):
  x, gate = jnp.split(x, 2, axis=-1)
  return x * gate * jax.scipy.stats.norm.cdf(gate)


conv = functools.partial(conv2d, stride=1, padding=SAME)
norm = functools.partial(dispatch.group_norm, groups=4, epsilon=1e-5)
plain_attention = functools.partial(attention.attention, implementation="xla")

CASES = {
  # As many pixels and channels as it takes to have rows in fours and in pairs, each in both ways.
  "conv of fours": (conv, direct, (normal(0, 9, 8, 15, 130), normal(1, 3, 3, 130, 256))),
  "narrow conv of fours": (conv, direct, (normal(0, 9, 8, 15, 130), normal(1, 3, 3, 130, 140))),
  "conv of pairs": (conv, direct, (normal(0, 3, 8, 11, 60), normal(1, 3, 3, 60, 50))),
  "wide conv of pairs": (conv, direct, (normal(0, 3, 10, 9, 140), normal(1, 3, 3, 140, 130))),
  "conv of few pixels in fours": (
    conv,
    direct,
    (normal(0, 16, 4, 4, 260), normal(1, 3, 3, 260, 256)),
  ),
  "conv of few pixels in pairs": (
    conv,
    direct,
    (normal(0, 26, 2, 5, 260), normal(1, 3, 3, 260, 270)),
  ),
  "conv of few pixels": (conv, direct, (normal(0, 2, 3, 2, 16), normal(1, 3, 3, 16, 13))),
  "conv": convolution(3, 1, (1, 1)),
  "conv of single pixels": convolution(1, 1, (0, 0)),
  "conv without padding": convolution(3, 1, (0, 0)),
  "conv with stride": convolution(3, 2, (1, 1)),
  "conv with stride, padded after": convolution(3, 2, (0, 1)),
  "conv with a stride above its size": convolution(1, 2, (0, 0)),
  "conv of patches": convolution(3, 3, (0, 0)),
  "conv of an even size": convolution(4, 2, (1, 2)),
  "dense": (dense, jnp.matmul, (normal(0, 2, 3, 5), normal(1, 5, 7))),
  "upsample": (upsample_conv, doubled, (normal(0, 2, 3, 4, 5), normal(1, 3, 3, 5, 7))),
  "group norm": (
    functools.partial(norm, silu=False),
    functools.partial(group_norm, silu=False),
    (normal(0, 3, 4, 2, 12) + 5, normal(1, 12), normal(2, 12)),
  ),
  "group norm and silu": (
    functools.partial(norm, silu=True),
    functools.partial(group_norm, silu=True),
    (normal(0, 3, 4, 2, 12) - 5, normal(1, 12), normal(2, 12)),
  ),
  "gated gelu": (dispatch.gated_gelu, gated_gelu, (3 * normal(0, 2, 5, 14),)),
  "attention": (
    attention.attention,
    plain_attention,
    (4 * normal(0, 2, 5, 3, 8), normal(1, 2, 7, 3, 8), normal(2, 2, 7, 3, 8)),
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_form_on_cpus(name):
  form, plain, args = CASES[name]
  for found, expected in zip(both(form, args), both(plain, args), strict=True):
    assert found.dtype == jnp.float32
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, atol=4e-6)


def both(function, args):
  """Its value, and the cotangents of all arguments."""

  @jax.jit
  def run(d, *args):
    value, back = jax.vjp(function, *args)
    return value, *back(d)

  shape = jax.eval_shape(function, *args)
  return run(normal(9, *shape.shape).astype(shape.dtype), *args)


@pytest.mark.parametrize(
  "name",
  ["conv of fours", "conv of pairs", "conv of few pixels", "dense", "upsample", "gated gelu"],
)
def test_accelerators_have_the_plain_form(name):
  form, plain, args = CASES[name]

  def lowered(function):
    """The gradient for each platform, and its products and convolutions there."""
    gradient = jax.jit(jax.grad(lambda *args: function(*args).sum(), argnums=range(len(args))))
    texts = {}
    for platform in ("cpu", "tpu", "cuda"):
      with dispatch.for_platform(platform):
        traced = gradient.trace(*args)
      texts[platform] = traced.lower(lowering_platforms=(platform,)).as_text()
    kinds = "stablehlo.dot_general", "stablehlo.convolution"
    return texts, {p: [text.count(kind) for kind in kinds] for p, text in texts.items()}

  (texts, found), (_, expected) = lowered(form), lowered(plain)
  for platform in ("tpu", "cuda"):
    assert found[platform] == expected[platform]
    assert texts[platform] != texts["cpu"]


@pytest.mark.parametrize("name", ["conv of few pixels", "upsample", "gated gelu"])
def test_half_precision_has_the_plain_form(name):
  form, _, args = CASES[name]
  args = [x.astype(jnp.bfloat16) for x in args]
  text = jax.jit(form).trace(*args).lower().as_text()
  assert text.count("stablehlo.dot_general") == 0
  assert jax.eval_shape(form, *args).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["conv", "conv of few pixels", "conv with stride, padded after"])
def test_gradients_of_convolutions_in_half_precision(name):
  form, plain, args = CASES[name]
  args = [x.astype(jnp.bfloat16) for x in args]
  for found, expected in zip(both(form, args), both(plain, args), strict=True):
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, expected)


@pytest.fixture
def optimised():
  """XLA does what it does for users."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.parametrize(
  ("batch", "channels", "dtype"),
  [(2, 64, jnp.float32), (8, 128, jnp.float32), (8, 64, jnp.bfloat16)],
)
def test_gradients_of_convolutions_are_fast_in_a_loop(optimised, batch, channels, dtype):
  """XLA's CPU backend takes 30 times as long in a loop for the gradients that JAX writes."""
  images, kernel = normal(0, 2, batch, 8, 8, channels), normal(1, 3, 3, channels, channels)
  images, kernel = images.astype(dtype), kernel.astype(dtype)

  def gradient(kernel, x):
    return jax.grad(lambda kernel: conv(conv(x, kernel), kernel).sum())(kernel)

  def step(total, x):
    return total + gradient(kernel, x), None

  loop = jax.jit(lambda kernel: jax.lax.scan(step, jnp.zeros_like(kernel), images)[0])
  once = jax.jit(lambda kernel: gradient(kernel, images[0]))
  assert best(loop, kernel) < 8 * best(once, kernel)


def best(function, *args):
  """Seconds of the fastest of a few calls."""

  def call():
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start

  return min(call() for _ in range(5))
