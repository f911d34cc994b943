"""Whose weights draw, and whose are evaluated."""

import types

import pytest

from rlft.algorithms.weighted_denoising import Raft, RewardWeighted
from rlft.run.programs import Programs
from rlft.types import TrainState

LEARNER = types.SimpleNamespace(weights=lambda trained, base: (trained, base))
STATE = TrainState("trained", None, "averaged")


def programs(algorithm):
  return Programs(algorithm, LEARNER, *[None] * 5)


def test_reward_weighted_denoising_draws_with_the_base_unless_it_is_told_otherwise():
  weights = programs(RewardWeighted()).drawing_weights(STATE, {"unet": "base"})
  assert (weights.unet, weights.adapter) == ("base", None)
  for algorithm in (RewardWeighted(draw="current"), Raft(one_in=2)):
    drawn = programs(algorithm).drawing_weights(STATE, {"unet": "base"})
    assert drawn == ("trained", "base")


@pytest.mark.parametrize(("ema", "expected"), [("averaged", "averaged"), (None, "trained")])
def test_averaged_weights_are_evaluated_where_there_are_some(ema, expected):
  state = TrainState("trained", None, ema)
  assert programs(Raft(one_in=2)).averaged_weights(state, {})[0] == expected
