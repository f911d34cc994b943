"""Where weights come from, and what is said about files that are not what they should be."""

import functools
import http.server
import json
import pathlib
import threading

from flax import linen as nn
import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils import logging as hub_logging
import jax
import jax.numpy as jnp
import ml_dtypes
import models_cases
import numpy as np
import pytest
import safetensors.numpy
import torch_files

from rlft.models import clip
from rlft.models.files import arrays, sources, torch_layout, vocabulary
from rlft.models.files import hub as hub_lib
from rlft.types import UserError

ARRAYS = {
  "fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
  "fc.bias": np.ones(2, np.float16),
  "scale": np.array(2.5, np.float32),
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def one_line(function, *arguments, match, **keywords):
  with pytest.raises(UserError, match=match) as error:
    function(*arguments, **keywords)
  assert "\n" not in str(error.value)


def assert_same(found, expected=ARRAYS):
  assert len(found) == len(expected) and set(found) == set(expected)
  for name, array in expected.items():
    assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(found[name], array)


def write(path, state):
  if path.suffix == ".safetensors":
    safetensors.numpy.save_file(state, path)
  else:
    torch_files.save(path, state)


def write_shards(directory, name, index=None):
  """Two files and their index; returns the second file."""
  stem, _, suffix = name.rpartition(".")
  names, weight_map = sorted(ARRAYS), {}
  for i, part in enumerate((names[:1], names[1:])):
    file = f"{stem}-0000{i + 1}-of-00002.{suffix}"
    write(directory / file, {key: ARRAYS[key] for key in part})
    weight_map |= dict.fromkeys(part, file)
  index = directory / (index or f"{name}.index.json")
  index.write_text(json.dumps({"weight_map": weight_map}))
  return directory / file


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_one_file(tmp_path, suffix):
  path = tmp_path / f"a{suffix}"
  write(path, ARRAYS)
  assert_same(sources.open_weights(path))
  assert_same(sources.open_weights(str(path), key="state_dict"))


@pytest.mark.parametrize("name", sources.WEIGHTS)
def test_a_directory(tmp_path, name):
  write(tmp_path / name, ARRAYS)
  assert_same(sources.open_weights(tmp_path))


def test_safetensors_before_pickles(tmp_path):
  write(tmp_path / "pytorch_model.bin", {"other": np.zeros(1, np.float32)})
  write(tmp_path / "model.safetensors", ARRAYS)
  assert_same(sources.open_weights(tmp_path))
  one_line(sources.open_weights, tmp_path, names=("x.pt", "y.pt"), match="none of x.pt, y.pt; name")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_shards(tmp_path, name):
  second = write_shards(tmp_path, name)
  assert_same(sources.open_weights(tmp_path))
  second.unlink()
  one_line(sources.open_weights, tmp_path, match=f"{second.name} does not exist, but the index")


def test_shards_in_half_precision(tmp_path):
  write_shards(tmp_path, "a.safetensors", "a.safetensors.index.fp16.json")
  assert_same(sources.open_weights(tmp_path, names=("a.safetensors", "a.fp16.safetensors")))


@pytest.mark.parametrize(
  "index", [{}, [], {"weight_map": {}}, {"weight_map": {"a": "../a"}}, {"weight_map": {"a": 1}}]
)
def test_a_wrong_index(tmp_path, index):
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
  one_line(sources.open_weights, tmp_path, match="no 'weight_map' of file names|it holds no object")


def test_bfloat16(tmp_path):
  state = {"a": np.array([1.5, -2.0], ml_dtypes.bfloat16)}
  for name in ("a.safetensors", "a.pt"):
    write(tmp_path / name, state)
    assert_same(sources.open_weights(tmp_path / name), state)


def test_a_dict_around_the_arrays(tmp_path):
  path = tmp_path / "a.pt"
  torch_files.save(path, {f"module.{name}": array for name, array in ARRAYS.items()}, "state_dict")
  state = sources.open_weights(path, key="state_dict")
  assert_same(arrays.strip_prefix(state, "module."))
  assert arrays.strip_prefix(ARRAYS, "module.") is ARRAYS
  one_line(sources.open_weights, path, match="'epoch' is int, expected a dict of arrays; save")
  one_line(sources.open_weights, path, key="model", match="with the entry 'model'; save")
  torch_files.write_zip(path, torch_files.code([1]))
  one_line(sources.open_weights, path, match="holds list, expected a dict of arrays")


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.safetensors", b"<!DOCTYPE html><html>", "is a web page, not weights; download the file"),
    ("a.pt", b"\n <HTML>", "is a web page"),
    ("a.pt", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
    ("a.safetensors", b"PK\x03\x04", "is a file of torch.save, not safetensors; rename it to .pt"),
    ("a.safetensors", b"\x80\x02", "is a file of torch.save"),
    ("a.pt", b"\x08\0\0\0\0\0\0\0{}      ", "is a safetensors file; rename it to .safetensors"),
    ("a.safetensors", b"", "cannot be read"),
    ("a.safetensors", b"\x08\0\0\0\0\0\0\0{", "cannot be read"),
    ("a.pt", b"", "is not a file of torch.save"),
    ("a.pt", b"PK\x03\x04truncated", "truncated or damaged archive"),
    ("a.npz", b"PK\x03\x04", "unknown kind of file '.npz'; give a .safetensors, .pt"),
  ],
)
def test_files_that_are_not_what_they_say(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  one_line(sources.open_weights, tmp_path / name, match=message)


def test_truncated_files(tmp_path):
  for name in ("a.safetensors", "a.pt"):
    path = tmp_path / name
    write(path, ARRAYS)
    path.write_bytes(path.read_bytes()[:-10])
    one_line(sources.open_weights, path, match="cannot be read|truncated")


def test_sources_that_are_nowhere(tmp_path):
  for source in ("weights/a.pt", str(tmp_path / "a"), "a", "", "org/name/more"):
    one_line(sources.open_weights, source, match="does not exist; give a file, a directory|none of")
  one_line(sources.open_weights, "org/name", match=r"needs a revision.*org/name@<commit hash>")
  one_line(sources.read_config, "org/name", match="needs a revision")


def test_configs_and_other_files(tmp_path):
  write(tmp_path / "a.pt", ARRAYS)
  one_line(sources.read_config, tmp_path / "a.pt", match="no config.json in it or beside it")
  (tmp_path / "config.json").write_text('{"a": 1}')
  assert sources.read_config(tmp_path) == sources.read_config(tmp_path / "a.pt") == {"a": 1}
  assert sources.find_file(tmp_path, "vocab.txt") is None
  (tmp_path / "config.json").write_text("{")
  one_line(sources.read_config, tmp_path, match="cannot be read as JSON")


class Hub:
  """In the place of huggingface_hub: the files of a directory, or an error."""

  def __init__(self, monkeypatch, directory):
    self.directory, self.asked, self.error, self.cached = directory, [], None, None
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
    monkeypatch.setattr(
      huggingface_hub, "try_to_load_from_cache", lambda *args, **keywords: self.cached
    )

  def download(self, repo, name, *, revision):
    assert (repo, revision) == ("org/name", COMMIT)
    self.asked.append(name)
    if self.error is not None:
      raise self.error
    if not (self.directory / name).exists():
      raise errors.EntryNotFoundError("there is none")
    return str(self.directory / name)


@pytest.fixture
def hub(monkeypatch, tmp_path):
  return Hub(monkeypatch, tmp_path)


SOURCE = f"org/name@{COMMIT}"


def test_a_hub(hub, tmp_path):
  write(tmp_path / "pytorch_model.bin", ARRAYS)
  assert_same(sources.open_weights(SOURCE))
  (tmp_path / "sub").mkdir()
  write(tmp_path / "sub" / "head.pt", {"a": np.ones(2, np.float32)})
  assert_same(sources.open_weights(f"{SOURCE}/sub/head.pt"), {"a": np.ones(2, np.float32)})
  hub.asked.clear()
  write_shards(tmp_path, "model.safetensors")
  assert_same(sources.open_weights(SOURCE))
  assert hub.asked == [
    "model.safetensors",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
  ]


def test_other_files_of_a_hub(hub, tmp_path):
  one_line(sources.read_config, SOURCE, match="no config.json")
  (tmp_path / "sub").mkdir()
  (tmp_path / "sub" / "config.json").write_text('{"a": 1}')
  assert sources.read_config(f"{SOURCE}/sub/head.pt") == {"a": 1}
  one_line(vocabulary.open_clip, SOURCE, clip.CLIPTextConfig(), match="there is no CLIP")
  vocabulary.write_clip(tmp_path, models_cases.tokenizer())
  assert vocabulary.open_clip(SOURCE, clip.CLIPTextConfig()).length == 16


def test_a_file_on_disk_wins(hub, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  directory = tmp_path / "org" / f"name@{COMMIT}"
  directory.mkdir(parents=True)
  write(directory / "model.safetensors", ARRAYS)
  assert_same(sources.open_weights(SOURCE))
  assert hub.asked == []


class TransportError(Exception):
  """As those of httpx, which are no errors of the hub's library."""


@pytest.mark.parametrize(
  ("error", "message"),
  [
    (errors.LocalEntryNotFoundError, "not in the cache, and the hub cannot be reached; download"),
    (errors.OfflineModeIsEnabled, r"cannot be downloaded \(line one line two\); try again"),
    (errors.HFValidationError, "cannot be downloaded"),
    (ConnectionResetError, "cannot be downloaded"),
    (TransportError, r"cannot be downloaded \(line one line two\); try again"),
  ],
)
def test_a_hub_that_cannot_be_asked(hub, error, message):
  hub.error = error("line one\nline two")
  for function in (sources.open_weights, sources.read_config):
    one_line(function, SOURCE, match=f"org/name@{COMMIT}.*{message}")


def test_attempts_are_not_shown(hub, monkeypatch):
  said = []
  logger = hub_logging.get_logger("huggingface_hub.utils._http")
  monkeypatch.setattr(logger, "handle", said.append)

  def download(*args, **keywords):
    logger.warning("connection refused, four hundred characters of it. Retrying in 1s")
    raise errors.LocalEntryNotFoundError("no answer")

  monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
  level = hub_logging.get_verbosity()
  with pytest.raises(UserError, match="cannot be reached"):
    hub_lib.parse("org/name@main").fetch("config.json")
  assert not said and hub_logging.get_verbosity() == level
  logger.warning("of another's use")
  assert said


@pytest.fixture(scope="module")
def refusing_hub():
  """The address of a hub that answers every request with the error that the repository names."""

  class Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
      status, error = self.path.split("/")[2].split("-")
      self.send_response(int(status))
      self.send_header("X-Error-Code", error)
      self.send_header("Content-Length", "0")
      self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args):
      del args

  with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
  ("answer", "message"),
  [
    ("403-GatedRepo", "asks for its terms to be accepted"),
    ("404-RevisionNotFound", "has no revision 'refs/pr/11'"),
    ("404-RepoNotFound", "no repository 'org/404-RepoNotFound'"),
    ("404-EntryNotFound", "no config.json in it"),
    ("401-Other", "cannot be downloaded .*401.*; try again"),
  ],
)
def test_a_hub_that_refuses(refusing_hub, monkeypatch, tmp_path, answer, message):
  # Before huggingface-hub 1, a session that began offline stays so.
  getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()
  download = functools.partial(
    huggingface_hub.hf_hub_download, endpoint=refusing_hub, cache_dir=tmp_path
  )
  monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
  one_line(sources.read_config, f"org/{answer}@refs/pr/11", match=message)


def test_revisions_with_slashes():
  parse = hub_lib.parse
  assert parse("org/name@refs/pr/11") == hub_lib.Repository("org/name", "refs/pr/11", None)
  found = parse("org/name@refs/pr/11/sub/head.pt")
  assert found == hub_lib.Repository("org/name", "refs/pr/11", "sub/head.pt")
  assert str(found) == "org/name@refs/pr/11"
  found = parse("org/name@fix%2Fvae/sub/head.pt")
  assert found == hub_lib.Repository("org/name", "fix/vae", "sub/head.pt")
  assert str(found) == "org/name@fix%2Fvae"
  assert parse("org/name@main/head.pt") == hub_lib.Repository("org/name", "main", "head.pt")
  assert str(parse("org/name")) == "org/name"


def test_a_hub_without_what_is_asked_for(hub, tmp_path):
  one_line(sources.open_weights, SOURCE, match=f"none of model.safetensors.*{COMMIT}/<file>")
  one_line(sources.open_weights, f"{SOURCE}/a.pt", match="has no file 'a.pt'; correct the name")
  write_shards(tmp_path, "model.safetensors").unlink()
  one_line(sources.open_weights, SOURCE, match="no file 'model-00002-of-00002.safetensors'")


def test_what_the_cache_knows_to_be_missing_is_missing_offline(hub):
  hub.error = errors.LocalEntryNotFoundError("line one")
  hub.cached = huggingface_hub._CACHED_NO_EXIST
  assert sources.find_file(SOURCE, "tokenizer_config.json") is None


class Linear(nn.Module):
  """Every kind of leaf: a kernel, a convolution, norm, embedding, and one under its own name."""

  @nn.compact
  def __call__(self, x, ids):
    x = nn.Conv(3, (2, 2), name="conv")(x).mean((1, 2))
    x = nn.LayerNorm(name="norm")(nn.Dense(4, name="0")(x))
    x = x + self.param("cls_token", nn.initializers.zeros, (1, 1, 4))[:, 0]
    return x + nn.Embed(5, 4, name="query")(ids)

  def example_inputs(self):
    return jax.ShapeDtypeStruct((1, 2, 2, 1), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)


def linear_state():
  shapes = {
    "conv.weight": (3, 1, 2, 2),
    "conv.bias": (3,),
    "0.weight": (4, 3),
    "0.bias": (4,),
    "norm.weight": (4,),
    "norm.bias": (4,),
    "query.weight": (5, 4),
    "cls_token": (1, 1, 4),
  }
  rng = np.random.RandomState(0)
  return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_any_module_goes_to_torch_and_back():
  state = linear_state()
  params = torch_layout.from_torch(Linear(), state)
  np.testing.assert_array_equal(params["0"]["kernel"], state["0.weight"].T)
  np.testing.assert_array_equal(params["conv"]["kernel"][1, 0, 0], state["conv.weight"][:, 0, 1, 0])
  np.testing.assert_array_equal(params["query"]["embedding"], state["query.weight"])
  np.testing.assert_array_equal(params["cls_token"], state["cls_token"])
  found = torch_layout.to_torch(params)
  assert found.keys() == state.keys()
  for name, array in state.items():
    np.testing.assert_array_equal(found[name], array)


def test_arrays_that_are_ignored():
  state = linear_state() | {"text.position_ids": np.arange(3), "proj.a": np.ones(1)}
  torch_layout.from_torch(Linear(), state, ignore=r"^proj\.")
  one_line(
    torch_layout.from_torch, Linear(), state, match="1 left-over arrays, the first is proj.a"
  )
  one_line(
    torch_layout.from_torch, Linear(), state, ignore="norm|proj", match=r"no norm.bias \(exp"
  )


@pytest.mark.parametrize(
  ("name", "array", "message"),
  [
    ("0.weight", None, r"f: no 0.weight \(expected shape \(4, 3\)\); the file is of another model"),
    (
      "0.weight",
      np.zeros((3, 4), np.float32),
      r"f: 0.weight has shape \(3, 4\), expected \(4",
    ),
    ("norm.bias", np.zeros(4, np.int8), "f: norm.bias has type int8, expected float32.*quantised"),
    ("head", np.zeros(4), "f: 1 left-over arrays, the first is head; the file is of another"),
  ],
)
def test_what_is_said_of_wrong_arrays(name, array, message):
  state = linear_state()
  state.pop(name, None)
  if array is not None:
    state[name] = array
  one_line(torch_layout.from_torch, Linear(), state, what="f", match=message)


def test_types_that_numpy_does_not_have(tmp_path):
  # A safetensors file with one 8-bit float.
  header = b'{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}'
  path = pathlib.Path(tmp_path, "a.safetensors")
  path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
  state = sources.open_weights(path)
  one_line(lambda: state["a"], match="a has type F8_E4M3; quantised weights are not supported")
