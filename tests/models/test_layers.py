import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.models import layers


def reference_conv(x, kernel, *, stride, padding):
  """The same convolution, as the sum over kernel positions of shifted maps times matrices."""
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  h = (x.shape[1] - kernel.shape[0]) // stride + 1
  w = (x.shape[2] - kernel.shape[1]) // stride + 1
  return sum(
    x[:, i : i + stride * h : stride, j : j + stride * w : stride][:, :h, :w] @ kernel[i, j]
    for i in range(kernel.shape[0])
    for j in range(kernel.shape[1])
  )


@pytest.mark.parametrize(
  ("size", "kernel_size", "channels", "stride", "padding"),
  [
    ((2, 6), 3, (3, 4), 1, (1, 1)),
    ((8, 4), 3, (6, 5), 2, (0, 1)),
    ((8, 8), 1, (6, 5), 1, (0, 0)),
  ],
)
def test_convolution_and_its_gradients(size, kernel_size, channels, stride, padding):
  rng = np.random.RandomState(0)
  x = rng.standard_normal((2, *size, channels[0])).astype(np.float32)
  kernel = rng.standard_normal((kernel_size, kernel_size, *channels)).astype(np.float32)
  settings = dict(stride=stride, padding=(padding, padding))

  def run(convolve):
    def loss(x, kernel):
      y = convolve(x, kernel, **settings)
      return (jnp.cos(jnp.arange(y.size)).reshape(y.shape) * y).sum(), y

    gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, kernel)
    return y, *gradients

  for found, expected in zip(run(layers.conv2d), run(reference_conv), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=5e-4)


def test_group_norm_of_given_numbers():
  # One map of 1x2 pixels, 4 channels, 2 groups. Group 1: 1 3 5 7, mean 4, variance
  # (9 + 1 + 1 + 9) / 4 = 5. Group 2: 0 0 0 8, mean 2, variance (3 * 4 + 36) / 4 = 12.
  x = jnp.array([[[[1.0, 3, 0, 0], [5, 7, 0, 8]]]])
  module = layers.GroupNorm(groups=2, epsilon=4.0)
  scale, bias = jnp.array([1.0, 2, 1, 1]), jnp.array([0.0, 0, 0, 10])
  y = module.apply({"params": {"scale": scale, "bias": bias}}, x)
  # Divided by sqrt(5 + 4) = 3 and sqrt(12 + 4) = 4.
  expected = [[[[-1, -2 / 3, -0.5, 9.5], [1 / 3, 2, -0.5, 11.5]]]]
  np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_group_norm_where_the_mean_is_far_larger_than_the_deviation():
  x = 1000 + jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
  module = layers.GroupNorm(groups=2, epsilon=1e-6)
  y = module.apply(module.init(jax.random.key(1), x), x)
  exact = np.asarray(x, np.float64).reshape(64, 2, 2)
  exact = (exact - exact.mean((0, 2), keepdims=True)) / exact.std((0, 2), keepdims=True)
  np.testing.assert_allclose(y.reshape(64, 2, 2), exact, atol=1e-3)


def test_attention_of_given_numbers():
  # One query, two keys, 4 dimensions: logits q k / sqrt(4) = (0, log 3), weights 1/4 and 3/4.
  query = jnp.array([1.0, 0, 0, 0]).reshape(1, 1, 1, 4)
  key = jnp.array([[0.0, 0, 0, 0], [2 * np.log(3), 0, 0, 0]]).reshape(1, 2, 1, 4)
  value = jnp.array([[4.0, 0, 0, 0], [0, 8, 0, 0]]).reshape(1, 2, 1, 4)
  y = layers.attention(query, key, value)
  np.testing.assert_allclose(y[0, 0, 0], [1, 6, 0, 0], rtol=1e-5)
  masked = layers.attention(query, key, value, mask=jnp.array([[True, False]]))
  np.testing.assert_allclose(masked[0, 0, 0], [4, 0, 0, 0], rtol=1e-6)


def test_upsampling_repeats_pixels():
  x = jnp.arange(4.0).reshape(1, 2, 2, 1)
  kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1)  # the identity
  variables = {"params": {"conv": {"kernel": kernel, "bias": jnp.zeros(1)}}}
  y = layers.Upsample().apply(variables, x)
  np.testing.assert_array_equal(
    y[0, :, :, 0], [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
  )
