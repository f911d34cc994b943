"""Rooms import down and nothing imports in a circle, as the contracts in pyproject.toml say."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def lint(directory: pathlib.Path) -> subprocess.CompletedProcess[str]:
  command = pathlib.Path(sys.executable).with_name("lint-imports")
  return subprocess.run([command, "--no-cache"], cwd=directory, capture_output=True, text=True)


def test_the_contracts_are_kept():
  done = lint(ROOT)
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
  ("module", "imported", "said"),
  [
    ("types", "models.lora", "rlft.types is not allowed to import rlft.models"),
    ("models.plain", "models.dispatch", "No cycles are allowed in rlft.models."),
    ("models.unet", "models.files.hub", "No cycles are allowed in rlft.models."),
  ],
  ids=["upwards", "between modules", "between folders"],
)
def test_an_import_that_breaks_them_is_found(tmp_path, module, imported, said):
  for source in [ROOT / "pyproject.toml", *ROOT.glob("rlft/**/*.py")]:
    copy = tmp_path / source.relative_to(ROOT)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, copy)
  with open(tmp_path / "rlft" / f"{module.replace('.', '/')}.py", "a") as file:
    file.write(f"import rlft.{imported}\n")
  done = lint(tmp_path)
  assert done.returncode == 1 and said in done.stdout, done.stdout + done.stderr
