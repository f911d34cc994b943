"""Simulated people who are shown two pictures of one prompt, and say which one they prefer."""

from collections.abc import Sequence

import numpy as np
import scipy

_SEED = 0  # of their luck


def preferred(
  liked: np.ndarray,
  other: np.ndarray,
  *,
  noise: float,
  raters: int = 5,
  seed: int | Sequence[int] = _SEED,
) -> np.ndarray:
  """The share of raters who prefer the first of two pictures, for each prompt.

  A rater follows an oracle, and errs the more often the less the pictures differ: the first is
  preferred with probability sigmoid((u - v) / noise), u and v what the oracle says of them
  (R. A. Bradley and M. E. Terry, 1952). Whoever is shown a pair at some place has the same luck in
  every call, so that methods are not told apart by that.

  Args:
    liked: u, of any shape; NaN where the oracle says nothing.
    other: v, broadcast to that shape.
    noise: difference at which three of four raters, nearly (sigmoid(1)), prefer the better one.
    raters: of each pair.
    seed: of their luck.

  Returns:
    Shares in [0, 1] of the shape of `liked`; NaN where a picture has no u.
  """
  chance = scipy.special.expit((np.asarray(liked, np.float64) - other) / noise)
  # One number for each rater of each pair, whatever the chance: binomial() would draw others.
  luck = np.random.default_rng(seed).random((*chance.shape, raters))
  return np.where(np.isnan(chance), np.nan, (luck < chance[..., None]).mean(axis=-1))
