"""Simulated people who are shown two pictures of one prompt, and say which one they prefer."""

import numpy as np
import scipy


def chance(liked: np.ndarray, other: np.ndarray, *, noise: float) -> np.ndarray:
  """How likely a rater is to prefer the first of two pictures: what shares of raters tend to.

  A rater follows an oracle, and errs the more often the less the pictures differ: the first is
  preferred with probability sigmoid((u - v) / noise), u and v what the oracle says of them
  (R. A. Bradley and M. E. Terry, 1952).

  Args:
    liked: u, of any shape; NaN where the oracle says nothing.
    other: v, broadcast to that shape.
    noise: difference at which three of four raters, nearly (sigmoid(1)), prefer the better one.

  Returns:
    In [0, 1], of the shape of `liked`; NaN where a picture has no u.
  """
  return scipy.special.expit((np.asarray(liked, np.float64) - other) / noise)
