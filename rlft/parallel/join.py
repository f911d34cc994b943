"""Several processes, on one or many hosts, that become one run: found, joined, watched and left."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import ctypes
import dataclasses
import functools
import glob
import logging
import os
import socket
import threading
import time
from typing import Any, NoReturn
import urllib.request

import jax
from jax._src import distributed  # What Orbax takes, too: there is no public way to the store.
from jax._src.lib import utils  # The only way to the level of what C++ prints.

from rlft.config.fields import option
from rlft.parallel import watch as watch_lib
from rlft.parallel.watch import FAILED, Watch
from rlft.types import UserError

_KEYS = "rlft/processes/"
_TPU_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_PORT_TRIES = 5  # a second apart
_JOIN_S = 300  # in which all processes must have come
_SAID_S = 15.0  # after which it is said that they are waited for
_log = logging.getLogger(__name__)
_watch: list[Watch] = []  # of this process, once it has joined others
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


@dataclasses.dataclass(frozen=True)
class ProcessSettings:
  """Which processes make the run; on TPU pods and under Slurm they find each other."""

  coordinator: str = option(
    "HOST:PORT of process 0, the same for all processes; not needed on TPU pods and under Slurm", ""
  )
  num_processes: int | None = option(
    "with --coordinator: number of processes of the run", None, least=1
  )
  process_id: int | None = option(
    "with --coordinator: number of this process, from 0", None, least=0
  )
  process_timeout_s: float = option(
    "the others stop when a process has given no sign of life for this many seconds", 45.0, least=5
  )


@contextlib.contextmanager
def joined(settings: ProcessSettings) -> Iterator[None]:
  """Makes one run of all processes, where there are several; one is left as it is.

  Before JAX has started. However the block ends, no process waits for another for ever: what goes
  wrong in one ends all, and each prints one line that names it.

  Raises:
    UserError: settings that contradict each other; processes that do not come.
  """
  arguments = found(settings, os.environ)
  if arguments is None:
    yield
    return
  _initialize(arguments, settings.process_timeout_s)
  state = distributed.global_state
  if state.num_processes == 1:
    yield
    return
  watch = Watch(
    _Store(state.client),
    process=state.process_id,
    count=state.num_processes,
    name=f"{socket.gethostname()}, pid {os.getpid()}",
    timeout_s=settings.process_timeout_s,
  )
  watch.start()
  _watch.append(watch)
  with contextlib.ExitStack() as stack:
    if state.process_id:
      leave = functools.partial(_leave_with_coordinator, state.coordinator_address)
      stack.enter_context(_aborting(leave))
    try:
      yield
    except BaseException as error:
      watch.announce(error)
      watch.leave()
    watch.finish()
    jax.distributed.shutdown()


@contextlib.contextmanager
def announced() -> Iterator[None]:
  """Tells the other processes of an error in the block before anything else is done about it."""
  try:
    yield
  except BaseException as error:
    for watch in _watch:
      watch.announce(error)
    raise


def found(
  settings: ProcessSettings,
  environment: Mapping[str, str],
  pod_workers: Callable[[Mapping[str, str]], int] | None = None,
) -> dict[str, Any] | None:
  """How `jax.distributed.initialize` is to be called; None where this process is the only one.

  Args:
    settings: what the user says goes first.
    environment: of Slurm and of TPUs, where they start the processes.
    pod_workers: counts the hosts of a TPU pod; `tpu_workers` if None.

  Raises:
    UserError: part of the settings is missing, or they contradict each other.
  """
  given = {
    "coordinator": settings.coordinator or None,
    "num_processes": settings.num_processes,
    "process_id": settings.process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if len(missing) < len(given):
    if missing:
      raise UserError(
        f"--{missing[0]} is missing: of several processes each is given --coordinator,"
        " --num_processes and --process_id"
      )
    host, colon, port = settings.coordinator.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
      raise UserError(f"--coordinator={settings.coordinator} is not HOST:PORT: give one")
    if settings.process_id >= settings.num_processes:
      raise UserError(
        f"--process_id={settings.process_id} is not below --num_processes="
        f"{settings.num_processes}: the first process is 0"
      )
    if settings.num_processes == 1:
      return None
    return {
      "coordinator_address": settings.coordinator,
      "num_processes": settings.num_processes,
      "process_id": settings.process_id,
      "cluster_detection_method": "deactivate",
    }
  # The script that srun is called in has the counts of the job, too, but is no task of a step.
  if all(key in environment for key in (*_SLURM, "SLURM_STEP_NUM_TASKS")):
    if int(environment["SLURM_STEP_NUM_TASKS"]) > 1:
      return {"local_device_ids": slurm_devices(environment)}
    return None
  return {} if (pod_workers or tpu_workers)(environment) > 1 else None


def slurm_devices(environment: Mapping[str, str]) -> list[int] | None:
  """The GPUs of a task of Slurm, among those that it sees; None leaves it to JAX.

  JAX gives the n-th task of a node the n-th GPU that it sees. That fits a GPU for each task that
  sees them all, but leaves GPUs idle where a node has one task, and fails where each task sees no
  more than its own.
  """
  visible = environment.get("CUDA_VISIBLE_DEVICES", "")
  if not visible:
    return None
  count = len(visible.split(","))
  tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0].partition(",")[0]
  return list(range(count)) if count == 1 or tasks == "1" else None


def tpu_workers(environment: Mapping[str, str]) -> int:
  """How many hosts the TPU of this host has; 0 where there is no TPU, or JAX is not to use it."""
  if environment.get("JAX_PLATFORMS", "tpu").partition(",")[0] != "tpu":
    return 0
  if not glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"):
    return 0
  # In Kubernetes the environment tells; on a virtual machine its metadata do.
  hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
  slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
  if not hosts:
    request = urllib.request.Request(
      f"{_TPU_METADATA}worker-network-endpoints", headers={"Metadata-Flavor": "Google"}
    )
    try:
      with urllib.request.urlopen(request, timeout=10) as answer:
        hosts = answer.read().decode()
    except OSError:  # A GPU's /dev/vfio, or a TPU elsewhere than at Google.
      return 0
  return slices * len(hosts.split(","))


def _initialize(arguments: Mapping[str, Any], timeout_s: float) -> None:
  # What SIGTERM does is ours, see rlft/run/preemption.py; JAX's handler would swallow those that
  # come before training.
  jax.config.update("jax_enable_preemption_service", False)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
  where = f" at {arguments['coordinator_address']}" if "coordinator_address" in arguments else ""
  not_met = (
    f"the processes of this run did not meet{where} in {_JOIN_S} s: start all of them, each with"
    " its own --process_id, and see whether they can reach that host and port"
  )
  said = threading.Timer(_SAID_S, _log.warning, [f"waiting for the other processes{where}"])
  said.daemon = True
  said.start()
  try:
    # Worth another try: one of them may be late.
    with _aborting(lambda: watch_lib.leave(not_met, FAILED)):
      jax.distributed.initialize(
        **arguments,
        initialization_timeout=_JOIN_S,
        # JAX's own watch aborts without saying who is gone: it comes second.
        heartbeat_timeout_seconds=max(100, round(2 * timeout_s)),
        shutdown_timeout_seconds=round(timeout_s),
      )
  except (RuntimeError, ValueError) as error:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    watch_lib.leave(f"{not_met} ({reason})", FAILED)
  finally:
    said.cancel()


class _Store:
  """The key-value store of JAX's coordinator, which is part of process 0."""

  def __init__(self, client: Any):
    self._client = client

  def write(self, process: int, sign: str) -> None:
    self._client.key_value_set(f"{_KEYS}{process}", sign, allow_overwrite=True)

  def read(self) -> Mapping[int, str]:
    return {
      int(key.rpartition("/")[2]): sign for key, sign in self._client.key_value_dir_get(_KEYS)
    }


@contextlib.contextmanager
def _aborting(leave: Callable[[], NoReturn]) -> Iterator[None]:
  """Has `leave` called where JAX aborts this process.

  JAX lets no function be called then, and prints a stack of C++.
  """
  if os.environ.get("TF_CPP_MIN_LOG_LEVEL") != "0":  # JAX sets 1.
    utils.absl_set_min_log_level(4)  # Nothing of what C++ says; its errors are raised, too.
  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: leave())
  libc = ctypes.CDLL(None)
  libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
  # SIGABRT; Python's own handlers run only after it.
  before = libc.signal(6, ctypes.cast(handler, ctypes.c_void_p))
  try:
    yield
  finally:
    libc.signal(6, before)


def _leave_with_coordinator(address: str) -> NoReturn:
  """Ends this process, which JAX has aborted, as it does once process 0 (at `address`) is gone."""
  host, _, port = address.rpartition(":")
  # The port of a process that is just dying may answer for a moment.
  for _ in range(_PORT_TRIES):
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
      watch_lib.leave(
        f"process 0 (at {address}) has died, and all processes stop: run the same command again"
        " to go on from the last checkpoint",
        FAILED,
      )
    time.sleep(1)
  what = "JAX has aborted this process; why, it prints with TF_CPP_MIN_LOG_LEVEL=0 before the"
  watch_lib.leave(f"{what} command", FAILED)
