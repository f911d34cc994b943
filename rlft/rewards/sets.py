"""Set rewards: a score of the G images of a prompt together, and who of them gets credit for it.

A set reward is two functions: what is known of each image (an embedding, class probabilities), and
a measure of a set of these. The first is computed once for each image; the measure of a smaller set
only needs a mask, so credit for each image costs G + 1 measures and no further network.
"""

from collections.abc import Callable
import functools
from typing import Any, Literal, get_args

import chex
import jax
import jax.numpy as jnp

from rlft.types import JaxReward, Scores, UserError

# Who gets what:
#   set            each image of a set gets the set's score (arXiv 2401.12244)
#   leave-one-out  an image gets what the set would lose without it
Credit = Literal["set", "leave-one-out"]
CREDITS = get_args(Credit)
# A set is scored if at least this share of its images is usable: a measure of a few of them says
# little, and a set of mostly unusable pictures should teach nothing.
MIN_USABLE = 0.5

Measure = Callable[[jax.Array, jax.Array], jax.Array]


def score_sets(
  features: jax.Array, measure: Measure, *, credit: Credit = "set", min_usable: float = MIN_USABLE
) -> Scores:
  """Scores of sets, or credits of their images.

  With S the measure, U the usable images of a set and i one of them,

      set:            S(U) for all images of the set, the unusable ones too
      leave-one-out:  S(U) - S(U without i) for image i; NaN for an unusable image

  A row of features that is not finite says that the image has nothing to measure (no face, say).
  Such an image is in no set, so leaving it out would lose nothing; its credit is NaN and not 0,
  since 0 may well be more than what a common image is worth, and images with nothing in them would
  be learned. Credits of a set say nothing about how good the set is as a whole.

  Args:
    features: `[P, G, ...]`.
    measure: `(features [G, ...], mask [G] bool) -> scalar` of the images where the mask is True,
      higher is better, NaN where there are too few of them; other rows hold any finite values.
    credit: one of `CREDITS`.
    min_usable: share of the G images in [0, 1]; a set with fewer usable images is NaN.

  Returns:
    Values `[P]` for 'set', `[P, G]` for 'leave-one-out'; the whole sets' for the latter; which
    images are usable. All float32.
  """
  chex.assert_axis_dimension_gt(features, 1, 0)
  num_images = features.shape[1]
  usable = jnp.isfinite(features).all(axis=tuple(range(2, features.ndim)))
  known = usable.reshape(*usable.shape, *[1] * (features.ndim - 2))
  features = jnp.where(known, features, 0)
  whole = jax.vmap(measure)(features, usable)
  enough = jnp.sum(usable, axis=1) >= max(min_usable * num_images, 1)
  whole = jnp.where(enough, whole, jnp.nan).astype(jnp.float32)
  found = usable.astype(jnp.float32)
  if credit == "set":
    return Scores(whole, found=found)
  others = usable[:, None, :] & ~jnp.eye(num_images, dtype=bool)
  without = jax.vmap(jax.vmap(measure, in_axes=(None, 0)))(features, others)
  credits = jnp.where(usable, whole[:, None] - without, jnp.nan).astype(jnp.float32)
  return Scores(credits, whole, found)


def set_reward(
  name: str,
  embed: Callable[[Any, jax.Array], jax.Array],
  measure: Measure,
  params: Any = None,
  *,
  credit: Credit = "set",
  min_usable: float = MIN_USABLE,
) -> JaxReward:
  """A reward on the images of a prompt together.

  Args:
    name: of the reward.
    embed: `(params, images [B, H, W, 3] in [0, 1]) -> features [B, ...]`; see `score_sets` for rows
      that are not finite.
    measure: of a set of features; see `score_sets`.
    params: weights for `embed`.
    credit: one of `CREDITS`.
    min_usable: share in [0, 1] of the images of a set that must be usable.

  Raises:
    UserError: an unknown credit.
  """
  if credit not in CREDITS:
    raise UserError(f"reward {name!r}: credit={credit} is not known: use {' or '.join(CREDITS)}")
  scores = functools.partial(score_sets, measure=measure, credit=credit, min_usable=min_usable)

  def score(params, images, features):
    del features
    found = embed(params, images.reshape(-1, *images.shape[2:]))
    return scores(found.reshape(*images.shape[:2], *found.shape[1:]))

  return JaxReward(name, score, is_set=True, params=params, is_measure=credit != "leave-one-out")
