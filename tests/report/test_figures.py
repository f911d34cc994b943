"""Charts as files of their own."""

from xml.etree import ElementTree

import numpy as np

from rlft.report import charts, figures

SVG = "{http://www.w3.org/2000/svg}"


def test_panels_with_legends():
  x = np.arange(4)
  one = charts.Series("a <b>", x, x * 1.0, x - 1.0, x + 1.0)
  other = charts.Series("c", x, 2.0 * x)
  text = figures.svg([("first & second", [one, other]), ("third", [one])], x_label="images")
  root = ElementTree.fromstring(text)
  panels = root.findall(f"{SVG}g")
  assert int(root.get("width")) == 2 * charts.WIDTH and len(panels) == 2
  words = [[node.text for node in panel.iter(f"{SVG}text")] for panel in panels]
  assert {"first & second", "images", "a <b>", "c"} <= set(words[0])
  assert "third" in words[1] and "c" not in words[1]
  strokes = [[p for p in panel.iter(f"{SVG}path") if p.get("stroke")] for panel in panels]
  assert [len(found) for found in strokes] == [2, 1]
