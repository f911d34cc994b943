"""Parameters go from files to their devices one at a time."""

import dataclasses
import hashlib
import os
import pathlib
import subprocess
import sys

from flax import traverse_util
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import models_cases
import numpy as np
import pytest
import repository_cases as cases

from rlft.models import architectures, unet
from rlft.models.files import arrays, pretrained
from rlft.models.shapes import param_shapes

ROOT = pathlib.Path(__file__).parents[3]
# The fingerprint that runs on the model of the library have in their checkpoints.
EMOJI_SD = "c9abedb428dfa033e9258a0fe1529b49ba95d521af82e0bb701f9520c1d939d8"

# Prints by how many MiB the memory of the process rose at most when it loaded a model: onto one
# device, and in shards onto eight. A small model before that takes what is needed only once.
_PROGRAM = """
import pathlib, sys
import jax
from rlft.models.files import pretrained
from rlft.parallel import sharding

def status(name):
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

def rise(path, devices):
  mesh = jax.sharding.Mesh(jax.devices()[:devices], ("fsdp",))
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # The peak is what there is now.
  before = status("VmRSS")
  model = pretrained.load(
    path,
    place=lambda _, shape: sharding.parameters(mesh, jax.ShapeDtypeStruct(shape, "float32")),
    identify=True,
  )
  kept.append(model)  # Freed memory would be used again.
  return status("VmHWM") - before

kept = []
rise(sys.argv[1], 8)
print(rise(sys.argv[2], 1), rise(sys.argv[2], 8))
"""


@pytest.fixture(scope="module")
def mesh():
  return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  root = tmp_path_factory.mktemp("model") / "model"
  return root, cases.write(root, "sd2", "half shards")


def by_axis(mesh):
  """Shards each array along one of its axes, another one for each array."""

  def place(path, shape):
    axes = [axis for axis, size in enumerate(shape) if size % 4 == 0]
    if not axes:
      return NamedSharding(mesh, P())
    axis = axes[sum(map(len, path)) % len(axes)]
    return NamedSharding(mesh, P(*[None] * axis, "fsdp"))

  return place


@pytest.mark.parametrize("identify", [True, False])
def test_every_parameter_is_where_it_belongs(mesh, saved, identify):
  path, expected = saved
  place = by_axis(mesh)
  found = pretrained.load(path, place=place, identify=identify)
  leaves = traverse_util.flatten_dict(found.params)
  half = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), expected.params)
  for name, array in traverse_util.flatten_dict(half).items():
    assert leaves[name].sharding == place(name, array.shape)
    np.testing.assert_array_equal(leaves[name], array)
  specs = {(leaf.ndim, leaf.sharding.spec) for leaf in leaves.values()}
  assert specs >= {(4, P(None, None, "fsdp")), (4, P(None, None, None, "fsdp"))}
  assert specs >= {(2, P("fsdp")), (2, P(None, "fsdp")), (1, P("fsdp")), (1, P())}
  assert found.fingerprint == (models_cases.fingerprint(half) if identify else "")


def test_no_more_is_read_than_is_placed(mesh, saved, monkeypatch):
  read = {}
  read_part = arrays.read_part

  def counted(state, name, index):
    part = read_part(state, name, index)
    read.setdefault((id(state), name, arrays.shape(state, name)), []).append(part.size)
    return part

  monkeypatch.setattr(arrays, "read_part", counted)
  pretrained.load(saved[0], place=by_axis(mesh))
  # In shards, of which the two devices that have the same one share what was read; or whole.
  assert all(sum(sizes) == np.prod(shape) for (_, _, shape), sizes in read.items())
  assert {len(sizes) for sizes in read.values()} == {1, 4}


def test_fingerprints_are_those_of_earlier_checkpoints():
  tree = {"b": {"bias": np.arange(2, dtype=np.float32)}, "a": np.ones((), np.float32)}
  digest = hashlib.sha256()
  digest.update(b"a float32 ();" + tree["a"].tobytes())
  digest.update(b"b/bias float32 (2,);" + tree["b"]["bias"].tobytes())
  assert models_cases.fingerprint(tree) == digest.hexdigest()
  assert pretrained.load("emoji-sd", identify=True).fingerprint == EMOJI_SD


@pytest.fixture(scope="module")
def large(tmp_path_factory):
  """A model of which nothing else that a process holds is nearly as large."""
  model = models_cases.tiny_pipeline()
  # 156 MiB are in the UNet; nearly half of them in arrays of a tenth of the model.
  config = dataclasses.replace(
    model.unet.config, block_out_channels=(224, 448), attention_head_dim=(8, 8)
  )
  network = unet.UNet2DCondition(config)
  params = architectures.random_params(param_shapes(network), 0)
  root = tmp_path_factory.mktemp("large") / "model"
  params = {**model.params, "unet": params}
  pretrained.save(root, dataclasses.replace(model, unet=network, params=params))
  return root


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="as Linux counts memory")
def test_the_host_holds_no_second_copy(large, saved):
  environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
  done = subprocess.run(
    [sys.executable, "-c", _PROGRAM, str(saved[0]), str(large)],
    env=os.environ | environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  size = sum(file.stat().st_size for file in large.rglob("*.safetensors")) / 2**20
  rises = [float(word) for word in done.stdout.split()]
  # 20 % more, and what does not depend on the size.
  assert len(rises) == 2 and all(0.8 * size < rise < 1.2 * size + 10 for rise in rises)
