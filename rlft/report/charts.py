"""Line charts as inline SVG, for a page that loads nothing from elsewhere."""

from collections.abc import Sequence
import dataclasses
import html
import math

import numpy as np

# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
WIDTH, HEIGHT = 400, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 8, 24
_MAX_POINTS = 240  # more would overlap at this width, and make a long run's page heavy
_MARKED_POINTS = 30  # up to this many points are drawn as dots with a tooltip


@dataclasses.dataclass(frozen=True)
class Series:
  """A curve.

  Attributes:
    name: for the legend; empty if the chart's title says it.
    x: `[N]`, increasing.
    y: `[N]`; NaN leaves a gap.
    low, high: `[N]` bounds of a band around `y`, or None.
  """

  name: str
  x: np.ndarray
  y: np.ndarray
  low: np.ndarray | None = None
  high: np.ndarray | None = None


def line_chart(
  title: str,
  series: Sequence[Series],
  *,
  log_floor: float | None = None,
  smooth: bool = False,
  peaks: bool = False,
  hint: str = "",
) -> str:
  """A chart with a line, and a band where there are bounds, for each series.

  Args:
    title: above the chart.
    series: at least one.
    log_floor: makes the vertical axis logarithmic; smaller values, 0 too, are drawn at this one.
    smooth: draw the values of a long series faint, and their moving average over a tenth of the
      range on top.
    peaks: where points are too many and are merged, show their maximum instead of their mean.
    hint: how to read it, below.

  Returns:
    An HTML figure.
  """
  content = lines(series, log_floor=log_floor, smooth=smooth, peaks=peaks)
  return _figure(title, content, [(one.name, _last(_thin(one, peaks).y)) for one in series], hint)


def lines(
  series: Sequence[Series],
  *,
  log_floor: float | None = None,
  smooth: bool = False,
  peaks: bool = False,
) -> str:
  """What is drawn of a `line_chart`: SVG elements in a picture of `WIDTH` by `HEIGHT`."""
  drawn = [_thin(one, peaks) for one in series]
  values = [a for one in drawn for a in (one.y, one.low, one.high) if a is not None]
  axes = _Axes.around([one.x for one in drawn], values, log_floor)
  parts = [axes.draw()]
  for color, one in zip(colors(len(drawn)), drawn, strict=True):
    if one.low is not None and one.high is not None:
      parts.append(axes.band(one.x, one.low, one.high, color, 0.18))
    parts.append(_curve(axes, one, color, smooth))
  return "".join(parts)


def two_scale_chart(title: str, left: Series, right: Series, *, flip: bool = False) -> str:
  """A chart of two curves, each on its own scale: the first at the left, the second at the right.

  Args:
    title: above the chart.
    left: a series with a name; drawn as in a smooth `line_chart`.
    right: another.
    flip: draw the right scale upside down, for what is better where it is less.

  Returns:
    An HTML figure.
  """
  drawn = [_thin(left), _thin(right)]
  parts, pair = [], colors(2)
  for place, (color, one) in enumerate(zip(pair, drawn, strict=True)):
    axes = _Axes.around([one.x for one in drawn], [one.y], None)
    axes = dataclasses.replace(axes, right=_LEFT)
    if place and flip:
      axes = dataclasses.replace(axes, y_low=axes.y_high, y_high=axes.y_low)
    parts.append(axes.draw_right(color) if place else axes.draw(color))
    parts.append(_curve(axes, one, color, smooth=True))
  return _figure(title, "".join(parts), [(one.name, _last(one.y)) for one in drawn])


def stacked_chart(title: str, series: Sequence[Series]) -> str:
  """A chart of areas on top of each other; every series has the same `x`, and NaN counts as 0.

  Args:
    title: above the chart.
    series: at least one, the first at the bottom.

  Returns:
    An HTML figure.
  """
  drawn = [_thin(one) for one in series]
  x = drawn[0].x
  tops = np.cumsum([np.nan_to_num(one.y) for one in drawn], axis=0)
  bottoms = np.concatenate([np.zeros_like(tops[:1]), tops[:-1]])
  axes = _Axes.around([x], [np.zeros(1), tops[-1]], None)
  bands = [
    axes.band(x, low, high, color, 0.75)
    for color, low, high in zip(colors(len(drawn)), bottoms, tops, strict=True)
  ]
  return _figure(title, axes.draw() + "".join(bands), [(one.name, _last(one.y)) for one in series])


@dataclasses.dataclass(frozen=True)
class _Axes:
  """Maps values to places in the picture."""

  x_low: float
  x_high: float
  y_low: float  # at the bottom; the exponent of 10 on a logarithmic axis
  y_high: float  # at the top; less than `y_low` on a linear axis that is upside down
  log_floor: float | None
  right: int = _RIGHT  # margin

  @classmethod
  def around(
    cls, xs: Sequence[np.ndarray], ys: Sequence[np.ndarray], log_floor: float | None
  ) -> "_Axes":
    """Axes that hold all finite values."""
    x, y = np.concatenate(xs), np.concatenate(ys)
    y = y[np.isfinite(y)]
    if not len(y):
      y = np.array([1.0])
    if log_floor is not None:
      y = np.log10(np.maximum(y, log_floor))
      low, high = math.floor(y.min()), math.ceil(y.max())
      return cls(x.min(), max(x.max(), x.min() + 1), low, max(high, low + 1), log_floor)
    low, high = float(y.min()), float(y.max())
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    # An axis of what cannot be negative does not start below 0.
    low = max(low - margin, 0.0) if low >= 0 else low - margin
    return cls(x.min(), max(x.max(), x.min() + 1), low, high + margin, None)

  def _x(self, x: np.ndarray) -> np.ndarray:
    return _LEFT + (x - self.x_low) / (self.x_high - self.x_low) * (WIDTH - _LEFT - self.right)

  def _y(self, y: np.ndarray) -> np.ndarray:
    if self.log_floor is not None:
      y = np.log10(np.maximum(y, self.log_floor))
    share = (y - self.y_low) / (self.y_high - self.y_low)
    return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

  def draw(self, color: str = "") -> str:
    """Grid lines and their labels; those of the vertical axis in `color`."""
    parts, style = [], f' style="fill:{color}"' if color else ""
    if self.log_floor is not None:
      step = max(1, round((self.y_high - self.y_low) / 5))
      ticks = 10.0 ** np.arange(self.y_low, self.y_high + 1, step)
      labels = [f"{tick:.0e}".replace("e-0", "e-").replace("e+0", "e") for tick in ticks]
    else:
      ticks = _ticks(self.y_low, self.y_high, 5)
      labels = [f"{tick:.6g}" for tick in ticks]
    for y, label in zip(self._y(ticks), labels, strict=True):
      parts.append(f'<path class="g" d="M{_LEFT} {y:.1f}H{WIDTH - self.right}"/>')
      place = f'x="{_LEFT - 6}" y="{y + 4:.1f}"'
      parts.append(f'<text {place} text-anchor="end"{style}>{label}</text>')
    ticks = _ticks(self.x_low, self.x_high, 6)
    ticks = ticks[ticks == np.round(ticks)]  # there is no half iteration
    for x, tick in zip(self._x(ticks), ticks, strict=True):
      parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 7}" text-anchor="middle">{tick:.0f}</text>')
    return "".join(parts)

  def draw_right(self, color: str) -> str:
    """Labels of a second vertical axis, in `color`."""
    ticks = _ticks(*sorted((self.y_low, self.y_high)), 5)
    return "".join(
      f'<text x="{WIDTH - self.right + 6}" y="{y + 4:.1f}" style="fill:{color}">{tick:.6g}</text>'
      for y, tick in zip(self._y(ticks), ticks, strict=True)
    )

  def line(self, x: np.ndarray, y: np.ndarray, color: str, width: float, opacity: float = 1) -> str:
    """A line, with gaps where `y` is not finite."""
    commands, pen = [], "M"
    for px, py in zip(self._x(x), self._y(y), strict=True):
      if not math.isfinite(py):
        pen = "M"
        continue
      commands.append(f"{pen}{px:.1f} {py:.1f}")
      pen = "L"
    return (
      f'<path d="{"".join(commands)}" fill="none" stroke="{color}" stroke-width="{width}"'
      f' stroke-opacity="{opacity}" stroke-linejoin="round"/>'
    )

  def band(
    self, x: np.ndarray, low: np.ndarray, high: np.ndarray, color: str, opacity: float
  ) -> str:
    """The area between two curves, where both are finite."""
    shown = np.isfinite(low) & np.isfinite(high)
    x, low, high = self._x(x[shown]), self._y(low[shown]), self._y(high[shown])
    if not len(x):
      return ""
    outline = [*zip(x, high, strict=True), *zip(x[::-1], low[::-1], strict=True)]
    path = "L".join(f"{px:.1f} {py:.1f}" for px, py in outline)
    return f'<path d="M{path}Z" fill="{color}" fill-opacity="{opacity}"/>'

  def dots(self, one: Series, color: str) -> str:
    """The points of a short series, with their values as tooltips."""
    shown = np.isfinite(one.y)
    # A long series has none, unless it is so broken by NaN that lines would not show.
    if shown.sum() > _MARKED_POINTS:
      return ""
    x, y = one.x[shown], one.y[shown]
    return "".join(
      f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{color}">'
      f"<title>{iteration:.0f}: {value:.5g}</title></circle>"
      for px, py, iteration, value in zip(self._x(x), self._y(y), x, y, strict=True)
    )


def _curve(axes: _Axes, one: Series, color: str, smooth: bool) -> str:
  """A line with dots, or faint and with its moving average on top if it is long."""
  if smooth and len(one.x) > _MARKED_POINTS:
    average = axes.line(one.x, _moving_average(one.y), color, 2)
    return axes.line(one.x, one.y, color, 1, 0.3) + average
  return axes.line(one.x, one.y, color, 2) + axes.dots(one, color)


def _figure(title: str, content: str, legend: Sequence[tuple[str, float]], hint: str = "") -> str:
  """Puts a chart's title, picture, legend (names and last values) and hint together."""
  entries = "".join(
    f'<span><i style="background:{color}"></i>{html.escape(name or "last")}'
    f" <b>{f'{value:.4g}' if math.isfinite(value) else '–'}</b></span>"
    for color, (name, value) in zip(colors(len(legend)), legend, strict=True)
  )
  below = f'<p class="note">{html.escape(hint)}</p>' if hint else ""
  return (
    f"<figure><figcaption>{html.escape(title)}</figcaption>"
    f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
    f'{content}</svg><div class="legend">{entries}</div>{below}</figure>'
  )


def colors(count: int) -> list[str]:
  """Colours for so many curves."""
  return [_COLORS[index % len(_COLORS)] for index in range(count)]


def _last(values: np.ndarray) -> float:
  """The last finite value, or NaN."""
  finite = values[np.isfinite(values)]
  return float(finite[-1]) if len(finite) else float("nan")


def _ticks(low: float, high: float, count: int) -> np.ndarray:
  """At most `count` + 1 round numbers in [low, high], a step of 1, 2 or 5 times a power of 10."""
  raw = (high - low) / count
  power = 10.0 ** math.floor(math.log10(raw))
  step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
  ticks = np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) * step
  return ticks + 0.0  # no minus zero


def _thin(one: Series, peaks: bool = False) -> Series:
  """Means (of `y`: maxima if `peaks`) over runs of points, so that at most `_MAX_POINTS` stay."""
  run = -(-len(one.x) // _MAX_POINTS)
  if run == 1:
    return one

  def runs(values: np.ndarray) -> np.ndarray:
    padded = np.pad(values.astype(float), (0, -len(values) % run), constant_values=np.nan)
    return padded.reshape(-1, run)

  y = np.fmax.reduce(runs(one.y), axis=1) if peaks else _nanmean(runs(one.y))
  bounds = [None if bound is None else _nanmean(runs(bound)) for bound in (one.low, one.high)]
  return Series(one.name, _nanmean(runs(one.x)), y, *bounds)


def _moving_average(values: np.ndarray) -> np.ndarray:
  """Centred mean over a tenth of the points; shorter at the ends."""
  half = max(len(values) // 20, 1)
  padded = np.pad(values.astype(float), half, constant_values=np.nan)
  return _nanmean(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1))


def _nanmean(rows: np.ndarray) -> np.ndarray:
  """Mean of what is finite in each row `[N, n]` -> `[N]`; NaN if nothing is."""
  finite = np.isfinite(rows)
  counts = finite.sum(axis=1)
  sums = np.where(finite, rows, 0).sum(axis=1)
  return np.where(counts, sums / np.maximum(counts, 1), np.nan)
