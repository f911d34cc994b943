"""Features and distances by which a method is seen to lose what no reward looks at."""

import chex
import jax
import jax.numpy as jnp

_PIXELS = 4  # on a side of a cell, after images are reduced
_HIGHEST = jax.lax.Precision.HIGHEST
# Luma and two opponent colours, an orthonormal basis.
_OPPONENT = ((3**-0.5,) * 3, (2**-0.5, -(2**-0.5), 0.0), (6**-0.5, 6**-0.5, -2 * 6**-0.5))


def cells(images: jax.Array, count: int = 8) -> jax.Array:
  """A thumbnail with its texture: the mean colour of each cell, and how luma varies within it.

  Nothing in it is learned, so that no training can have exploited it; the texture sees grain, which
  the means of cells hide.

  Args:
    images: `[B, H, W, 3]` in [0, 1]; reduced to 4 x `count` pixels on a side, or enlarged to them.
    count: cells on a side.

  Returns:
    `[B, 4, count^2]` float32: luma, red against green, yellow against blue, and the standard
    deviation of luma.
  """
  chex.assert_rank(images, 4)
  side = count * _PIXELS
  shape = (len(images), side, side, 3)
  if images.shape != shape:
    images = jax.image.resize(images, shape, "linear", antialias=True)
  opponent = jnp.einsum("bhwc,oc->bohw", images, jnp.asarray(_OPPONENT), precision=_HIGHEST)
  cut = opponent.reshape(-1, 3, count, _PIXELS, count, _PIXELS)
  colours = cut.mean((3, 5)).reshape(-1, 3, count**2)
  texture = cut[:, :1].std((3, 5)).reshape(-1, 1, count**2)
  return jnp.concatenate([colours, texture], axis=1)


def kernel_distance(drawn: jax.Array, real: jax.Array) -> jax.Array:
  """Unbiased squared maximum mean discrepancy with the kernel of KID.

      mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j),
      k(x, y) = (<x, y> / F + 1)^3

  0 on average where both sets are of one distribution, and so below 0 now and then.
  Sources: arXiv 1801.01401 (KID); Gretton et al., "A Kernel Two-Sample Test" (2012), equation 3.

  Args:
    drawn: `[n, F]` features, n >= 2.
    real: `[m, F]`, m >= 2.
  """
  chex.assert_rank([drawn, real], 2)

  def kernel(x, y):
    return (jnp.matmul(x, y.T, precision=_HIGHEST) / x.shape[1] + 1) ** 3

  def within(x):
    count = len(x)
    return jnp.sum(kernel(x, x), where=~jnp.eye(count, dtype=bool)) / (count * (count - 1))

  return within(drawn) + within(real) - 2 * kernel(drawn, real).mean()


def likeness(drawn: jax.Array, real: jax.Array) -> jax.Array:
  """How close each picture comes to the most similar of some real ones, as a cosine.

  Args:
    drawn: `[B, F]` features.
    real: `[B, m, F]`, those of the picture's own prompt.

  Returns:
    `[B]` float32 in [-1, 1].
  """
  chex.assert_rank([drawn, real], [2, 3])

  def unit(x):
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)

  return jnp.einsum("bf,bmf->bm", unit(drawn), unit(real), precision=_HIGHEST).max(axis=1)
