import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.report import iteration
from rlft.rewards.scoring.task import Scored
from rlft.types import Scores

TIMES = {
  f"time/{phase}_s/{task}": seconds
  for phase, seconds in (("sample", 1.0), ("reward", 0.5), ("update", 2.5))
  for task in ("a", "b")
}


def test_figures_of_all_tasks():
  tasks = {
    "ratio/max_abs_deviation/a": 1e-7,
    "ratio/max_abs_deviation/b": 3e-7,
    "clip_fraction/a": 0.25,
    "clip_fraction/b": 0.75,
    "grad_norm/a": 1.0,
    "grad_norm/b": 2.0,
  }
  got = iteration.summarise(tasks | TIMES, images=32)
  assert got == tasks | TIMES | {
    "ratio/max_abs_deviation": 3e-7,
    "clip_fraction": 0.5,
    "grad_norm": 1.5,
    "time/sample_s": 2.0,
    "time/reward_s": 1.0,
    "time/update_s": 5.0,
    "time/iteration_s": 8.0,
    "images_per_second": 4.0,
  }
  # They come before those of the tasks.
  assert list(got)[:2] == ["ratio/max_abs_deviation", "clip_fraction"]


def test_an_algorithm_without_a_ratio():
  got = iteration.summarise({"loss/a": 0.5, "grad_norm/a": 2.0} | TIMES, images=8)
  assert (got["loss/a"], got["grad_norm"], got["images_per_second"]) == (0.5, 2.0, 1.0)
  assert not {"ratio/max_abs_deviation", "clip_fraction", "approx_kl", "loss"} & got.keys()


def test_figures_of_scores():
  scored = Scored(
    scores=Scores(jnp.array([1.0, 3.0, jnp.nan, 2.0])),
    terms={"x": Scores(jnp.array([5.0, 5.0, 5.0, 5.0]))},
    veto=Scores(jnp.array([0.0, 1.0, 0.0, 1.0])),
    vetoed=jnp.array([1.0, 0.0, 0.0, 0.0]),
    watch=Scores(jnp.full(4, jnp.nan), found=jnp.array([0.0, 0.0, 1.0, 0.0])),
  )
  got = iteration.of_task("a", scored, jax.device_get)
  assert [got[f"reward/a/{key}"] for key in ("mean", "min", "max", "unscored")] == [2, 1, 3, 0.25]
  assert got["reward/a/std"] == pytest.approx((2 / 3) ** 0.5)
  assert (got["reward/a/x/mean"], got["reward/a/x/std"]) == (5.0, 0.0)
  assert (got["veto/a/mean"], got["veto/a/share"]) == (0.5, 0.25)
  assert np.isnan(got["watch/a/mean"]) and got["watch/a/unscored"] == 1.0
  assert got["watch/a/found"] == 0.25 and "reward/a/found" not in got
  assert got["reward/a/constant"] == 0.0 and not any(key.startswith("credit/") for key in got)


def test_a_set_and_the_credit_of_its_images():
  credits = Scores(jnp.array([0.25, -0.25, jnp.nan, 0.0]), whole=jnp.full(4, -0.5))
  got = iteration.of_task("a", Scored(credits, {"x": credits}), jax.device_get, group=2)
  # The evaluation's name for the set's score is the training's.
  for name in ("a", "a/x"):
    assert (got[f"reward/{name}/mean"], got[f"reward/{name}/unscored"]) == (-0.5, 0.0)
    assert (got[f"credit/{name}/mean"], got[f"credit/{name}/unscored"]) == (0.0, 0.25)
  # Of the second group only one image has a score.
  assert got["reward/a/constant"] == 0.5
