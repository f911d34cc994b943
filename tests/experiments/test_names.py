"""Names that the experiments take from the tests are there, also those that no test calls."""

import ast
import importlib

import experiment_cases
import pytest

SCRIPTS = sorted((experiment_cases.ROOT / "experiments").glob("*.py"))


def taken(text: str) -> set[tuple[str, str]]:
  """(module, name) of all attributes of modules called `..._cases` that a script imports."""
  tree = ast.parse(text)
  modules = {
    alias.asname or alias.name: alias.name
    for node in ast.walk(tree)
    if isinstance(node, ast.Import)
    for alias in node.names
    if alias.name.endswith("_cases")
  }
  return {
    (modules[node.value.id], node.attr)
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute)
    and isinstance(node.value, ast.Name)
    and node.value.id in modules
  }


def test_the_check_sees_names():
  assert taken("import a_cases as c\nimport os\nc.x(os.y)") == {("a_cases", "x")}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_names_are_there(script):
  missing = [
    f"{module}.{name}"
    for module, name in taken(script.read_text())
    if not hasattr(importlib.import_module(module), name)
  ]
  assert not missing
