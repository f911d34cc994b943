"""Devices that are not here: TPUs and GPUs by their names, with and without their compilers."""

import types

import jax
import jax.numpy as jnp
import pytest

from rlft.config.settings import DeviceSettings
from rlft.performance.compile import ahead, chips, hlo, targets
from rlft.performance.compile.abstract_run import Call
from rlft.performance.compile.chips import CHIPS, GIB
from rlft.types import UserError

FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@pytest.fixture
def asked(monkeypatch):
  """What the compilers are asked for; the devices are this machine's."""
  calls = []

  def get_topology_desc(**described):
    calls.append(described)
    return types.SimpleNamespace(devices=jax.devices())

  monkeypatch.setattr(targets.topologies, "get_topology_desc", get_topology_desc)
  monkeypatch.setattr(targets, "_cuda_plugin", lambda: "cuda12")
  for name in FRACTIONS:
    monkeypatch.delenv(name, raising=False)
  return calls


def test_gpus_are_described_to_their_compiler(asked):
  target = targets.open_target("h100:8", 4)
  (call,) = asked
  assert call["platform"] == "cuda" and call["topology"] == "1x1x8"
  for line in (
    'device_description_str: "NVIDIA H100 80GB HBM3"',
    "cuda_compute_capability { major: 9 }",
    "core_count: 132",
    "memory_bandwidth: 3350000000000",
    "device_memory_size: 80000000000",
  ):
    assert line in call["target_config"]
  assert (target.platform, target.processes, target.chips) == ("cuda", 1, 8)
  assert dict(target.mesh.shape) == {"data": 2, "fsdp": 4} and target.compiles
  assert target.memory == 0.75 * 80e9 and target.chip == CHIPS["h100"]


def test_several_machines_have_a_process_each(asked):
  target = targets.open_target("a100:16", 1)
  assert asked[0]["topology"] == "1x2x8" and "A100" in asked[0]["target_config"]
  assert target.processes == 2 and target.chips == 16


@pytest.mark.parametrize("name", FRACTIONS)
def test_a_run_that_takes_more_of_the_memory_has_more(asked, monkeypatch, name):
  monkeypatch.setenv(name, "0.9")
  assert targets.open_target("a100:8", 1).memory == 0.9 * 80e9


@pytest.mark.parametrize("name", ["h100:12", "h100:0", "h100:2x4", "b200:8"])
def test_what_is_no_number_of_gpus(asked, name):
  with pytest.raises(UserError, match=f"--target={name} is n"):
    targets.open_target(name, 1)
  assert not asked


@pytest.mark.parametrize(
  ("name", "chip_count", "processes"),
  [("v5e:2x4", 8, 1), ("v6e:2x4", 8, 1), ("v5p:2x2x2", 8, 2), ("v4:2x2x1", 4, 1)],
)
def test_tpus_without_their_compiler(monkeypatch, name, chip_count, processes):
  monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
  target = targets.open_target(name, 1)
  assert (target.platform, target.compiles, target.mesh.size) == ("tpu", False, 8)
  assert (target.chips, target.processes) == (chip_count, processes)
  assert target.memory == target.chip.memory * chip_count / 8


def test_without_their_compiler_programs_of_gpus_are_estimated(monkeypatch):
  monkeypatch.setattr(targets, "_cuda_plugin", lambda: "")
  target = targets.open_target("h200:8", 2)
  assert target.mesh.size == 8 and target.chip == CHIPS["h200"] and not target.compiles
  rows = jax.ShapeDtypeStruct(
    (16, 64), jnp.float32, sharding=jax.NamedSharding(target.mesh, jax.P(("data", "fsdp")))
  )
  program = jax.jit(lambda x, count: (x @ x.T) * count, static_argnums=1)
  found = ahead.compile_program(Call("a", program, (rows, 3), 1, 16, {}), target)
  assert found.estimated and found.peak == found.arguments == 2 * 64 * 4
  assert found.flops == 2 * 16 * 16 * 64


def test_gpus_that_are_not_here_compile():
  pytest.importorskip("jax_cuda12_plugin")
  target = targets.open_target("h100:8", 4)
  rows = jax.ShapeDtypeStruct(
    (64, 64), jnp.bfloat16, sharding=jax.NamedSharding(target.mesh, jax.P(("data", "fsdp")))
  )
  program = jax.jit(lambda x: (x @ x.T).sum())
  found = ahead.compile_program(Call("a", program, (rows,), 1, 64, {}), target)
  assert not found.estimated and found.arguments == 8 * 64 * 2
  assert set(found.collectives) & set(hlo.KINDS)


def test_the_devices_that_are_here():
  target = targets.open_here(DeviceSettings(fsdp=4))
  assert (target.name, target.platform, target.chip) == ("cpu:8", "cpu", None)
  assert dict(target.mesh.shape) == {"data": 2, "fsdp": 4} and target.processes == 1


def test_accelerators_that_are_here(monkeypatch):
  # The two cores of each chip are devices that share its memory.
  devices = [
    types.SimpleNamespace(id=i, device_kind="TPU v4", coords=(i // 2, 0, 0)) for i in range(8)
  ]
  monkeypatch.setattr(targets.jax, "devices", lambda: devices)
  monkeypatch.setattr(targets.jax, "default_backend", lambda: "tpu")
  monkeypatch.setattr(targets.jax, "process_count", lambda: 2)
  monkeypatch.setattr(targets, "_mesh", lambda name, devices, fsdp: None)
  target = targets.open_here(DeviceSettings())
  assert (target.name, target.platform, target.chips) == ("v4:8", "tpu", 4)
  assert target.memory == 31.75 * GIB / 2 and target.processes == 2


@pytest.mark.parametrize(
  ("kind", "name"),
  [
    ("TPU v5 lite", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v6 lite", "v6e"),
    ("NVIDIA A100-SXM4-80GB", "a100"),
    ("NVIDIA H200", "h200"),
    ("NVIDIA T4", ""),
  ],
)
def test_chips_by_what_jax_calls_them(kind, name):
  assert chips.name_of(kind) == name


def test_the_table_has_every_target():
  assert set(targets._TPUS) | set(targets._GPUS) == set(CHIPS)
  for chip in CHIPS.values():
    # Bytes a second are far fewer than operations; a slip of a unit would show.
    assert 100 < chip.flops / chip.memory_rate < 700
    assert 2 < chip.memory_rate / chip.link_rate < 12
