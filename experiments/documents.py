"""Runs every command of the documents, as a reader would copy them.

    python experiments/documents.py                      # all pages of docs/
    python experiments/documents.py docs/your_reward.md

Each page has a folder of its own. Its blocks of `bash` are run there from top to bottom, and each
block of `python` that begins with a comment with a file's name is written to that file. Trainings
last one iteration; the runs that pages read are trained first, once for all pages. Blocks of `sh`
need something that is not everywhere (an accelerator, the network, weights) and are left out. A
page ends with the first command that fails; the other pages go on, and the exit status is 1 in the
end.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
import PIL.Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.M | re.S)
_FILE = re.compile(r"# (\w+\.py)\n")
_RUN = re.compile(r"\bruns/(emoji_\w+)")  # of a flagfile of the same name
_TRAIN = "python launch/train.py --flagfile=experiments/{}.flags"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("pages", nargs="*", type=pathlib.Path, help="default: all of docs/")
  pages = parser.parse_args().pages or sorted((ROOT / "docs").glob("*.md"))
  failed = []
  with tempfile.TemporaryDirectory() as trained:
    for page in pages:
      with tempfile.TemporaryDirectory() as folder:
        prepare(pathlib.Path(folder))
        if not run_page(page.resolve(), pathlib.Path(folder), pathlib.Path(trained)):
          failed.append(page.name)
  print(f"{len(pages) - len(failed)} of {len(pages)} pages" + f"; not {failed}" * bool(failed))
  sys.exit(bool(failed))


def prepare(folder: pathlib.Path) -> None:
  """Puts into a folder what the pages speak of: a model, pictures with captions, prompts."""
  for name in ("launch", "experiments"):
    (folder / name).symlink_to(ROOT / name)
  shutil.copytree(ROOT / "rlft" / "emoji" / "data" / "emoji-sd", folder / "path" / "to" / "model")
  pictures = folder / "path" / "to" / "images"
  pictures.mkdir()
  captions = []
  for number in range(8):
    noise = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(pictures / f"{number}.png")
    captions.append(json.dumps({"file_name": f"{number}.png", "text": "a dog"}))
  (pictures / "metadata.jsonl").write_text("\n".join(captions))
  (folder / "prompts.txt").write_text("a dog\na cat near a tree\na bus and a bell\na bird\n")


def run_page(page: pathlib.Path, folder: pathlib.Path, trained: pathlib.Path) -> bool:
  """Runs a page's commands in a prepared folder; False if one failed.

  Args:
    page: the document.
    folder: where its commands are run.
    trained: where the runs that pages read are kept, since several read the same.
  """
  found = commands(page.read_text(), folder)
  for name in dict.fromkeys(_RUN.findall("\n".join(found))):
    if not (trained / name).exists():
      if not _run(page.name, _one_iteration(_TRAIN.format(name)), folder):
        return False
      shutil.copytree(folder / "runs" / name, trained / name)
    else:
      shutil.copytree(trained / name, folder / "runs" / name)
  return all(_run(page.name, command, folder) for command in found)


def _run(page: str, command: str, folder: pathlib.Path) -> bool:
  start = time.monotonic()
  done = subprocess.run(
    ["bash", "-euo", "pipefail", "-c", command],
    cwd=folder,
    env=_environment(),
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  print(f"{page}: {time.monotonic() - start:5.1f} s  {command}", flush=True)
  if done.returncode:
    print(f"{done.stdout}exit code {done.returncode}", flush=True)
  return not done.returncode


def commands(text: str, folder: pathlib.Path) -> list[str]:
  """The commands of a page, whose files are written into the folder."""
  found = []
  for language, block in _BLOCK.findall(text):
    if language == "bash":
      lines = block.replace("\\\n", "").splitlines()
      found += [_one_iteration(line) for line in lines if line and not line.startswith("#")]
    elif name := _FILE.match(block):
      (folder / name[1]).write_text(block)
  return found


def _one_iteration(command: str) -> str:
  return f"{command} --iterations=1" if "launch/train.py" in command else command


def _environment() -> dict[str, str]:
  cache = pathlib.Path(tempfile.gettempdir()) / f"rlft-documents-{os.getuid()}"
  return os.environ | {
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
  }


if __name__ == "__main__":
  main()
