"""Who makes a run of several processes, by settings and by environment."""

import glob
import socket
import subprocess
import sys
import urllib.request

import jax
import pytest

from rlft.parallel import join
from rlft.parallel.join import ProcessSettings
from rlft.types import UserError

# A task of `srun --ntasks=4 --ntasks-per-node=2`, as Slurm 23 starts it.
TASK = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "n[1-2]",
  "SLURM_STEP_NUM_TASKS": "4",
  "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
  "SLURM_NTASKS": "4",
  "SLURM_PROCID": "3",
  "SLURM_LOCALID": "1",
}


def found(environment=(), **settings):
  return join.found(ProcessSettings(**settings), dict(environment), lambda _: 0)


def test_one_process_is_left_alone():
  assert found() is None
  assert found(coordinator="h:1", num_processes=1, process_id=0) is None
  before = jax.config.jax_cpu_collectives_implementation
  with join.joined(ProcessSettings()):
    assert jax.process_count() == 1
  assert jax.config.jax_cpu_collectives_implementation == before


def test_settings():
  assert found(coordinator="[::1]:12", num_processes=2, process_id=1, environment=TASK) == {
    "coordinator_address": "[::1]:12",
    "num_processes": 2,
    "process_id": 1,
    "cluster_detection_method": "deactivate",
  }


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    ({"coordinator": "h:1", "num_processes": 2}, "--process_id is missing"),
    ({"process_id": 0}, "--coordinator is missing"),
    ({"coordinator": "h", "num_processes": 2, "process_id": 0}, "--coordinator=h is not HOST:PORT"),
    ({"coordinator": ":1", "num_processes": 2, "process_id": 0}, "is not HOST:PORT"),
    ({"coordinator": "h:65536", "num_processes": 2, "process_id": 0}, "is not HOST:PORT"),
    (
      {"coordinator": "h:1", "num_processes": 2, "process_id": 2},
      "--process_id=2 is not below --num_processes=2: the first process is 0",
    ),
  ],
)
def test_settings_that_contradict_each_other(settings, said):
  with pytest.raises(UserError) as caught:
    found(**settings)
  assert said in str(caught.value)


def test_slurm():
  assert found(TASK) == {"local_device_ids": None}
  assert found(TASK | {"SLURM_STEP_NUM_TASKS": "1"}) is None
  # The batch script, in which srun has not been called, and a shell on the login node.
  steps = ("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE")
  assert found({key: value for key, value in TASK.items() if key not in steps}) is None


@pytest.mark.parametrize(
  ("visible", "tasks", "expected"),
  [
    ("", "2(x2)", None),
    ("0,1", "2(x2)", None),  # JAX takes the one of the task's place.
    ("0,1,2,3", "1(x2)", [0, 1, 2, 3]),
    ("0,1,2,3", "1", [0, 1, 2, 3]),
    ("3", "4,2", [0]),
    ("0,1", "12", None),
  ],
)
def test_devices_of_a_task_of_slurm(visible, tasks, expected):
  environment = TASK | {"CUDA_VISIBLE_DEVICES": visible, "SLURM_STEP_TASKS_PER_NODE": tasks}
  assert join.slurm_devices(environment) == expected


def test_tpu_pods(monkeypatch):
  asked = []

  def answer(request, timeout):
    asked.append(request)
    raise OSError

  monkeypatch.setattr(urllib.request, "urlopen", answer)
  monkeypatch.setattr(glob, "glob", lambda pattern: ["/dev/vfio/0"] if "vfio" in pattern else [])
  assert join.tpu_workers({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}) == 4
  assert join.tpu_workers({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}) == 2
  assert join.tpu_workers({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}) == 0
  assert not asked and join.tpu_workers({}) == 0
  assert asked[0].full_url.endswith("/attributes/worker-network-endpoints")
  assert join.found(ProcessSettings(), {}, lambda _: 4) == {}
  monkeypatch.setattr(glob, "glob", lambda _: [])
  assert join.tpu_workers({"TPU_WORKER_HOSTNAMES": "a,b"}) == 0


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_nobody_meets_says_so_in_one_line(number):
  """JAX aborts it, with a stack of C++."""
  with socket.create_server(("127.0.0.1", 0)) as taken:
    address = f"127.0.0.1:{taken.getsockname()[1]}"
  settings = f"coordinator={address!r}, num_processes=2, process_id={number}"
  program = f"""
from rlft.parallel import join
join._JOIN_S, join._SAID_S = 3, 0.5
with join.joined(join.ProcessSettings({settings})):
  print("met")
"""
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, timeout=100
  )
  *waits, last = done.stderr.splitlines()
  assert (done.returncode, done.stdout) == (1, "")  # Worth another try: one may be late.
  assert last.startswith(
    f"error: the processes of this run did not meet at {address} in 3 s: start"
  )
  assert [line.endswith(f"waiting for the other processes at {address}") for line in waits] == [
    True
  ]
