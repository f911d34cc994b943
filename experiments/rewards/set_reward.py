"""A set reward of one's own: how many different colourings there are among a prompt's pictures.

experiments/rewards/set_reward.flags trains with it.
"""

import jax

from rlft.rewards import diversity, sets
from rlft.types import JaxReward

_CELLS = 4


def colours(credit: sets.Credit = "set") -> JaxReward:
  """The Vendi score of coarse pictures, in [1, G].

  Args:
    credit: 'set' gives the score to all images of a set, 'leave-one-out' gives each image what the
      set would lose without it.
  """
  return sets.set_reward("colours", _coarse, diversity.vendi, credit=credit)


def _coarse(params: None, images: jax.Array) -> jax.Array:
  """`[B, H, W, 3]` -> `[B, F]`: the colours of 4x4 cells; grey is 0, so that cosines spread."""
  del params
  small = jax.image.resize(images, (len(images), _CELLS, _CELLS, 3), "linear")
  return small.reshape(len(images), -1) - 0.5
