"""Which entries an iteration sees."""

import numpy as np
import pytest

from rlft.data import shuffle as order


def test_every_entry_once_per_epoch():
  # 5 iterations of 4 are two epochs of 10; iteration 2 spans both.
  seen = np.concatenate([order.batch_indices(0, 0, i, count=4, size=10) for i in range(5)])
  assert seen.dtype == np.int64
  assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
  assert seen[:10].tolist() != seen[10:].tolist()


def test_a_batch_may_be_larger_than_the_list():
  assert sorted(order.batch_indices(0, 0, 3, count=9, size=3)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
  assert order.batch_indices(0, 0, 7, count=2, size=1).tolist() == [0, 0]


def test_a_pure_function_of_seed_stream_and_iteration():
  def batch(seed, stream, iteration):
    return order.batch_indices(seed, stream, iteration, count=8, size=100).tolist()

  first = batch(5, 1, 3)
  batch(5, 1, 40)  # another epoch in between
  assert batch(5, 1, 3) == first
  assert first not in (batch(6, 1, 3), batch(5, 2, 3), batch(5, 1, 4))
  # The sequence of entries does not depend on how it is cut into iterations.
  halves = [order.batch_indices(5, 1, i, count=4, size=100) for i in (6, 7)]
  assert np.concatenate(halves).tolist() == first


def test_a_permutation_is_made_once_however_many_lists_there_are(monkeypatch):
  made, permutation = [], order._permutation

  def counted(*args):
    made.append(args)
    return permutation(*args)

  monkeypatch.setattr(order, "_permutation", counted)
  for iteration in range(5):
    for stream in range(100, 120):
      order.batch_indices(7, stream, iteration, count=4, size=20)
      order.subset(7, 200 + stream, iteration, count=2, size=5)
  assert len([args for args in made if args[1] < 200]) == 20


def test_the_order_is_the_same_in_every_version():
  assert order.batch_indices(0, 0, 0, count=10, size=10).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]


def test_an_empty_list_is_refused():
  with pytest.raises(ValueError, match="at least one entry"):
    order.batch_indices(0, 0, 0, count=1, size=0)


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 1_000])
def test_a_permutation_that_is_not_held_has_every_entry_once(monkeypatch, size):
  monkeypatch.setattr(order, "_HELD", 0)
  first, second = (order.batch_indices(3, 1, i, count=size, size=size) for i in (0, 1))
  assert sorted(first) == sorted(second) == list(range(size))
  if size > 60:
    assert first.tolist() != second.tolist()
    assert abs(np.corrcoef(first, np.arange(size))[0, 1]) < 0.4
  # Cut in another way, it is the same.
  ones = [order.batch_indices(3, 1, i, count=1, size=size) for i in range(min(size, 70))]
  assert np.concatenate(ones).tolist() == first[:70].tolist()


def test_a_list_beyond_any_memory():
  drawn = order.batch_indices(0, 0, 5, count=4, size=10**12)
  assert drawn.tolist() == [992146287285, 415419357654, 625015981539, 503086024482]
