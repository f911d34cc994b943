"""Measures prompt sources at full length: how fast they are made, opened and drawn from.

    python experiments/prompt_sources.py --folder=/tmp/prompts

Writes 2 million prompts with the words and lengths of such as people write (200 to 350 MB a file),
makes an ArrayRecord data set of them, and draws from each kind of source in a process of its own.
About 4 minutes of a core; experiments/prompt_sources.md has what it printed here.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time

from absl import app, flags
import numpy as np

from rlft import catalog
from rlft.data import compose, prepare, sources
from rlft.report import usage

_FOLDER = flags.DEFINE_string("folder", None, "where the files are written", required=True)
_ROWS = flags.DEFINE_integer("rows", 2_000_000, "prompts", lower_bound=1_000)
_MEASURE = flags.DEFINE_string("measure", "", "the one source to measure, in this process")

_BATCH = 256  # prompts an iteration
_DRAWN = 400  # iterations
_STYLE = (
  "highly detailed|digital painting|artstation|concept art|smooth|sharp focus|illustration|octane"
  " render|8 k|cinematic lighting|portrait|unreal engine|intricate|elegant|photorealistic"
).split("|")


def texts(rows: int) -> list[str]:
  """Prompts of 3 to 15 terms, one in ten a repetition."""
  draw = random.Random(0)
  words = [*compose.objects(), *_STYLE]
  made = [", ".join(draw.choices(words, k=draw.randint(3, 15))) for _ in range(rows * 9 // 10)]
  return made + draw.choices(made, k=rows - len(made))


def write(folder: str, rows: int) -> None:
  """Writes the same prompts as text, JSON lines, CSV and Parquet with DiffusionDB's columns."""
  import pyarrow
  from pyarrow import parquet

  made = texts(rows)
  with open(os.path.join(folder, "p.txt"), "w") as file:
    file.writelines(f"{text}\n" for text in made)
  with open(os.path.join(folder, "p.jsonl"), "w") as file:
    file.writelines(json.dumps({"prompt": text, "width": 512}) + "\n" for text in made)
  with open(os.path.join(folder, "p.csv"), "w") as file:
    file.writelines(["prompt,width\n", *(f'"{text}",512\n' for text in made)])
  count = np.arange(rows)
  table = {
    "image_name": [f"{i:08x}-1234-5678.png" for i in range(rows)],
    "prompt": made,
    "part_id": (count // 1000).astype(np.uint16),
    "seed": count.astype(np.uint32),
    "step": np.full(rows, 50, np.uint16),
    "cfg": np.full(rows, 7, np.float32),
    "sampler": np.full(rows, 8, np.uint8),
    "width": np.full(rows, 512, np.uint16),
    "height": np.full(rows, 512, np.uint16),
    "user_name": [f"{i * 7919 % 10_000:064x}" for i in range(rows)],
    "timestamp": pyarrow.array(count * 1_000_000, pyarrow.timestamp("ms", "UTC")),
    "image_nsfw": np.random.default_rng(0).random(rows, np.float32),
    "prompt_nsfw": np.random.default_rng(1).random(rows, np.float32),
  }
  parquet.write_table(pyarrow.table(table), os.path.join(folder, "p.parquet"))


def measure(spec: str, folder: str) -> str:
  """A row of the table: opening, hashing and drawing from one source in this folder."""
  before = time.perf_counter(), time.process_time(), _peak()
  source = catalog.load_prompts(spec)
  sources.digest(source)
  sources.drawn(source, 0, 0, 0, count=_BATCH)
  opened, opened_cpu = time.perf_counter() - before[0], time.process_time() - before[1]
  start, start_cpu = time.perf_counter(), time.process_time()
  for iteration in range(1, 1 + _DRAWN):
    sources.drawn(source, 0, 0, iteration, count=_BATCH)
  drawn = _DRAWN * _BATCH
  wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
  return (
    f"| {spec.replace(folder + os.sep, '')} | {len(source):,} | {opened:.2f} ({opened_cpu:.2f})"
    f" | {drawn / wall:,.0f} ({drawn / cpu:,.0f}) | {1e3 * wall / _DRAWN:.1f}"
    f" | {before[2]:.0f} | {_peak():.0f} |"
  )


def make(output: str, source: str) -> str:
  """Makes the ArrayRecord data set."""
  start, start_cpu = time.perf_counter(), time.process_time()
  config = prepare.PrepareConfig(kind="preference", source=source, output=output)
  said = prepare.run(config, catalog.load_prompts)
  wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
  return f"{said}\nmade in {wall:.0f} s ({cpu:.0f} s of a core), {_peak():.0f} MB at most"


def _peak() -> float:
  """The most memory that this process has had, in MB."""
  return usage.peak_host_bytes() / 1e6


def _apart(folder: str, what: str) -> str:
  command = [sys.executable, __file__, f"--folder={folder}", f"--measure={what}"]
  return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def main(argv: list[str]) -> None:
  del argv
  folder = _FOLDER.value
  if _MEASURE.value:
    kind, _, what = _MEASURE.value.partition(" ")
    print(make(os.path.join(folder, "made"), what) if kind == "make" else measure(what, folder))
    return
  os.makedirs(folder, exist_ok=True)
  write(folder, _ROWS.value)
  shutil.rmtree(os.path.join(folder, "made"), ignore_errors=True)  # by this script, before
  print(_apart(folder, f"make {folder}/p.parquet"))
  print(
    "\n| source | prompts | opened, s (of a core) | prompts a second (of a core) | ms a batch of"
  )
  print(f"{_BATCH} | MB before | MB at most |\n|---|---|---|---|---|---|---|")
  names = [f"{folder}/p.{suffix}" for suffix in ("txt", "jsonl", "csv", "parquet")]
  for spec in (
    f"records:{folder}/made/train",
    "paper:composition/train",
    *names,
    f"{folder}/p.txt[heldout]",
    f"0.7*records:{folder}/made/train + 0.3*paper:composition/train",
  ):
    print(_apart(folder, f"open {spec}"), flush=True)


if __name__ == "__main__":
  app.run(main)
