"""The reader of `torch.save`'s files: right on what torch writes, closed to everything else."""

import pickle
import zipfile

import numpy as np
import pytest
import torch_files
from torch_files import call, code, mapping, name, storage, tensor

from rlft.models.files import torch_pickle
from rlft.types import UserError

DATA = np.arange(6, dtype=np.float32).tobytes()
WRITERS = {"zip": torch_files.write_zip, "stream": torch_files.write_stream}


def refused(path, match):
  with pytest.raises(UserError, match=match) as error:
    torch_pickle.load(path)
  message = str(error.value)
  assert "\n" not in message and message.startswith(str(path))
  return message


def assert_holds(found, expected):
  assert list(found) == list(expected)
  for key, array in expected.items():
    assert found[key].dtype == array.dtype and found[key].shape == array.shape, key
    np.testing.assert_array_equal(found[key], array)
    assert not found[key].flags.writeable or not found[key].size


@pytest.mark.parametrize("kind", ["zip", "stream"])
def test_what_torch_wrote(kind):
  found = torch_pickle.load(torch_files.FIXTURES / f"torch_{kind}.pt")
  assert_holds(found.pop("state_dict"), torch_files.expected())
  assert found == {"epoch": 3, "name": "tiny", "shape": (3, 4)}


@pytest.mark.parametrize("new", [True, False])
def test_what_torch_writes_and_reads(tmp_path, new):
  torch = pytest.importorskip("torch")
  torch_files.write_with_torch(tmp_path / "a.pt", new=new)
  found = torch_pickle.load(tmp_path / "a.pt")["state_dict"]
  for key, value in torch.load(tmp_path / "a.pt", weights_only=True)["state_dict"].items():
    value = value.detach()
    if value.dtype == torch.bfloat16:
      assert found[key].dtype == "bfloat16"
      value = value.float()
    np.testing.assert_array_equal(found[key].astype(value.numpy().dtype), value.numpy())


@pytest.mark.parametrize("kind", WRITERS)
def test_arrays_are_views_of_the_file(tmp_path, kind):
  WRITERS[kind](tmp_path / "a.pt", mapping(w=tensor(offset=1, shape=(2, 2))), {"0": DATA})
  array = torch_pickle.load(tmp_path / "a.pt")["w"]
  np.testing.assert_array_equal(array, [[1, 2], [4, 5]])  # offset 1, strides 3 and 1
  with pytest.raises(ValueError, match="read-only"):
    array[0, 0] = 9
  base = array
  while base.base is not None and not isinstance(base, np.memmap):
    base = base.base
  assert isinstance(base, np.memmap)


def test_the_parts_of_a_storage_in_old_files(tmp_path):
  # A reference may name a part of a storage, here numbers 2 to 5, of which one is skipped.
  part = storage(6, "FloatStorage", "0", ("view", 2, 4))
  body = mapping(w=tensor(part, offset=1, shape=(3,), strides=(1,)))
  torch_files.write_stream(tmp_path / "a.pt", body, {"0": DATA})
  np.testing.assert_array_equal(torch_pickle.load(tmp_path / "a.pt")["w"], [3, 4, 5])
  for view in (("view", 3, 4), ("view", -1, 2), (1, 2)):
    body = mapping(w=tensor(storage(6, "FloatStorage", "0", view), shape=(1,), strides=(1,)))
    torch_files.write_stream(tmp_path / "a.pt", body, {"0": DATA})
    refused(tmp_path / "a.pt", "view")


ATTACKS = {
  "posix.system": ("touch {}",),
  "os.system": ("touch {}",),
  "subprocess.call": (["touch", "{}"],),
  "builtins.eval": ("open('{}', 'w')",),
  "builtins.exec": ("open('{}', 'w')",),
  "builtins.open": ("{}", "w"),
  "builtins.getattr": ({}, "keys"),
  "__builtin__.eval": ("open('{}', 'w')",),
  "torch.load": ("{}",),
  "torch.hub.load": ("{}",),
  "torch._utils.os.system": ("touch {}",),
  "numpy.core.multiarray._reconstruct": (1,),
  "functools.partial": (1,),
  "collections.defaultdict": (1,),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_malicious_file_is_refused_by_name(tmp_path, kind, attack):
  trap = tmp_path / "trap"
  arguments = [
    code([part.format(trap) for part in a] if isinstance(a, list) else a)
    if not isinstance(a, str)
    else code(a.format(trap))
    for a in ATTACKS[attack]
  ]
  module, _, attribute = attack.rpartition(".")
  body = mapping(w=call(module, attribute, *arguments), v=tensor())
  WRITERS[kind](tmp_path / "a.pt", body, {"0": DATA})
  message = refused(tmp_path / "a.pt", "not allowed")
  assert f"names {attack}," in message and "nothing was executed" in message
  assert not trap.exists()


def test_every_way_to_name_something_is_closed(tmp_path):
  class Attack:
    def __reduce__(self):
      return eval, ("1",)

  for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
      archive.writestr("archive/data.pkl", pickle.dumps(Attack(), protocol))
    refused(tmp_path / "a.pt", r"names (builtins|__builtin__)\.eval")
  # The opcodes INST and OBJ of old protocols; what the registry of copyreg knows.
  for body in (b"(S'1'\nibuiltins\neval\n", b"(cbuiltins\neval\nS'1'\no", b"\x82\x01"):
    torch_files.write_zip(tmp_path / "a.pt", body)
    refused(tmp_path / "a.pt", "builtins.eval|unregistered extension")
  # The first pickles of an old file are read before it is known to be one.
  (tmp_path / "a.pt").write_bytes(pickle.dumps(Attack()))
  refused(tmp_path / "a.pt", "builtins.eval")


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"offset": 1}, r"shape \(2, 3\), strides \(3, 1\) and offset 1, which reaches outside its"),
    ({"shape": (3, 3)}, "reaches outside its storage of 6 numbers"),
    ({"strides": (4, 1)}, "reaches outside"),
    ({"shape": (2**62, 2**62), "strides": (1, 1)}, "reaches outside"),
    ({"shape": (2**70,), "strides": (2**70,)}, "reaches outside"),
    ({"strides": (-3, 1)}, "cannot be"),
    ({"offset": -1}, "cannot be"),
    ({"shape": (-2, -3)}, "cannot be"),
    ({"shape": (True, 3)}, "cannot be"),
    ({"shape": (2.0, 3)}, "cannot be"),
    ({"shape": (6,)}, "cannot be"),
    ({"shape": "ab"}, "cannot be"),
    ({"shape": None}, "damaged"),
    ({"stored": code("text")}, "cannot be"),
    ({"stored": storage(-6)}, "storage"),
    ({"stored": storage(6, "ComplexFloatStorage")}, "names torch.ComplexFloatStorage"),
    ({"stored": storage(7)}, "expected 7 numbers|truncated"),
    ({"stored": storage(2**60)}, "expected|truncated"),
    ({"stored": storage(6, "FloatStorage", "1")}, "has not|list of storages"),
  ],
)
def test_a_tensor_outside_its_storage(tmp_path, kind, change, message):
  WRITERS[kind](tmp_path / "a.pt", mapping(w=tensor(**change)), {"0": DATA})
  refused(tmp_path / "a.pt", message)


def test_a_pickle_cannot_change_what_it_has_made(tmp_path):
  # The opcode 'b' sets attributes of the object below it on the stack.
  state = {"size": 10**9, "data": 1}
  slots = code((None, state))
  for target in (storage(), tensor(), name("torch", "FloatStorage"), name("torch", "Size")):
    for change in (code(state), slots):
      body = mapping(w=target + change + b"b", v=tensor(shape=(100,), strides=(1,)))
      torch_files.write_zip(tmp_path / "a.pt", body, {"0": DATA})
      refused(tmp_path / "a.pt", "damaged|reaches outside")
  body = mapping(w=call("collections", "OrderedDict") + code({"keys": 1}) + b"b")
  torch_files.write_zip(tmp_path / "a.pt", body)
  assert torch_pickle.load(tmp_path / "a.pt")["w"].keys() == {}.keys()


@pytest.mark.parametrize("kind", WRITERS)
def test_every_truncation_is_noticed(tmp_path, kind):
  path = tmp_path / "a.pt"
  WRITERS[kind](path, mapping(w=tensor()), {"0": DATA})
  whole = path.read_bytes()
  for length in range(0, len(whole), 3):
    path.write_bytes(whole[:length])
    refused(path, "truncated|damaged|torch.save")
  path.write_bytes(whole)
  assert torch_pickle.load(path)["w"].shape == (2, 3)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_damaged_file_gives_one_line_or_other_numbers(tmp_path, kind):
  path = tmp_path / "a.pt"
  WRITERS[kind](path, mapping(w=tensor()), {"0": DATA})
  whole = path.read_bytes()
  rng = np.random.RandomState(0)
  errors = 0
  for _ in range(150):
    damaged = bytearray(whole)
    damaged[rng.randint(len(whole))] = rng.randint(256)
    path.write_bytes(damaged)
    try:
      torch_pickle.load(path)
    except UserError as error:
      assert "\n" not in str(error)
      errors += 1
  assert 25 < errors < 150


def test_files_of_another_kind(tmp_path):
  path = tmp_path / "a.pt"
  for content in (b"", b"<!DOCTYPE html>", b"hello"):
    path.write_bytes(content)
    refused(path, "is not a file of torch.save")
  path.write_bytes(pickle.dumps({"w": [1.0]}))
  refused(path, "is a pickle, but not one of torch.save|damaged")
  refused(tmp_path / "missing.pt", "cannot be read")
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("word/document.xml", "")
  refused(path, "no data.pkl")
  body = mapping(w=tensor())
  torch_files.write_zip(path, body, {"0": DATA}, **{"constants.pkl": b""})
  refused(path, "TorchScript program")
  torch_files.write_zip(path, body, {"0": DATA}, compression=zipfile.ZIP_DEFLATED)
  refused(path, "compressed")
  torch_files.write_zip(path, body, {"0": DATA}, byteorder=b"big")
  refused(path, "big-endian")
  torch_files.write_stream(path, body, {"0": DATA}, system={"little_endian": False})
  refused(path, "big-endian")
  torch_files.write_stream(path, body, {"0": DATA}, sizes={"0": 5})
  refused(path, "5 numbers in storage '0', expected 6")
  torch_files.write_stream(path, body, {"0": DATA}, magic=1)
  refused(path, "not one of torch.save")
