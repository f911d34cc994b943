from xml.etree import ElementTree

import numpy as np
import pytest

from rlft.report import charts


def picture(figure):
  """The parsed SVG of a figure."""
  return ElementTree.fromstring(figure[figure.index("<svg") : figure.index("</svg>") + 6])


def curves(figure):
  """The points of every drawn line, as (x, y) in the picture's units."""
  return [
    [tuple(map(float, pair.split())) for pair in path.get("d")[1:].replace("M", "L").split("L")]
    for path in picture(figure).iter("path")
    if path.get("stroke") and path.get("d")
  ]


def test_line_is_drawn_to_scale():
  line = charts.Series("a", np.array([0, 1, 3]), np.array([0.0, 1.0, 0.5]))
  ((first, second, third),) = curves(charts.line_chart("title", [line]))
  assert second[0] - first[0] == pytest.approx((third[0] - first[0]) / 3, abs=0.1)
  assert first[1] - third[1] == pytest.approx((first[1] - second[1]) / 2, abs=0.1)
  assert second[1] < first[1]  # upwards


def test_nan_leaves_a_gap():
  line = charts.Series("a", np.arange(5), np.array([1, 2, np.nan, 2, 1.0]))
  figure = charts.line_chart("title", [line])
  path = next(path for path in picture(figure).iter("path") if path.get("stroke"))
  assert path.get("d").count("M") == 2 and path.get("d").count("L") == 2


def test_logarithmic_axis_holds_zero():
  line = charts.Series("a", np.arange(3), np.array([0.0, 1e-8, 1e-6]))
  ((zero, middle, top),) = curves(charts.line_chart("t", [line], log_floor=1e-9))
  # 1e-9, 1e-8 and 1e-6 are at 0, 1 and 3 decades.
  assert zero[1] - middle[1] == pytest.approx((zero[1] - top[1]) / 3, abs=0.1)


def test_long_series_are_thinned():
  values = np.zeros(10_000)
  values[1234] = 1.0
  line = charts.Series("a", np.arange(10_000), values)
  for peaks in (False, True):
    ((*points,),) = curves(charts.line_chart("t", [line], peaks=peaks))
    assert len(points) <= 240
  # The single peak is kept whole: it touches the top where the axis ends at 1.06.
  heights = [y for _, y in points]
  assert min(heights) < 30 < max(heights)


def test_two_scales():
  left = charts.Series("reward", np.arange(3), np.array([5.0, 6.0, 7.0]))
  right = charts.Series("judge", np.arange(3), np.array([500.0, 700.0, 600.0]))
  for flip in (False, True):
    figure = charts.two_scale_chart("t", left, right, flip=flip)
    (start, _, end), (low, high, between) = curves(figure)
    # Each uses the whole height: the smallest and largest are where those of the other are.
    assert (low[1], high[1]) == pytest.approx((end[1], start[1]) if flip else (start[1], end[1]))
    assert between[1] == pytest.approx((low[1] + high[1]) / 2, abs=0.1)
    # Labels of the right scale are right of the curves, in the colour of the second.
    labels = {
      text.text: text
      for text in picture(figure).iter("text")
      if "#d55e00" in str(text.get("style"))
    }
    assert {"500", "600", "700"} <= labels.keys()
    assert all(float(text.get("x")) > end[0] for text in labels.values())


def test_smoothing_draws_the_mean_over_the_values():
  values = np.tile([0.0, 1.0], 50)
  faint, bold = curves(
    charts.line_chart("t", [charts.Series("", np.arange(100), values)], smooth=True)
  )
  spread = [max(y for _, y in line) - min(y for _, y in line) for line in (faint, bold)]
  assert spread[1] < 0.3 * spread[0]


@pytest.mark.parametrize(
  "values", [[3.0], [0.0, 0.0], [-2.0, -2.0], [np.nan, np.nan], [1e-12, 2e9]]
)
def test_degenerate_values_are_drawn(values):
  line = charts.Series("a<b", np.arange(len(values)), np.array(values))
  for figure in (charts.line_chart("t<&", [line]), charts.stacked_chart("t<&", [line, line])):
    picture(figure)  # well-formed
    assert "nan" not in figure.split("legend")[0] and "<b>" not in figure.split("legend")[0]
    assert "t&lt;&amp;" in figure and "a&lt;b" in figure


def test_stacked_areas_add_up():
  x, ones = np.arange(3), np.ones(3)
  figure = charts.stacked_chart("t", [charts.Series("a", x, ones), charts.Series("b", x, 2 * ones)])
  bands = [path.get("d") for path in picture(figure).iter("path") if path.get("fill-opacity")]
  heights = []
  for band in bands:
    ys = [float(pair.split()[1]) for pair in band[1:-1].split("L")]
    heights.append(max(ys) - min(ys))
  assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)


def test_band_is_drawn_where_there_are_bounds():
  y = np.array([1.0, 2.0])
  figure = charts.line_chart("t", [charts.Series("a", np.array([0, 9]), y, y - 1, y + 1)])
  assert figure.count("fill-opacity") == 1
  assert figure.count("<title>") == 2 and "<title>9: 2</title>" in figure


def test_ticks_are_round_numbers():
  np.testing.assert_allclose(charts._ticks(0.0, 1.0, 5), [0, 0.2, 0.4, 0.6, 0.8, 1.0])
  np.testing.assert_allclose(charts._ticks(-0.52, 0.11, 5), [-0.4, -0.2, 0.0])
