"""What experiments/scaling.py predicts, by hand for a program whose numbers are round."""

import experiment_cases
import pytest

from rlft.performance.compile.chips import Chip


@pytest.fixture(scope="module")
def scaling():
  with experiment_cases.script("scaling") as module:
    yield module


def program(**changes):
  return {"flops": 0, "moved": 0, "gathered": 0, "scattered": 0, "summed": 0, "arrays": 0} | changes


def test_computing_and_sending(scaling):
  gpu = Chip(flops=100, memory=1, memory_rate=1, link_rate=70, network_rate=7)
  # 400 / (100 x 0.4); 7/8 of what is gathered and scattered, over links of 70.
  found = scaling.seconds({"a": program(flops=400, gathered=800, scattered=80)}, gpu, 8)
  assert found == pytest.approx((10, 880 * 7 / 8 / 70, 880 * 7 / 8))
  # Of 16 chips two hold the same shard: 2 x 80/8 x 1/2 over the network.
  computing, sending, sent = scaling.seconds({"a": program(scattered=80)}, gpu, 16)
  assert (computing, sent) == pytest.approx((0, 70 + 10))
  assert sending == pytest.approx(70 / 70 + 10 / 7, rel=1e-4)


def test_a_program_takes_as_long_as_what_it_has_most_of(scaling):
  chip = Chip(flops=100, memory=1, memory_rate=10, link_rate=1)
  both = {"products": program(flops=400, moved=90), "memory": program(flops=40, moved=70)}
  computing, _, _ = scaling.seconds(both, chip, 8)
  assert computing == pytest.approx(400 / 40 + 70 / 10)


def test_a_torus_has_a_third_of_its_links_along_an_axis(scaling):
  tpu = Chip(flops=1, memory=1, memory_rate=1, link_rate=300)
  _, sending, sent = scaling.seconds({"a": program(summed=80)}, tpu, 16)
  assert sent == pytest.approx(2 * 80 * 7 / 8 + 2 * 80 / 2)
  assert sending == pytest.approx(140 / 100 + 80 / 200, rel=1e-4)


def test_messages_take_time_however_small(scaling):
  gpu = Chip(flops=1, memory=1, memory_rate=1, link_rate=1, network_rate=1)
  for chips, doublings in ((8, 0), (16, 1), (1024, 7)):
    _, sending, _ = scaling.seconds({"a": program(arrays=10, scattered=1e-9)}, gpu, chips)
    assert sending == pytest.approx(10 * 7 * 1e-6 + 2 * doublings * 5e-6, rel=1e-3)


def test_axes_change_one_thing(scaling):
  for axis, points in scaling.AXES.items():
    values = [getattr(point, axis) for point in points]
    assert values == sorted(set(values))
    for point in points:
      assert scaling.dataclasses.replace(point, **{axis: values[0]}) == points[0]
      assert point.images % (point.tasks * point.devices) == 0
      assert point.devices % point.processes == 0
