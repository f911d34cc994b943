"""What is declared, shipped and documented is what the code needs and has."""

import ast
import configparser
import functools
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import zipfile

from absl import flags
import pytest

from rlft.config import fields
from rlft.config import flags as cli
from rlft.config.settings import Config
from rlft.parallel.join import ProcessSettings
from rlft.performance.compile.plan import PlanConfig
from rlft.run import checks

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"

# Modules that are imported inside of functions alone, where an extra is installed.
_OF_EXTRAS = {"rlft/rating/app.py", "rlft/rating/serve.py"}
# Modules whose distribution has another name.
_DISTRIBUTIONS = {
  "absl": "absl-py",
  "cv2": "opencv-python-headless",
  "open_clip": "open-clip-torch",
  "orbax": "orbax-checkpoint",
  "PIL": "pillow",
  "tensorboardx": "tensorboardX",
}
_NOT_OURS = {".git", ".venv", "build", "dist", "runs", "__pycache__"}
_TEXT = {".py", ".md", ".cfg", ".toml", ".flags", ".json", ".txt", ".html", ".ipynb", ""}


@functools.cache
def _setup() -> configparser.RawConfigParser:
  parser = configparser.RawConfigParser()
  parser.read(ROOT / "setup.cfg")
  return parser


def _requirements(section: str, option: str) -> list[str]:
  return [line for line in _setup()[section][option].splitlines() if line]


def _name(requirement: str) -> str:
  name = re.match(r"[A-Za-z0-9_.-]+", requirement)[0]
  return name.lower().replace("_", "-")


def _imports(path: pathlib.Path) -> tuple[set[str], set[str]]:
  """Third-party packages that a file needs: always (top level), and in some function only."""
  tree = ast.parse(path.read_text())
  always, sometimes = set(), set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level:
      modules = [node.module]
    else:
      continue
    packages = {module.partition(".")[0] for module in modules}
    packages -= sys.stdlib_module_names | {"rlft"}
    names = {_name(_DISTRIBUTIONS.get(package, package)) for package in packages}
    (always if node in tree.body else sometimes).update(names)
  return always, sometimes


def test_imports_are_declared():
  required = {_name(entry) for entry in _requirements("options", "install_requires")}
  extras = {
    _name(entry)
    for option in _setup()["options.extras_require"]
    for entry in _requirements("options.extras_require", option)
  }
  used = set()
  for path in [*ROOT.glob("rlft/**/*.py"), *ROOT.glob("launch/*.py")]:
    always, sometimes = _imports(path)
    if str(path.relative_to(ROOT)) in _OF_EXTRAS:
      always, sometimes = set(), always | sometimes
    used |= always
    assert always <= required, f"{path}: add {always - required} to install_requires"
    undeclared = sometimes - required - extras
    if path.name == "trl_worker.py":  # runs in an environment of its own
      script = (ROOT / "experiments" / "trl_venv.sh").read_text()
      undeclared -= set(re.findall(r"[\w-]+(?===|>=)", script))
    assert not undeclared, f"{path}: add {undeclared} to install_requires or an extra"
  assert required <= used, f"setup.cfg: nothing imports {required - used}"


def test_dependencies_have_both_bounds():
  options = [("options", "install_requires")]
  options += [("options.extras_require", extra) for extra in _setup()["options.extras_require"]]
  for section, option in options:
    for entry in _requirements(section, option):
      if _name(entry) != "rlft":  # an extra that includes another
        assert "==" in entry or (">=" in entry and "<" in entry), f"{option}: {entry}"


def test_wheel_is_complete(tmp_path):
  pytest.importorskip("setuptools")
  copy = tmp_path / "copy"
  ignored = shutil.ignore_patterns("__pycache__")
  shutil.copytree(ROOT / "rlft", copy / "rlft", ignore=ignored)
  for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
    shutil.copy(ROOT / name, copy)
  build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
  subprocess.run(
    [sys.executable, "-c", build, tmp_path], cwd=copy, check=True, capture_output=True, timeout=300
  )
  (wheel,) = tmp_path.glob("*.whl")
  with zipfile.ZipFile(wheel) as archive:
    packed = set(archive.namelist())
  expected = {
    str(path.relative_to(ROOT))
    for path in (ROOT / "rlft").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
  }
  assert expected <= packed, expected - packed
  assert {"LICENSE", "NOTICE"} <= {pathlib.Path(name).name for name in packed}


def _flagfiles() -> list[pathlib.Path]:
  return sorted(ROOT.glob("experiments/*.flags"))


def _header(path: pathlib.Path) -> tuple[str, str]:
  """Script and flagfile of the command in the header of a flagfile."""
  command = re.search(r"^#\s*python (launch/\w+\.py) --flagfile=(\S+)", path.read_text(), re.M)
  assert command, f"{path}: the header must give the command"
  return command[1], command[2]


@pytest.mark.parametrize("path", _flagfiles(), ids=lambda path: path.stem)
def test_flagfile(path, tmp_path, monkeypatch, parsed):
  monkeypatch.chdir(ROOT)
  script, flagfile = _header(path)
  assert flagfile == str(path.relative_to(ROOT))
  assert parsed[script, f"--flagfile={flagfile}"] == "parsed"
  if script == "launch/train.py":
    values = flags.FlagValues()
    cli.define(Config, flag_values=values)
    values(["train", f"--flagfile={flagfile}"])
    config = cli.read(Config, flag_values=values)
    assert config.output.workdir.startswith("runs/")
    checks.validate(fields.replace(config, workdir=str(tmp_path / "run")))


# Runs launch scripts up to where their flags are parsed. Importing one takes seconds; forks of a
# process that has imported what they all need do not.
_PARSE = """
import json, os, runpy, sys
from absl import app
import rlft.emoji.base_model, rlft.emoji.reward_training, rlft.inference.export, rlft.train

app.run = lambda main, flags_parser: flags_parser(sys.argv)
for command in json.load(sys.stdin):
  print(f"COMMAND {json.dumps(command)}", flush=True)
  if not (child := os.fork()):
    os.dup2(1, 2)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
    print("parsed", flush=True)
    os._exit(0)
  os.waitpid(child, 0)
"""


def _parse(commands: list[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
  """'parsed', or what was said instead, for each command (a script and its arguments)."""
  done = subprocess.run(
    [sys.executable, "-c", _PARSE],
    input=json.dumps(commands),
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  parts = (part.partition("\n") for part in done.stdout.split("COMMAND ")[1:])
  said = {tuple(json.loads(command)): text.strip() for command, _, text in parts}
  assert set(said) == set(commands), done.stderr
  return said


@pytest.fixture(scope="module")
def parsed():
  """What is said of every command of documents and flagfiles, and of a wrong one."""
  commands = [(script, f"--flagfile={flagfile}") for script, flagfile in map(_header, _flagfiles())]
  pages = [command for page in _pages() for command in _launches(page)]
  return _parse([*commands, *pages, _WRONG])


_WRONG = ("launch/sample.py", "--model=emoji-sd", "--promt=a dog")


def _pages() -> list[pathlib.Path]:
  return [README, *sorted((ROOT / "docs").glob("*.md"))]


def _blocks(page: pathlib.Path) -> list[str]:
  """What is in a page's blocks of commands; those in `sh` need what is not everywhere."""
  return re.findall(r"^```(?:bash|sh)\n(.*?)^```", page.read_text(), re.M | re.S)


def _launches(page: pathlib.Path) -> list[tuple[str, ...]]:
  lines = (line for block in _blocks(page) for line in block.replace("\\\n", "").splitlines())
  commands = (line.partition("python launch/")[2] for line in lines if not line.startswith("#"))
  return [tuple(shlex.split(f"launch/{command}", comments=True)) for command in commands if command]


@pytest.mark.parametrize("page", _pages(), ids=lambda page: page.stem)
def test_settings_in_documents_contradict_nothing(page, monkeypatch):
  """A flag that an algorithm does not use is refused, also one in a flagfile."""
  monkeypatch.chdir(ROOT)
  for script, *arguments in _launches(page):
    if script == "launch/train.py":
      values = flags.FlagValues()
      for kind in (Config, ProcessSettings, PlanConfig):
        cli.define(kind, flag_values=values)
      values([script, *arguments])
      checks.validate_settings(cli.read(Config, flag_values=values))


def test_readme_has_its_two_commands():
  install = [block for block in _blocks(README) if "venv" in block]
  assert len(install) == 2
  run, test = install
  assert len(run.splitlines()) == len(test.splitlines()) == 1
  assert "python launch/train.py --flagfile=experiments/emoji_joint.flags" in run
  assert "pytest" in test and "[test]" in test


def test_every_launcher_is_documented():
  commands = [command for page in _pages() for command in _launches(page)]
  documented = {script for script, *_ in [*commands, *map(_header, _flagfiles())]}
  assert documented == {f"launch/{path.name}" for path in (ROOT / "launch").glob("*.py")}


def test_readme_commands(parsed):
  commands = _launches(README)
  said = {command: parsed[command] for command in commands}
  assert said == dict.fromkeys(commands, "parsed")
  # The check itself sees mistakes.
  assert parsed[_WRONG] == "error: unknown flag --promt: did you mean --prompt?"


@pytest.mark.parametrize("page", _pages()[1:], ids=lambda page: page.stem)
def test_commands_of_a_page(page, parsed):
  commands = _launches(page)
  assert {command: parsed[command] for command in commands} == dict.fromkeys(commands, "parsed")


_DOCUMENTS = [*_pages(), ROOT / "CHANGELOG.md", ROOT / "BUILD_NOTES.md"]


@pytest.mark.parametrize("page", _DOCUMENTS, ids=lambda page: page.stem)
def test_documents_name_files_that_exist(page):
  text, name = page.read_text(), page.name
  paths = re.findall(r"\b(?:rlft|launch|experiments|tests|docs)/[\w./-]*\w\b/?", text)
  missing = sorted({path for path in paths if not (ROOT / path).exists()})
  assert not missing, f"{name} speaks of {missing}"


def test_no_placeholders_and_no_paths_of_a_machine():
  placeholder = re.compile(r"\b(TB" + r"D|TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
  machine = re.compile(r"(?<![\w.:/~-])/(work|root|mnt|Users)/\w")
  found = []
  for path in sorted(ROOT.rglob("*")):
    inner = path.relative_to(ROOT)
    if not path.is_file() or path.suffix not in _TEXT or _NOT_OURS & set(inner.parts):
      continue
    if any(part.endswith(("_cache", ".egg-info", "-sd")) for part in inner.parts):
      continue
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
      if '"image/png": "' in line:
        continue  # A notebook's pictures have any letters.
      if placeholder.search(line) or machine.search(line):
        found.append(f"{inner}:{number}: {line.strip()[:100]}")
  assert not found, "\n".join(found)


def test_ci_runs_the_readme_command():
  script = ROOT / ".ci" / "run"
  assert os.access(script, os.X_OK)
  extract = re.search(r"^command=\$\((awk .*?)\)$", script.read_text(), re.M | re.S)[1]
  found = subprocess.run(
    ["bash", "-c", extract], cwd=ROOT, capture_output=True, text=True, check=True
  )
  (block,) = [block for block in _blocks(README) if "pytest" in block]
  assert found.stdout == block


def test_the_map_is_the_tree():
  """The README's map has every room and no other, and the files that it names are there."""
  layout = README.read_text().partition("## Layout")[2].split("```")[1]
  rooms = re.findall(r"^  (\w+(?:/|\.py)) ", layout, flags=re.MULTILINE)
  found = [path for path in (ROOT / "rlft").iterdir() if not path.name.startswith("__")]
  assert sorted(rooms) == sorted(f"{path.name}{'/' if path.is_dir() else ''}" for path in found)
  assert len(list(found)) <= 18
  room = ""
  for line in layout.splitlines():
    room = match[1] if (match := re.match(r"  (\w+/)", line)) else room
    for name in re.findall(r"\b(\w+\.py|\w+/) \(", line) + re.findall(r"\b\w+\.py\b", line):
      assert (ROOT / "rlft" / room / name).exists() or (ROOT / "rlft" / name).exists(), name
