"""Processes that start within a moment: forked from one that has imported what they need.

The parent has no threads and has asked JAX for no devices, so what is forked from it is as good as
a process of its own: it has its own devices, signals, and end.
"""

from collections.abc import Mapping, Sequence
import gc
import json
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys
import time
from typing import Any


def free_port() -> int:
  """A port of the loopback at which nobody listens."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


class Nursery:
  """The parent; an end of the process that made it, or `close`, ends it, but not its children."""

  def __init__(self, environment: Mapping[str, str]):
    """Starts it with an environment, which its children have, too."""
    self._parent = subprocess.Popen(
      [sys.executable, __file__],
      env=environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def start(
    self,
    command: Sequence[Any],
    said: pathlib.Path,
    cwd: pathlib.Path | None = None,
    **environment: str,
  ) -> "Forked":
    """Starts a script; what it prints goes into the files `said` and `said`.errors.

    Args:
      command: the script and its arguments.
      said: the file.
      cwd: where it runs, if not where the parent does.
      **environment: further variables; JAX has read its own.
    """
    request = {"command": [*map(str, command)], "said": str(said), "environment": environment}
    return Forked(self, self.ask(request | {"cwd": str(cwd or pathlib.Path.cwd())}), said)

  def start_run(self, command: Sequence[Any], said: pathlib.Path, processes: int) -> list["Forked"]:
    """Starts all processes of a run; what the i-th prints goes into the files `said`_i."""
    if processes > 1:
      command = [
        *command,
        f"--coordinator=127.0.0.1:{free_port()}",
        f"--num_processes={processes}",
      ]
    return [
      self.start(
        [*command, f"--process_id={i}"] if processes > 1 else command,
        said.with_name(f"{said.name}_{i}"),
      )
      for i in range(processes)
    ]

  def ask(self, request: Any) -> Any:
    self._parent.stdin.write(json.dumps(request) + "\n")
    self._parent.stdin.flush()
    return json.loads(self._parent.stdout.readline())

  def close(self) -> None:
    self._parent.communicate()


class Forked:
  """A process; `returncode` is as that of `subprocess.Popen`."""

  def __init__(self, nursery: Nursery, pid: int, said: pathlib.Path):
    self.pid, self.returncode = pid, None
    self._nursery, self._said = nursery, said

  def output(self) -> str:
    return self._said.read_text()

  def errors(self) -> str:
    return pathlib.Path(f"{self._said}.errors").read_text()

  def poll(self) -> int | None:
    """The exit status, or None while it runs."""
    if self.returncode is None:
      self.returncode = self._nursery.ask(self.pid)
    return self.returncode

  def send_signal(self, number: int) -> None:
    if self.poll() is None:
      os.kill(self.pid, number)

  def wait(self, timeout: float) -> int:
    """The exit status; raises subprocess.TimeoutExpired."""
    deadline = time.monotonic() + timeout
    while self.poll() is None:
      if time.monotonic() > deadline:
        raise subprocess.TimeoutExpired(str(self.pid), timeout)
      time.sleep(0.02)
    return self.returncode

  def kill(self) -> None:
    """Ends it, if it has not ended."""
    self.send_signal(signal.SIGKILL)
    self.wait(60)


def _status(pid: int) -> int | None:
  found, status = os.waitpid(pid, os.WNOHANG)
  return os.waitstatus_to_exitcode(status) if found else None


def _become(request: Mapping[str, Any], streams: Sequence[int]) -> None:
  for number, stream in enumerate(streams):
    os.dup2(stream, number)
    os.close(stream)
  os.chdir(request["cwd"])
  os.environ.update(request["environment"])
  command = sys.argv[:] = request["command"]
  runpy.run_path(command[0], run_name="__main__")


def _main() -> None:
  gc.set_threshold(50_000)  # As in conftest.py.
  import rlft.performance.compile.plan
  import rlft.train  # noqa: F401

  gc.freeze()
  for line in sys.stdin:
    request = json.loads(line)
    if isinstance(request, int):
      answer = _status(request)
    else:
      said = request["said"]
      paths = os.devnull, said, f"{said}.errors"
      streams = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644) for path in paths]
      if not (answer := os.fork()):
        return _become(request, streams)
      for stream in streams:
        os.close(stream)
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
  _main()
