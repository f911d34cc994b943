"""Runs every command of the documents, as a reader would copy them.

    python experiments/documents.py                      # all pages of docs/
    python experiments/documents.py docs/your_reward.md

In a folder of its own, each page's blocks of `bash` are run from top to bottom, and its blocks of
`python` that begin with a comment of a file's name are written to that file. Trainings last one
iteration. What stands in `sh` needs what is not everywhere (an accelerator, the network, weights)
and is left out. The first command that fails ends it, with what it said.
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


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("pages", nargs="*", type=pathlib.Path, help="default: all of docs/")
  pages = parser.parse_args().pages or sorted((ROOT / "docs").glob("*.md"))
  for page in pages:
    with tempfile.TemporaryDirectory() as folder:
      prepare(pathlib.Path(folder))
      run_page(page.resolve(), pathlib.Path(folder))


_TRAINED = "python launch/train.py --flagfile=experiments/emoji_joint.flags"  # runs/emoji_joint


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


def run_page(page: pathlib.Path, folder: pathlib.Path) -> None:
  """Runs a page's commands in a prepared folder."""
  cache = pathlib.Path(tempfile.gettempdir()) / f"rlft-documents-{os.getuid()}"
  env = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
  }
  whole = page.read_text()
  blocks = [("bash", _TRAINED)] if "=runs/emoji_joint" in whole else []
  for language, text in blocks + _BLOCK.findall(whole):
    if language == "python":
      if found := _FILE.match(text):
        (folder / found[1]).write_text(text)
      continue
    for line in text.replace("\\\n", "").splitlines():
      if not line or line.startswith("#"):
        continue
      command = f"{line} --iterations=1" if "launch/train.py" in line else line
      start = time.monotonic()
      done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
      if done.returncode:
        sys.exit(f"{page.name}: {command}\n{done.stdout}exit code {done.returncode}")
      print(f"{page.name}: {time.monotonic() - start:5.1f} s  {command}", flush=True)


if __name__ == "__main__":
  main()
