"""Renders the templates of this folder to HTML; whatever is put into one is escaped."""

from typing import Any

import jinja2

_TEMPLATES = jinja2.Environment(
  loader=jinja2.PackageLoader("rlft.report", "templates"),
  autoescape=True,
  undefined=jinja2.StrictUndefined,
  trim_blocks=True,
  lstrip_blocks=True,
)


def render(template: str, **values: Any) -> str:
  """The HTML of a template; a value that it needs and did not get is an error."""
  return _TEMPLATES.get_template(template).render(**values)
