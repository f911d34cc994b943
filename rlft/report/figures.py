"""Charts as SVG files of their own, for Markdown; the report's are parts of its page."""

from collections.abc import Sequence
import html

from rlft.report import charts
from rlft.report.charts import Series

_TITLE = 22  # height above a panel
_LABEL = 14  # below a panel
_ENTRY = 16  # of the legend
_STYLE = (
  "text{font:11px system-ui,sans-serif;fill:#555}.g{stroke:#e4e4e4}"
  ".t{font-size:13px;font-weight:600;fill:#1c1c1c}"
)


def svg(
  panels: Sequence[tuple[str, Sequence[Series]]],
  *,
  x_label: str | Sequence[str],
) -> str:
  """Line charts side by side, each with its legend below.

  Args:
    panels: titles and what is drawn under them.
    x_label: below each, or a list with each one's own.

  Returns:
    The content of an SVG file.
  """
  labels = [x_label] * len(panels) if isinstance(x_label, str) else x_label
  entries = max(len(series) for _, series in panels)
  width = charts.WIDTH * len(panels)
  height = _TITLE + charts.HEIGHT + _LABEL + _ENTRY * entries + 6
  drawn = [
    f'<g transform="translate({i * charts.WIDTH} {_TITLE})">{_panel(*panel, label)}</g>'
    for i, (panel, label) in enumerate(zip(panels, labels, strict=True))
  ]
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
    f' viewBox="0 0 {width} {height}"><style>{_STYLE}</style>'
    f'<rect width="100%" height="100%" fill="#fff"/>{"".join(drawn)}</svg>\n'
  )


def _panel(title: str, series: Sequence[Series], x_label: str) -> str:
  below = charts.HEIGHT + _LABEL - 8
  parts = [
    f'<text class="t" x="8" y="-6">{html.escape(title)}</text>',
    charts.lines(series),
    f'<text x="{charts.WIDTH // 2}" y="{below}" text-anchor="middle">{html.escape(x_label)}</text>',
  ]
  for i, (color, one) in enumerate(zip(charts.colors(len(series)), series, strict=True)):
    y = charts.HEIGHT + _LABEL + _ENTRY * i
    parts.append(f'<rect x="52" y="{y}" width="10" height="10" fill="{color}"/>')
    parts.append(f'<text x="68" y="{y + 9}">{html.escape(one.name)}</text>')
  return "".join(parts)
