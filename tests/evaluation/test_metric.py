import weakref

import jax
import numpy as np
import pytest

from rlft.config.settings import ScoringSettings
from rlft.evaluation import metric
from rlft.evaluation.metric import MetricScorer
from rlft.parallel import sharding
from rlft.types import HostReward, JaxReward, Prompt, Scores, UserError


def brightness(_, images, features):
  return images.mean(tuple(range(1, images.ndim)))


def of_sets(_, images, features):
  """The brightness of sets, and which images are not black."""
  return Scores(brightness(_, images, features), found=images.max((2, 3, 4)) > 0)


EACH, SETS = JaxReward("each", brightness), JaxReward("sets", of_sets, is_set=True)


def pictures(count):
  """Image i of n is of the grey i / n."""
  values = np.arange(count, dtype=np.float32) / count
  return values, np.broadcast_to(values[:, None, None, None], (count, 2, 2, 3))


def scorer():
  return MetricScorer(
    rows=sharding.batch(sharding.make_mesh()), scoring=ScoringSettings(reward_threads=1)
  )


@pytest.mark.parametrize("count", [3, 9, 60])
@pytest.mark.parametrize("drawn", [2, 16, 60])
def test_scores_of_any_number_of_images(monkeypatch, count, drawn):
  # Sets of 3 on 8 devices make batches of 24: these are cut from what is drawn, and padded.
  monkeypatch.setattr(metric, "_SCORED_AT_ONCE", 10)
  values, images = pictures(count)
  batches = (images[start : start + drawn] for start in range(0, count, drawn))
  with scorer() as score:
    each, sets = score([EACH, SETS], batches, [Prompt("")] * count, 3)
  np.testing.assert_allclose(each.scores, values, rtol=1e-6)
  np.testing.assert_allclose(sets.scores, values.reshape(-1, 3).mean(axis=1), rtol=1e-6)
  assert each.found is None
  np.testing.assert_array_equal(sets.found, values > 0)


def test_images_are_forgotten_once_scored(monkeypatch):
  monkeypatch.setattr(metric, "_SCORED_AT_ONCE", 16)
  alive, most = weakref.WeakSet(), []

  class Batch(np.ndarray):
    """An array that can be in a set."""

    __hash__ = object.__hash__

  def drawn():
    for start in range(0, 160, 8):
      batch = pictures(160)[1][start : start + 8].copy().view(Batch)
      alive.add(batch)
      most.append(len(alive))
      yield batch

  with scorer() as score:
    score([EACH], drawn(), [Prompt("")] * 160, 1)
  assert len(most) == 20 and max(most) <= 3


def test_batches_are_of_one_size_and_leave_little_to_pad():
  images = pictures(300)[1]
  sizes = [(size, len(part)) for size, part in metric.regrouped([images], 300, 6)]
  assert sizes == [(150, 150), (150, 150)]  # 256 at once would leave 44 for the second.


def test_sets_are_whole_on_each_process(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  sizes = []
  monkeypatch.setattr(
    metric, "regrouped", lambda batches, count, unit: sizes.append(unit) or iter(())
  )
  with scorer() as score, pytest.raises(ValueError):
    score([SETS], [], [Prompt("")] * 48, 16)
  assert sizes == [32]  # 8 devices; each of two processes has a multiple of 16.


def test_large_images_are_scored_in_smaller_batches(monkeypatch):
  # 2 x 2 x 3 values of 4 bytes; 500 bytes hold 10 images, and 16 is the next multiple of 8 devices.
  monkeypatch.setattr(metric, "_BYTES_AT_ONCE", 500)
  sizes = [(size, len(images)) for size, images in metric.regrouped([pictures(40)[1]], 40, 8)]
  assert sizes == [(16, 16), (16, 16), (16, 8)]


def test_a_metric_is_compiled_once_and_leaves_the_devices():
  weight = np.full((7, 11, 13), 2.0, np.float32)
  traces = []

  def bright(params, images, features):
    traces.append(images.shape)
    return params.mean() * images.mean((1, 2, 3))

  def on_devices():
    return [x for x in jax.live_arrays() if x.shape == weight.shape]

  reward = JaxReward("bright", bright, params=weight)
  images = np.full((8, 2, 2, 3), 0.25, np.float32)
  with scorer() as score:
    for light in (1.0, 2.0):
      (measured,) = score([reward], [light * images], [Prompt("")] * 8, 1)
      np.testing.assert_allclose(measured.scores, np.full(8, 0.5 * light), rtol=1e-6)
      assert not on_devices()
  assert traces == [images.shape]


def test_what_fails_is_said_of_the_metric():
  def fails(images, prompts, metadata):
    raise ValueError("no luck")

  _, images = pictures(4)
  with scorer() as score, pytest.raises(UserError, match="^metric=m raised ValueError: no luck"):
    score([HostReward("m", fails)], [images], [Prompt("")] * 4, 1)
