"""Files as `torch.save` writes them, made without torch, also such as it never would write.

A pickle is a program for a stack machine; here it is put together by hand, so that tests can say
what `torch.save` would not. Regenerates what torch itself writes, for where it is not installed:

    python tests/torch_files.py     (needs torch)
"""

import io
import pathlib
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
  "float32": "FloatStorage",
  "float64": "DoubleStorage",
  "float16": "HalfStorage",
  "bfloat16": "BFloat16Storage",
  "int64": "LongStorage",
}


def code(value) -> bytes:
  """The opcodes that put a plain value on the stack."""
  return pickle.dumps(value, 2)[2:-1]


def program(body: bytes) -> bytes:
  return b"\x80\x02" + body + b"."


def name(module: str, attribute: str) -> bytes:
  return f"c{module}\n{attribute}\n".encode()


def call(module: str, attribute: str, *arguments: bytes) -> bytes:
  return name(module, attribute) + b"(" + b"".join(arguments) + b"tR"


def storage(size=6, kind="FloatStorage", key="0", *rest) -> bytes:
  parts = [code("storage"), name("torch", kind), code(key), code("cpu"), code(size)]
  return b"(" + b"".join([*parts, *map(code, rest)]) + b"tQ"


def tensor(stored=None, offset=0, shape=(2, 3), strides=(3, 1)) -> bytes:
  return call(
    "torch._utils",
    "_rebuild_tensor_v2",
    storage() if stored is None else stored,
    *map(code, (offset, shape, strides, False)),
    call("collections", "OrderedDict"),
  )


def mapping(**entries: bytes) -> bytes:
  return b"}" + b"".join(code(key) + value + b"s" for key, value in entries.items())


def write_zip(path, body: bytes, storages=None, *, compression=zipfile.ZIP_STORED, **extra) -> None:
  """The format of torch >= 1.6; `extra` are further entries, `storages` `{key: bytes}`."""
  entries = {"data.pkl": program(body), "byteorder": b"little", "version": b"3\n"}
  entries |= {f"data/{key}": data for key, data in (storages or {}).items()}
  with zipfile.ZipFile(path, "w", compression) as archive:
    for entry, data in (entries | extra).items():
      archive.writestr(f"archive/{entry}", data)


def write_stream(path, body: bytes, storages=None, *, system=None, sizes=None, magic=MAGIC) -> None:
  """The format before 1.6; float32 storages, `sizes` are their stated numbers of elements."""
  storages = storages or {}
  file = io.BytesIO()
  for value in (magic, 1001, system or {"little_endian": True}):
    pickle.dump(value, file, 2)
  file.write(program(body))
  pickle.dump(list(storages), file, 2)
  for key, data in storages.items():
    file.write(struct.pack("<q", (sizes or {}).get(key, len(data) // 4)) + data)
  pathlib.Path(path).write_bytes(file.getvalue())


def save(path, state, key: str | None = None) -> None:
  """A state dict of numpy arrays as `torch.save` does it; under `key` if one is given."""
  entries, storages = {}, {}
  for i, (entry, array) in enumerate(state.items()):
    array = np.asarray(array)
    strides = tuple(int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim))
    stored = storage(array.size, STORAGES[str(array.dtype)], str(i))
    entries[entry] = tensor(stored, 0, array.shape, strides)
    storages[str(i)] = array.tobytes()
  body = mapping(**entries)
  write_zip(path, mapping(epoch=code(3), **{key: body}) if key else body, storages)


def expected() -> dict[str, np.ndarray]:
  """What the stored files hold in 'state_dict'."""
  matrix = np.random.RandomState(0).standard_normal((3, 4)).astype(np.float32)
  return {
    "matrix": matrix,
    "transposed": matrix.T,
    "row": matrix[1],
    "parameter": matrix[:, :2] + 1,
    "half": matrix.astype(np.float16),
    "brain": matrix.astype(ml_dtypes.bfloat16),
    "double": matrix.astype(np.float64) / 3,
    "integers": np.arange(5),
    "booleans": np.array([True, False]),
    "scalar": np.float32(2.5),
    "empty": np.zeros((0, 3), np.float32),
    "repeated": np.broadcast_to(np.float32(1.5), (3, 3)),
  }


def torch_state():
  """`expected()` as tensors, of which three share a storage."""
  import collections

  import torch

  arrays = expected()
  matrix = torch.from_numpy(arrays["matrix"])
  return collections.OrderedDict(
    matrix=matrix,
    transposed=matrix.T,
    row=matrix[1],
    parameter=torch.nn.Parameter(matrix[:, :2] + 1),
    half=matrix.half(),
    brain=matrix.bfloat16(),
    double=matrix.double() / 3,
    integers=torch.arange(5),
    booleans=torch.tensor([True, False]),
    scalar=torch.tensor(2.5),
    empty=torch.zeros(0, 3),
    repeated=torch.tensor(1.5).expand(3, 3),
  )


def write_with_torch(path, *, new: bool) -> None:
  import torch

  state = torch_state()
  state._metadata = {"": {"version": 1}}
  saved = {"state_dict": state, "epoch": 3, "name": "tiny", "shape": torch.Size([3, 4])}
  torch.save(saved, path, _use_new_zipfile_serialization=new)


if __name__ == "__main__":
  write_with_torch(FIXTURES / "torch_zip.pt", new=True)
  write_with_torch(FIXTURES / "torch_stream.pt", new=False)
