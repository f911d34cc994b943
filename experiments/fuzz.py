"""Gives rlft bad input: flagfiles, prompts, images, models and what rewards return.

    python experiments/fuzz.py --cases=10000 --seed=1

Each case is a good input that was damaged, a pure function of (seed, number). It must end in
success, or in a UserError of one line, which ends a program with status 2. What else happens is
printed with the number of its case (`--only=NUMBER` does that one again), and the status is 1.
A case takes about a hundredth of a second of a core.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import contextlib
import io
import json
import pathlib
import random
import shutil
import sys
import tempfile
import traceback
from typing import Any

from absl import app, flags
import numpy as np
from PIL import Image

_ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(_ROOT / "tests"))

import train_cases  # noqa: E402

from rlft import catalog  # noqa: E402
from rlft.config import flags as cli  # noqa: E402
from rlft.config.settings import Config  # noqa: E402
from rlft.data import pairs  # noqa: E402
from rlft.models.files import pretrained  # noqa: E402
from rlft.rewards.scoring import host  # noqa: E402
from rlft.run import checks  # noqa: E402
from rlft.types import HostReward, Prompt, Scores, UserError  # noqa: E402

_CASES = flags.DEFINE_integer("cases", 10_000, "how many", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of all cases")
_ONLY = flags.DEFINE_integer("only", None, "number of the one case to do")

_PIECES = (
  *(b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\x80", b"\r", b"\r\n", b"\n\n", b"\x0b", b"\x1a"),
  *(b'"', b'""', b",", b"\t", b"'", b"\\", b"{", b"}", b"[", b"]", b":", b"=", b"--", b"#"),
  *(b"null", b"NaN", b"Infinity", b"-1", b"1e999", b"9" * 400, b"true", b"[[[[", b'{"a":' * 2000),
  *(
    "é猫\u2028\u0085\u202e".encode(),
    b"../../../etc/passwd",
    b"/dev/null",
    b"~",
    b"%s%n",
    b"A" * 70_000,
  ),
)


def damaged(content: bytes, draw: random.Random) -> bytes:
  """The content with one to four mistakes."""
  for _ in range(draw.randint(1, 4)):
    at, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    how = draw.randrange(7)
    if how == 0:
      content = content[:at]
    elif how == 1:
      content = content[:at] + content[end:]
    elif how == 2:
      content = content[:at] + content[at:end] + content[at:]
    elif how == 3 and content:
      at = draw.randrange(len(content))
      content = content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]
    elif how == 4:
      content = content[:at] + draw.randbytes(draw.randint(1, 64)) + content[at:]
    else:
      content = content[:at] + draw.choice(_PIECES) + content[at:]
  return content


# ---------------------------------------------------------------------------- kinds of input


def flagfile(folder: pathlib.Path, draw: random.Random) -> None:
  """A file of flags, read as launch/train.py reads it, and the checks of settings."""
  good = draw.choice(sorted((_ROOT / "experiments").glob("*_*.flags"))).read_bytes()
  path = folder / "a.flags"
  path.write_bytes(damaged(good, draw))
  values = flags.FlagValues()
  cli.define(Config, flag_values=values)
  printed = io.StringIO()
  try:
    with contextlib.redirect_stderr(printed):
      cli.parse(["train.py", f"--flagfile={path}"], flag_values=values)
  except SystemExit as end:
    assert end.code == 2, end
    raise UserError(printed.getvalue().removesuffix("\n")) from end
  checks.validate_settings(cli.read(Config, flag_values=values))


_TEXT = "a dog\na cat, two dogs\n\nein Käfer über dem 猫\n" + "long " * 50 + "\n"
_ROWS = [{"prompt": text, "objects": ["dog"], "n": 1} for text in _TEXT.splitlines() if text]
_JSON = "\n".join(json.dumps(row) for row in _ROWS)
_CSV = 'id,prompt,n\n1,a dog,2\n2,"a cat, two ""dogs""",3\n3,"two\nlines",4\n'
_PROMPTS = {
  "txt": _TEXT,
  "jsonl": _JSON,
  "csv": _CSV,
  "tsv": _CSV.replace(",", "\t"),
  "parquet": _TEXT,
  "unknown": _TEXT,
}


def prompts(folder: pathlib.Path, draw: random.Random) -> None:
  """A file of prompts, opened and read."""
  suffix = draw.choice(list(_PROMPTS))
  encoding = draw.choice(("utf-8", "utf-8", "utf-8", "utf-16", "latin-1"))
  path = folder / f"prompts.{suffix}"
  path.write_bytes(damaged(_PROMPTS[suffix].encode(encoding, "replace"), draw))
  part = draw.choice(("", "", "", "[:-1]", "[1:]", "[heldout]", "?column=n", "?column=x", "[::]"))
  found = catalog.load_prompts(f"{path}{part}")
  for row in {0, len(found) // 2, len(found) - 1}:
    prompt = found[row]
    assert isinstance(prompt.text, str) and prompt.text.strip(), prompt
    json.dumps(prompt.metadata)
  found.digest() if hasattr(found, "digest") else None


def _picture(draw: random.Random) -> tuple[bytes, str]:
  """An image of any kind, in any format."""
  pixels = np.random.RandomState(draw.randrange(9)).randint(0, 256, (7, 5, 4)).astype(np.uint8)
  mode = draw.choice(("L", "LA", "P", "RGB", "RGBA", "CMYK", "1", "I", "I;16", "F", "YCbCr"))
  if mode in ("I", "I;16", "F"):
    image = Image.fromarray((pixels[..., 0].astype(np.uint16) * 257).astype(np.uint16))
    image = image if mode == "I;16" else image.convert("I").convert(mode)
  else:
    image = Image.fromarray(pixels, "RGBA").convert("RGB").convert(mode)
  options: dict[str, Any] = {}
  if draw.random() < 0.3:
    exif = Image.Exif()
    exif[0x0112] = draw.randrange(10)
    options["exif"] = exif
  if draw.random() < 0.2:
    options |= {"save_all": True, "append_images": [image, image]}
  file = io.BytesIO()
  kind = draw.choice(("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO"))
  with contextlib.suppress(OSError, ValueError, KeyError):
    image.save(file, kind, **options)
  return file.getvalue() or b"", kind.lower()


def images(folder: pathlib.Path, draw: random.Random) -> None:
  """Images with captions, for pretraining."""
  content, suffix = _picture(draw)
  if draw.random() < 0.7:
    content = damaged(content, draw)
  if draw.random() < 0.05:  # A small file that says it is huge.
    bomb = io.BytesIO()
    Image.new("1", (1, 1)).save(bomb, "PNG")
    content = bomb.getvalue().replace(b"\0\0\0\1\0\0\0\1", b"\0\2\0\0\0\2\0\0", 1)
  (folder / f"0.{suffix}").write_bytes(content)
  listing = json.dumps({"file_name": f"0.{suffix}", "text": "a dog"}).encode() + b"\n"
  if draw.random() < 0.3:
    listing = damaged(listing, draw)
  (folder / "metadata.jsonl").write_bytes(listing)
  found = pairs.load_folder(str(folder), size=(4, 4))
  assert all(isinstance(caption, str) for caption in found.captions)
  pixels, sources = found.read([0])
  assert pixels.shape == (1, 4, 4, 3) and sources.shape == (1, 4)


_ODD = (None, True, 0, -1, 1.5, 1e308, "", "x", [], [0], {}, "../../x", 10**12, [[1]], ["A"] * 9)


def _odd_json(content: bytes, draw: random.Random) -> bytes:
  """A JSON object of which some values, at any depth, are none of theirs, or not there."""
  data = json.loads(content)
  for _ in range(draw.randint(1, 3)):
    where = data
    while isinstance(where, dict) and where:
      key = draw.choice(sorted(where))
      if not isinstance(where[key], dict) or not where[key] or draw.random() < 0.2:
        if draw.random() < 0.3:
          del where[key]
        else:
          where[key] = draw.choice(_ODD)
        break
      where = where[key]
  return json.dumps(data).encode()


def model(folder: pathlib.Path, draw: random.Random) -> None:
  """A model's directory."""
  target = folder / "model"
  shutil.copytree(_model(), target)
  files = sorted(path for path in target.rglob("*") if path.is_file())
  for path in draw.sample(files, draw.randint(1, 2)):
    how = draw.randrange(6)
    if how == 0:
      path.unlink()
    elif how == 1:
      path.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")  # A pickle in disguise.
    elif how == 2:
      name, weights = path.parent, path.stem if path.suffix == ".safetensors" else "model"
      index = {"metadata": {}, "weight_map": {"a": draw.choice(("../../x", "/etc/passwd", 1, "b"))}}
      (name / f"{weights}.safetensors.index.json").write_text(json.dumps(index))
      (name / f"{weights}.safetensors").unlink(missing_ok=True)
    elif how < 5 and path.suffix == ".json":
      path.write_bytes(_odd_json(path.read_bytes(), draw))
    else:
      path.write_bytes(damaged(path.read_bytes(), draw))
  pretrained.load(pretrained.find(target), dtype=np.float32)


def _model() -> pathlib.Path:
  """The tests' tiny model, made once."""
  if not _made:
    _made.append(pathlib.Path(tempfile.mkdtemp(prefix="rlft-fuzz-")) / "model")
    pretrained.save(_made[0], train_cases.tiny_model())
  return _made[0]


_made: list[pathlib.Path] = []


def reward(folder: pathlib.Path, draw: random.Random) -> None:
  """What a host reward returns for four images."""
  del folder
  numbers = [0.5, -1, float("nan"), float("inf"), 1e300, 10**400, True, None, "1", 1j, b"1", [1]]

  def returned() -> Any:
    good = draw.random() < 0.5
    values = [
      draw.choice(numbers[: 3 if good else None]) for _ in range(draw.choice((4, 4, 4, 0, 1, 3, 5)))
    ]
    form = draw.randrange(8)
    if form == 0:
      return tuple(values)
    if form == 1:
      return np.array(values, object)
    if form == 2:
      return iter(values)
    if form == 3:
      return dict(enumerate(values))
    if form == 4:
      return np.zeros(
        draw.choice(((), (4,), (4, 1), (1, 4), (0,), (4, 4))), draw.choice("?bifdcSUMO")
      )
    if form == 5:
      return draw.choice((None, 1, "abcd", object(), len, Ellipsis, NotImplemented))
    return values

  def score(images, prompts, metadata):
    if draw.random() < 0.1:
      raise draw.choice((ValueError("a\nb"), SystemExit(3), KeyError(), Exception("\0" * 900)))
    values = returned()
    return Scores(values, whole=returned(), found=returned()) if draw.random() < 0.2 else values

  caller = host.HostCaller(HostReward("fuzz", score), timeout_s=30.0, threads=1)
  try:
    started = caller.start(np.zeros((4, 2, 2, 3), np.float32), [Prompt("a dog")] * 4)
    assert caller.finish(started).values.dtype == np.float32
  finally:
    caller.close()


KINDS: Mapping[str, Callable[[pathlib.Path, random.Random], None]] = {
  "flagfile": flagfile,
  "prompts": prompts,
  "images": images,
  "model": model,
  "reward": reward,
}


# ---------------------------------------------------------------------------- cases


def one(seed: int, number: int) -> tuple[str, str]:
  """(kind, what came of the case): '' for success, a UserError's line, or a traceback."""
  kind = list(KINDS)[number % len(KINDS)]
  draw = random.Random(f"{seed} {number}")
  with tempfile.TemporaryDirectory(prefix="rlft-fuzz-") as folder:
    try:
      KINDS[kind](pathlib.Path(folder), draw)
    except UserError as error:
      line = str(error).replace(folder, "DIR")
      return kind, line if line and "\n" not in line else f"Traceback: {line!r} is not one line"
    except BaseException as error:
      if isinstance(error, KeyboardInterrupt):
        raise
      return kind, traceback.format_exc()
  return kind, ""


def main(_: Sequence[str]) -> None:
  numbers = [_ONLY.value] if _ONLY.value is not None else range(_CASES.value)
  counts: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in KINDS}
  for number in numbers:
    kind, outcome = one(_SEED.value, number)
    ended = "success" if not outcome else "traceback" if "Traceback" in outcome else "one line"
    counts[kind][ended] += 1
    if ended == "traceback" or _ONLY.value is not None:
      print(f"case {number} ({kind}): {outcome}", flush=True)
  print("| input | cases | success | one line | tracebacks |\n|---|---|---|---|---|")
  for kind, found in counts.items():
    ends = (found[end] for end in ("success", "one line", "traceback"))
    print(f"| {kind} | {found.total()} | {' | '.join(map(str, ends))} |")
  sys.exit(any(found["traceback"] for found in counts.values()))


if __name__ == "__main__":
  app.run(main)
