"""Renders the templates of this folder; whatever is put into HTML is escaped."""

import base64
import hashlib
from typing import Any

import jinja2

_LOADER = jinja2.PackageLoader("rlft.report", "templates")
_TEMPLATES = jinja2.Environment(
  loader=_LOADER,
  autoescape=jinja2.select_autoescape(["html"]),
  undefined=jinja2.StrictUndefined,
  trim_blocks=True,
  lstrip_blocks=True,
)


def render(template: str, **values: Any) -> str:
  """The text of a template; a value that it needs and did not get is an error."""
  return _TEMPLATES.get_template(template).render(**values)


def source_of(name: str) -> str:
  """A file of the templates as it is."""
  return _LOADER.get_source(_TEMPLATES, name)[0]


def hash_of(name: str) -> str:
  """What a page's Content-Security-Policy says of a script in it, by which alone it may run."""
  digest = hashlib.sha256(source_of(name).encode()).digest()
  return f"sha256-{base64.b64encode(digest).decode()}"


_TEMPLATES.globals |= {"source_of": source_of, "hash_of": hash_of}
