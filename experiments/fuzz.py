"""Gives rlft bad input: flagfiles, prompts, images, models, checkpoints, and what rewards return.

    python experiments/fuzz.py --cases=10000 --seed=1

Each case is a good input that was damaged, a pure function of (seed, number). It must end in
success with what is right, or in a UserError of one line, which ends a program with status 2. Most
cases call functions; one in a hundred is the program. What else happens is printed with the number
of its case (`--only=NUMBER` does that one again), and the status is 1. A case takes about 15 ms of
a core. experiments/fuzz.md has what this printed here.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import contextlib
import functools
import io
import json
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from typing import Any

from absl import app, flags
import jax
import numpy as np
from PIL import Image
import pyarrow
from pyarrow import parquet
import safetensors.numpy

_ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(_ROOT / "tests"))

import forked_cases  # noqa: E402
import train_cases  # noqa: E402

from rlft import catalog  # noqa: E402
from rlft.config import flags as cli  # noqa: E402
from rlft.config.settings import Config  # noqa: E402
from rlft.data import pairs, records, sources  # noqa: E402
from rlft.models.files import lora_files, pretrained  # noqa: E402
from rlft.rewards.remote import protocol  # noqa: E402
from rlft.rewards.scoring import host  # noqa: E402
from rlft.run import checks  # noqa: E402
from rlft.storage.checkpoint import Checkpointer  # noqa: E402
from rlft.types import HostReward, Prompt, Scores, UserError  # noqa: E402

_CASES = flags.DEFINE_integer("cases", 10_000, "number of cases", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of all cases")
_FIRST = flags.DEFINE_integer("first", 0, "number of the first case", lower_bound=0)
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


def _flipped(content: bytes, draw: random.Random) -> bytes:
  """The content with one to four bits flipped."""
  changed = bytearray(content)
  for _ in range(draw.randint(1, 4)):
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
  return bytes(changed)


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
_LONG_LINE = 10_000_000  # bytes
_PROMPTS = {
  "txt": _TEXT,
  "jsonl": _JSON,
  "json": json.dumps([*_ROWS, "a bird", ""]),
  "csv": _CSV,
  "tsv": _CSV.replace(",", "\t"),
  "unknown": _TEXT,
}
_SUFFIXES = (*_PROMPTS, "parquet", "parquet")  # No other is damaged in so many ways.


def prompts(folder: pathlib.Path, draw: random.Random) -> None:
  """A file of prompts, opened and read."""
  suffix = draw.choice(_SUFFIXES)
  encoding = draw.choice(("utf-8", "utf-8", "utf-8", "utf-16", "latin-1"))
  path = folder / f"prompts.{suffix}"
  if suffix == "parquet":
    content = _parquet(draw)
    # Most damage to its end is the end of it: flipped bits get further.
    damage = draw.choice((damaged, _flipped, _flipped, lambda content, draw: content))
    path.write_bytes(damage(content, draw))
  else:
    content = damaged(_PROMPTS[suffix].encode(encoding, "replace"), draw)
    path.write_bytes(_with_long_line(content, draw) if draw.random() < 0.02 else content)
  part = draw.choice(("", "", "", "[:-1]", "[1:]", "[heldout]", "?column=n", "?column=x", "[::]"))
  found = catalog.load_prompts(f"{path}{part}")
  for row in {0, len(found) // 2, len(found) - 1}:
    prompt = found[row]
    assert isinstance(prompt.text, str) and prompt.text.strip(), prompt
    sources.as_json(prompt)
  found.digest() if hasattr(found, "digest") else None


def _with_long_line(content: bytes, draw: random.Random) -> bytes:
  """The content with a line of 10 MB somewhere, of letters, or of letters in an object."""
  line = b"A" * _LONG_LINE
  if draw.random() < 0.5:
    line = b'{"prompt": "a dog", "file_name": "0.png", "text": "' + line + b'"}'
  lines = content.split(b"\n")
  lines.insert(draw.randrange(len(lines) + 1), line)
  return b"\n".join(lines)


def _parquet(draw: random.Random) -> bytes:
  """A whole Parquet file with columns of many types, some of whose values Python has not."""
  unit = draw.choice(("s", "ms", "us", "ns"))
  zone = draw.choice((None, "UTC", "+01:00", "Mars/Base"))
  far = 2 ** (52 if unit == "s" else 62)  # Seconds are written as milliseconds.
  count = draw.choice((0, 1_234_567_891, far, -far, draw.getrandbits(40)))
  whole = pyarrow.array([count, None, 7], pyarrow.int64())
  moments = whole.cast(pyarrow.timestamp(unit, zone))
  kinds = pyarrow.array(["x", None, "y"]).dictionary_encode()
  raw = pyarrow.array([draw.choice((b"a", b"caf\xe9", b"\0")), None, b"b"])
  table = {
    "prompt": draw.choice((["a dog", "", "ein Käfer"], kinds, raw.view(pyarrow.string()))),
    "n": ["a", "b", None],
    "moment": moments,
    "span": whole.cast(pyarrow.duration(unit)),
    "time": pyarrow.array([draw.getrandbits(46)] * 3).cast(pyarrow.time64("ns")),
    "day": pyarrow.array([draw.getrandbits(31)] * 3, pyarrow.int32()).cast(pyarrow.date32()),
    "kind": kinds,
    "objects": [["dog"], None, []],
    "moments": pyarrow.ListArray.from_arrays([0, 2, 2, 3], moments),
    "kinds": pyarrow.ListArray.from_arrays([0, 2, 2, 3], kinds),
    "pair": pyarrow.FixedSizeListArray.from_arrays(pyarrow.concat_arrays([moments] * 2), 2),
    "box": pyarrow.StructArray.from_arrays(
      [moments, kinds], draw.choice((["a", "b"], ["a", "b"], ["a", "a"]))
    ),
    "map": pyarrow.MapArray.from_arrays([0, 1, 1, 2], ["k", "l"], moments.take([0, 2])),
    "raw": raw,
    "text": draw.choice((raw.view(pyarrow.string()), ["b", "c", None])),
  }
  chosen = draw.sample(sorted(table.keys() - {"prompt"}), draw.randint(0, 4))
  file = io.BytesIO()
  parquet.write_table(
    pyarrow.table({name: table[name] for name in ("prompt", *chosen)}),
    file,
    compression=draw.choice(("none", "snappy", "zstd")),
    write_page_checksum=draw.random() < 0.5,
    use_dictionary=draw.random() < 0.5,
  )
  return file.getvalue()


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
  name = f"0.{suffix}"
  leaves = draw.random() < 0.05
  if leaves:  # The file is there, but is not the folder's.
    outside = f"{folder.name}/{name}"
    name = draw.choice((f"../{outside}", f"x/../../{outside}", f"{folder}/{name}"))
  listing = json.dumps({"file_name": name, "text": "a dog"}).encode() + b"\n"
  if not leaves and draw.random() < 0.3:
    listing = damaged(listing, draw)
  if not leaves and draw.random() < 0.02:
    listing = _with_long_line(listing, draw)
  (folder / "metadata.jsonl").write_bytes(listing)
  found = pairs.load_folder(str(folder), size=(4, 4))
  assert not leaves, name
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


def _made(name: str, make: Callable[[pathlib.Path], Any]) -> pathlib.Path:
  """What `make` made, once for all cases, in a directory of this process."""
  path = pathlib.Path(_scratch.name) / name
  if not path.exists():
    make(path)
  return path


_scratch = tempfile.TemporaryDirectory(prefix="rlft-fuzz-")


def _damage_files(folder: pathlib.Path, draw: random.Random) -> None:
  """Damages one or two files of a directory, whatever they are."""
  found = sorted(path for path in folder.rglob("*") if path.is_file())
  for path in draw.sample(found, min(len(found), draw.randint(1, 2))):
    how = draw.randrange(8)
    if how == 0:
      path.unlink()
    elif how == 1:
      path.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")  # A pickle in disguise.
    elif how == 2:
      path.unlink()
      path.mkdir()
    elif how == 3:
      content = bytearray(path.read_bytes() or b"\0")
      content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
      path.write_bytes(content)
    elif how < 6 and path.suffix == ".json":
      path.write_bytes(_odd_json(path.read_bytes(), draw))
    else:
      path.write_bytes(damaged(path.read_bytes(), draw))


def model(folder: pathlib.Path, draw: random.Random) -> None:
  """A model's directory."""
  target = folder / "model"
  shutil.copytree(_made("model", _make_model), target)
  if draw.random() < 0.2:
    path = draw.choice(sorted(target.rglob("*.safetensors")))
    index = {"metadata": {}, "weight_map": {"a": draw.choice(("../../x", "/etc/passwd", 1, "b"))}}
    path.with_suffix(".safetensors.index.json").write_text(json.dumps(index))
    path.unlink()
  else:
    _damage_files(target, draw)
  pretrained.load(pretrained.find(target), dtype=np.float32)


def _make_model(path: pathlib.Path) -> None:
  pretrained.save(path, train_cases.tiny_model())


def _state(iteration: int) -> dict[str, Any]:
  draw = np.random.RandomState(iteration)
  return {"a": {"b/c": draw.randn(30, 40).astype(np.float32)}, "count": np.int32(iteration)}


def checkpoint(folder: pathlib.Path, draw: random.Random) -> None:
  """Two checkpoints; what is restored must be the state of its iteration, bit for bit."""
  target = folder / "checkpoints"
  shutil.copytree(_made("checkpoints", _make_checkpoints), target)
  for name in ("iteration_2", "iteration_1")[: draw.choice((1, 1, 1, 2))]:
    _damage_files(target / name, draw)
  if draw.random() < 0.1:
    (target / "iteration_3").mkdir()  # Not committed.
  checkpointer = Checkpointer(target)
  try:
    iteration, state, meta = checkpointer.restore(jax.device_put(_state(0)))
  finally:
    checkpointer.close()
  jax.tree.map(np.testing.assert_array_equal, state, _state(iteration))
  assert meta == {"iteration": iteration}, meta


def _make_checkpoints(path: pathlib.Path) -> None:
  checkpointer = Checkpointer(path)
  for iteration in (1, 2):
    checkpointer.save(iteration, jax.device_put(_state(iteration)), {"iteration": iteration})
  checkpointer.close()


_ADAPTED = {f"mid_block/attentions_0/{name}": (8, 8) for name in ("to_q", "to_k", "to_v")}


def adapter(folder: pathlib.Path, draw: random.Random) -> None:
  """A LoRA, with what PEFT says of it in the header."""
  made = {name: {"a": np.ones((8, 2)), "b": np.ones((2, 8))} for name in _ADAPTED}
  form = draw.choice((lora_files.peft_state, lora_files.kohya_state))
  told = json.dumps({"unet.r": 2, "unet.lora_alpha": 4, "unet.use_dora": False}).encode()
  if draw.random() < 0.5:
    told = _odd_json(told, draw) if draw.random() < 0.7 else damaged(told, draw)
  content = safetensors.numpy.save(
    form(made, scale=1.0),
    metadata={"format": "pt", "lora_adapter_metadata": told.decode(errors="replace")},
  )
  path = folder / "lora.safetensors"
  path.write_bytes(damaged(content, draw) if draw.random() < 0.5 else content)
  for factors in lora_files.load(path, _ADAPTED).values():
    assert len(factors["a"]) == factors["b"].shape[1] == 8 and np.isfinite(factors["b"]).all()


_RECORDS = [Prompt(f"a dog {i}", {"n": i}) for i in range(30)]


def dataset(folder: pathlib.Path, draw: random.Random) -> None:
  """A data set of prompts; what is read must be what was written."""
  target = folder / "prompts"
  shutil.copytree(_made("records", _make_records), target)
  _damage_files(target, draw)
  rows = draw.sample(range(len(_RECORDS)), 3)
  assert records.load(str(target), "train").take(rows) == [_RECORDS[row] for row in rows]


def _make_records(path: pathlib.Path) -> None:
  path.mkdir()
  writer = records.Writer(str(path), "train")
  for prompt in _RECORDS:
    writer.add(prompt)
  (path / records.MANIFEST).write_text(json.dumps({"splits": {"train": writer.close()}}))


def answer(folder: pathlib.Path, draw: random.Random) -> None:
  """What a reward server answers; the caller says the rest of the line."""
  del folder
  tensor: dict[str, Any] = {"name": "score", "datatype": "FP32", "shape": [4]}
  values, headers, tail = [0.5, 1, -2, None], {}, b""
  if draw.random() < 0.5:
    tensor["data"] = values
  else:
    tail = np.array(values, np.float32).tobytes()
    tensor["parameters"] = {"binary_data_size": len(tail)}
  content = json.dumps({"id": "7", "outputs": [tensor]}).encode()
  how = draw.random()
  if how < 0.3:
    odd = json.loads(_odd_json(json.dumps(tensor).encode(), draw))
    content = json.dumps({"id": "7", "outputs": [odd]}).encode()
  elif how < 0.5:
    content = _odd_json(content, draw)
  elif how < 0.6 and "data" in tensor:
    content = content.replace(b"0.5", draw.choice((b"1" * 400, b"1e999", b'"x"', b"[1]", b"{}")))
  elif how < 0.9:
    content = damaged(content, draw)
  if tail:
    length = str(len(content)) if draw.random() < 0.9 else draw.choice(("-1", "x", "²", "9" * 99))
    headers[protocol.JSON_LENGTH] = length
  try:
    found = protocol.decode(content + tail, headers, request_id="7", output="score", count=4)
  except ValueError as error:
    raise UserError(" ".join(str(error).split())) from error
  assert found.shape == (4,) and found.dtype == np.float64


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


def program(folder: pathlib.Path, draw: random.Random) -> None:
  """launch/train.py with a damaged model, prompts, images or settings, in a process of its own.

  A run that has opened everything is told to stop.
  """
  tiny = folder / "tiny"
  shutil.copytree(_made("tiny", train_cases.make_folder), tiny)
  command = train_cases.flags(train_cases.config(tiny, folder / "run", iterations=1))
  how = draw.randrange(5)
  if how == 0:
    _damage_files(tiny / "model", draw)
  elif how == 1:
    path = tiny / draw.choice(("prompts.txt", "pairs/metadata.jsonl", "rewards.py"))
    path.write_bytes(damaged(path.read_bytes(), draw))
  elif how == 2:
    _damage_files(tiny / "pairs", draw)
  else:
    at = draw.randrange(len(command))
    text = damaged(command[at].encode(), draw).decode(errors="replace").replace("\0", "")
    command[at] = text[:10_000]  # Of a longer argument the system makes no command.
  started = _nursery().start([train_cases.ROOT / "launch" / "train.py", *command], folder / "said")
  while not (folder / "run" / "config.json").exists() and started.poll() is None:
    time.sleep(0.05)
  started.send_signal(signal.SIGTERM)
  status, said = started.wait(600), started.errors()
  assert "Traceback" not in said, said
  assert status in (0, 2), (status, said)
  lines = [line for line in said.splitlines() if line.startswith("error: ")]
  assert len(lines) == (status == 2) and max(map(len, said.splitlines()), default=0) < 2000, said
  left = [path.name for path in folder.glob("run/**/*.tmp")]
  assert not left, left
  if lines:
    raise UserError(lines[0])


@functools.cache
def _nursery() -> forked_cases.Nursery:
  cache = pathlib.Path(_scratch.name) / "cache"
  return forked_cases.Nursery(train_cases.environment_of_runs(cache))


KINDS: Mapping[str, Callable[[pathlib.Path, random.Random], None]] = {
  "flagfile": flagfile,
  "prompts": prompts,
  "images": images,
  "model": model,
  "checkpoint": checkpoint,
  "adapter": adapter,
  "dataset": dataset,
  "reward": reward,
  "answer": answer,
  "program": program,
}
# Of a hundred cases; those that take long are fewer.
_SHARES = dict(zip(KINDS, (14, 18, 18, 9, 5, 9, 8, 9, 9, 1), strict=True))
_TURNS = [
  kind for turn in range(max(_SHARES.values())) for kind, share in _SHARES.items() if turn < share
]


# ---------------------------------------------------------------------------- cases


def one(seed: int, number: int) -> tuple[str, str]:
  """(kind, what came of the case); see `case`."""
  kind = _TURNS[number % len(_TURNS)]
  return kind, case(kind, f"{seed} {number}")


def case(kind: str, seed: str) -> str:
  """What came of a case: '' for success, a UserError's line, or a traceback."""
  with tempfile.TemporaryDirectory(prefix="rlft-fuzz-") as folder:
    try:
      KINDS[kind](pathlib.Path(folder), random.Random(seed))
    except UserError as error:
      line = str(error).replace(folder, "DIR")
      return line if line and "\n" not in line else f"Traceback: {line!r} is not one line"
    except KeyboardInterrupt:
      raise
    except BaseException:
      return traceback.format_exc()
  return ""


def main(_: Sequence[str]) -> None:
  numbers = [_ONLY.value] if _ONLY.value is not None else range(_FIRST.value, _CASES.value)
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
