"""Does every kind of harm to a small run, at random moments, and sees whether anything is lost.

    python experiments/faults.py --faults=200 --seed=1 --workdir=/tmp/faults

A run of launch/train.py on the tests' tiny model is harmed, started again with the same command,
harmed again, and so on to its end, where its whole state and every number in metrics.jsonl must be
those of a run that nobody disturbed, bit for bit; then the next run begins. A fault is recovered
from if the harmed process ended as it should, with one line and no traceback, the next one went on
from the last good checkpoint and made another, and the run ended with the same bits. What became of
each fault is kept in WORKDIR/results.jsonl, so the command goes on where it was stopped.

Needs the extra `test`. A fault takes about 8 s of a core; experiments/faults.md has what this
printed here.
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

from absl import app, flags

_ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(_ROOT / "tests"))

import train_cases as cases  # noqa: E402

from rlft.config.settings import Config  # noqa: E402
from rlft.storage import files  # noqa: E402

_FAULTS = flags.DEFINE_integer("faults", 24, "how many", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of the moments and of what is damaged")
_WORKDIR = flags.DEFINE_string("workdir", None, "directory of everything", required=True)
_KINDS = flags.DEFINE_list("kinds", None, "only these kinds of fault, by name")

ITERATIONS = 24  # of a run; one takes about 0.3 s, so there is time to harm it
_MARGIN = 6  # last iterations, in which a run is left alone: it may end before it is harmed
_PATIENCE_S = 1200.0  # a process that needs longer hangs
_SERVER = _ROOT / "experiments" / "rewards" / "remote_server.py"
_REWARDS = """
import pathlib
import time

import numpy as np

_FAULT = pathlib.Path(__file__).with_name("fault")


def local(images, prompts, metadata):
  time.sleep(0.1)
  how = _FAULT.read_text() if _FAULT.exists() else ""
  if how == "raises":
    raise ValueError("no luck")
  if how == "hangs":
    time.sleep(3600)
  return np.full(len(images), np.nan) if how == "nan" else images[..., 1].mean((1, 2))


def served(images, prompts, metadata):
  time.sleep(0.1)
  return images[..., 0].mean((1, 2))
"""


class Bench:
  """The folder of all runs, a reward server, and the run that is being harmed."""

  def __init__(self, folder: pathlib.Path, iterations: int = ITERATIONS):
    self.folder, self.iterations, self.chain = folder, iterations, 0
    self._server = None
    if not (folder / "port").exists():
      shutil.rmtree(folder / "tiny", ignore_errors=True)
      cases.make_folder(folder / "tiny")
      (folder / "tiny" / "rewards.py").write_text(_REWARDS)
      with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    self.fault = folder / "tiny" / "fault"
    self.fault.unlink(missing_ok=True)

  @property
  def workdir(self) -> pathlib.Path:
    return self.folder / f"run_{self.chain}"

  @property
  def checkpoints(self) -> pathlib.Path:
    return self.workdir / "checkpoints"

  def config(self, workdir: pathlib.Path) -> Config:
    tiny, port = self.folder / "tiny", (self.folder / "port").read_text()
    address = f"http://127.0.0.1:{port}/v2/models/served?retries=2"
    tasks = (
      cases.task(tiny, "local", "host:local"),
      dataclasses.replace(cases.task(tiny, "served"), reward=address),
    )
    return cases.config(
      tiny,
      workdir,
      task=tasks,
      iterations=self.iterations,
      pretrain_weight=0.0,
      checkpoint_every=1,
      reward_timeout_s=20.0,
    )

  def serve(self) -> None:
    """Starts the reward server where it is not running."""
    if self._server is None:
      port, model = (self.folder / "port").read_text(), self.folder / "tiny" / "rewards.py"
      command = [sys.executable, _SERVER, f"--model={model}:served", f"--port={port}"]
      self._server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
      self._server.stdout.readline()

  def kill_server(self) -> None:
    if self._server is not None:
      self._server.kill()
      self._server.communicate()
      self._server = None

  def start(self) -> "Process":
    """Starts the run, or lets it go on."""
    self.serve()
    return Process(cases.start(self.config(self.workdir), self.folder / "tiny" / "cache"))

  def reference(self) -> pathlib.Path:
    """The workdir of the run that nobody disturbed."""
    workdir = self.folder / "reference"
    if not (workdir / "report.html").exists():
      shutil.rmtree(workdir, ignore_errors=True)
      self.serve()
      process = Process(cases.start(self.config(workdir), self.folder / "tiny" / "cache"))
      if process.end():
        raise SystemExit(f"the undisturbed run failed: {process.errors()}")
    return workdir

  def saved(self) -> list[str]:
    """Names of the whole checkpoints, oldest first."""
    names = os.listdir(self.checkpoints) if self.checkpoints.exists() else []
    return sorted((name for name in names if _place(name)), key=_place)

  def iterations_done(self) -> int:
    """Those that the newest checkpoint has."""
    return _place(self.saved()[-1])[0] if self.saved() else 0


def _place(name: str) -> tuple[int, int] | None:
  """(iteration, task) of a checkpoint's name."""
  found = re.fullmatch(r"iteration_(\d+)(?:_task_(\d+))?", name)
  return (int(found[1]), int(found[2] or 0)) if found else None


class Process:
  """A process of the run, and what it says."""

  def __init__(self, process: subprocess.Popen):
    self.process, self.hung, self._lines = process, False, []
    self._readers = [
      threading.Thread(target=self._read, args=(stream, keep), daemon=True)
      for stream, keep in ((process.stderr, self._lines), (process.stdout, []))
    ]
    for reader in self._readers:
      reader.start()

  def _read(self, stream, keep: list[str]) -> None:
    for line in stream:
      keep.append(line)

  def errors(self) -> str:
    return "".join(self._lines)

  def wait_for(self, condition: Callable[[], bool]) -> bool:
    """Returns True when the condition holds; False if the process ends or hangs before."""
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
      if self.process.poll() is not None:
        return condition()
      if time.monotonic() > deadline:
        self.hung = True
        return False
      time.sleep(0.02)
    return True

  def end(self) -> int:
    """The exit status; one that hangs is killed."""
    try:
      self.process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
      self.hung = True
      self.process.kill()
      self.process.wait()
    for reader in self._readers:
      reader.join()
    return self.process.returncode


# ---------------------------------------------------------------------------- kinds of fault


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of fault.

  Attributes:
    name: in the table.
    harm: `(bench, process, random numbers)`; does it, while the process runs.
    statuses: how the process may end; None if it goes on.
    damage: what is then done to the newest checkpoint.
    early: strikes at any moment after the start, also before the run has gone on.
  """

  name: str
  harm: Callable[[Bench, Process, random.Random], None]
  statuses: Sequence[int] | None
  damage: Callable[[pathlib.Path, random.Random], None] | None = None
  early: bool = False


def _signals(*numbers: int) -> Callable[[Bench, Process, random.Random], None]:
  def harm(bench, process, draw):
    for number in numbers:
      process.process.send_signal(number)
      time.sleep(draw.uniform(0, 0.3))

  return harm


def _reward(how: str) -> Callable[[Bench, Process, random.Random], None]:
  return lambda bench, process, draw: bench.fault.write_text(how)


def _fill_disk(bench: Bench, process: Process, draw: random.Random) -> None:
  """Lets no file of the process become longer, which a full disk does to it, too."""
  longest = max(path.stat().st_size for path in _files(bench.checkpoints / bench.saved()[-1]))
  limit = draw.randrange(longest)
  resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def _second_run(bench: Bench, process: Process, draw: random.Random) -> None:
  """Starts the same command beside the process, which stands still so long."""
  process.process.send_signal(signal.SIGSTOP)
  second = bench.start()
  status, errors = second.end(), second.errors()
  process.process.send_signal(signal.SIGCONT)
  if status != 2 or "is being written to by process" not in errors or "Traceback" in errors:
    raise Lost(f"a second run ended with {status}: {errors}")


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
  """Those of a checkpoint that something is restored from."""
  late = (directory / "_CHECKPOINT_METADATA", directory / "commit_success.txt")
  return sorted(path for path in directory.rglob("*") if path.is_file() and path not in late)


def _flip(step: pathlib.Path, draw: random.Random) -> None:
  # By size: any bit of the checkpoint may be the one.
  found = [path for path in _files(step) if path.stat().st_size]
  path = draw.choices(found, [path.stat().st_size for path in found])[0]
  content = bytearray(path.read_bytes())
  content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
  path.write_bytes(content)


def _truncate(step: pathlib.Path, draw: random.Random) -> None:
  path = draw.choice([path for path in _files(step) if path.stat().st_size])
  os.truncate(path, draw.randrange(path.stat().st_size))


def _delete(step: pathlib.Path, draw: random.Random) -> None:
  draw.choice(_files(step)).unlink()


_KILL = _signals(signal.SIGKILL)
KINDS = (
  Kind("kill -9", _KILL, [-9]),
  Kind("SIGTERM", _signals(signal.SIGTERM), [0]),
  Kind("SIGUSR1", _signals(signal.SIGUSR1), [0]),
  # The second may come when all is saved and Python is about to end.
  Kind("SIGTERM twice", _signals(signal.SIGTERM, signal.SIGTERM), [0, -15]),
  Kind("kill -9 at the start", _KILL, [-9], early=True),
  Kind("disk full", _fill_disk, [2]),
  Kind("bit flipped", _KILL, [-9], _flip),
  Kind("file truncated", _KILL, [-9], _truncate),
  Kind("file missing", _KILL, [-9], _delete),
  Kind("reward NaN", _reward("nan"), [2]),
  Kind("reward raises", _reward("raises"), [2]),
  Kind("reward hangs", _reward("hangs"), [2]),
  Kind("reward server killed", lambda bench, process, draw: bench.kill_server(), [2]),
  Kind("second run", _second_run, None),
)


# ---------------------------------------------------------------------------- one after another


class Lost(Exception):
  """A run did not survive; the message says what was seen."""


@dataclasses.dataclass
class Fault:
  """What became of a fault; `number` counts all, `chain` the runs."""

  number: int
  chain: int
  kind: str
  seen: str = ""
  hung: bool = False
  traceback: bool = False


class Harness:
  """Harms one run after another until there were enough faults."""

  def __init__(self, bench: Bench, results: files.Path, seed: int, kinds: Sequence[Kind]):
    self._bench, self._results, self._seed, self._kinds = bench, results, seed, kinds
    self._done = [Fault(**line) for line in files.read_jsonl(results)]
    bench.chain = max((fault.chain for fault in self._done), default=-1) + 1

  def run(self, faults: int) -> list[Fault]:
    """What became of each fault. A run that was going on when this was stopped is begun anew."""
    self._bench.reference()
    while len(self._done) < faults:
      shutil.rmtree(self._bench.workdir, ignore_errors=True)
      chain: list[Fault] = []
      try:
        self._harm_one_run(chain, faults - len(self._done))
        shutil.rmtree(self._bench.workdir)
      except Lost as error:
        if chain:
          chain[-1].seen = chain[-1].seen or str(error)
        else:
          raise SystemExit(f"a run failed before it was harmed: {error}") from error
      self._done += chain
      content = "".join(json.dumps(dataclasses.asdict(fault)) + "\n" for fault in self._done)
      files.write_atomic(self._results, content)
      self._bench.chain += 1
    return self._done

  def _harm_one_run(self, chain: list[Fault], most: int) -> None:
    """Appends to `chain` what is done to a run, until it has ended; raises `Lost`."""
    bench = self._bench
    process, expected = bench.start(), None
    try:
      while True:
        number = len(self._done) + len(chain)
        draw = random.Random(f"{self._seed} {number}")
        kind = self._kinds[number % len(self._kinds)]
        finish = len(chain) == most
        if kind.early and not finish:
          time.sleep(draw.uniform(0, 8))
        else:
          self._go_on(process, chain, expected)
          time.sleep(draw.uniform(0, 1))
        if finish or bench.iterations_done() > bench.iterations - _MARGIN:
          break
        chain.append(Fault(number, bench.chain, kind.name))
        process, expected = self._harm(kind, process, draw, chain[-1])
      if status := process.end():
        raise Lost(f"ended with {status}: {process.errors()}")
      self._compare()
    finally:
      with contextlib.suppress(ProcessLookupError):
        process.process.kill()
      process.end()
      bench.fault.unlink(missing_ok=True)

  def _go_on(self, process: Process, chain: Sequence[Fault], expected: int | None) -> None:
    """Waits until a run has made two checkpoints and, if it was harmed, one more than before."""
    bench = self._bench
    before = max(map(_place, bench.saved()), default=(0, 0))

    def goes_on():
      saved = bench.saved()
      ended = bench.iterations_done() == bench.iterations
      return len(saved) > 1 and (_place(saved[-1]) > before or ended)

    going = process.wait_for(goes_on)
    errors = process.errors()
    if chain:
      chain[-1].hung |= process.hung
      chain[-1].traceback |= "Traceback" in errors
    if not going:
      raise Lost(f"did not go on: {errors}")
    if expected is not None and f"at iteration {expected}\n" not in errors:
      raise Lost(f"did not go on from iteration {expected}: {errors}")
    if chain:
      print(f"fault {chain[-1].number} ({chain[-1].kind}): goes on", flush=True)

  def _harm(
    self, kind: Kind, process: Process, draw: random.Random, fault: Fault
  ) -> tuple[Process, int | None]:
    """Does a fault; the process that goes on, and from which iteration it must."""
    bench = self._bench
    kind.harm(bench, process, draw)
    if kind.statuses is None:
      return process, None
    status, errors = process.end(), process.errors()
    fault.hung, fault.traceback = process.hung, "Traceback" in errors
    bench.fault.unlink(missing_ok=True)
    if status not in kind.statuses or (status == 2) != (errors.count("error: ") == 1):
      raise Lost(f"{kind.name} ended with {status}: {errors}")
    left = [path.name for path in bench.workdir.iterdir() if path.name.endswith(".tmp")]
    if left and status >= 0:  # Nobody cleans up behind one that is killed.
      raise Lost(f"{kind.name} left {left}")
    saved = bench.saved()
    if kind.damage is not None:
      kind.damage(bench.checkpoints / saved.pop(), draw)
    return bench.start(), _place(saved[-1])[0] if saved else None

  def _compare(self) -> None:
    """Raises `Lost` where the run is not, bit for bit, the one that nobody disturbed."""
    try:
      cases.assert_same_run(self._bench.workdir, self._bench.reference())
    except AssertionError as error:
      raise Lost(f"other numbers: {error}") from error


def table(faults: Sequence[Fault], kinds: Sequence[Kind] = KINDS) -> str:
  """By kind: how many were done, recovered from, lost, and how many hung or printed tracebacks."""
  lines = [
    "| fault | injected | recovered | lost | hangs | tracebacks |",
    "|---|---|---|---|---|---|",
  ]
  groups = [(kind.name, [one for one in faults if one.kind == kind.name]) for kind in kinds]
  for name, group in [*groups, ("**all**", list(faults))]:
    lost = sum(bool(one.seen) for one in group)
    hung, traced = (sum(getattr(one, key) for one in group) for key in ("hung", "traceback"))
    numbers = (len(group), len(group) - lost, lost, hung, traced)
    lines.append(f"| {name} | {' | '.join(map(str, numbers))} |")
  return "\n".join(lines)


def main(_: Sequence[str]) -> None:
  folder = pathlib.Path(_WORKDIR.value).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  kinds = [kind for kind in KINDS if _KINDS.value is None or kind.name in _KINDS.value]
  bench = Bench(folder)
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # Or the run would be left alone.
  try:
    done = Harness(bench, folder / "results.jsonl", _SEED.value, kinds).run(_FAULTS.value)
  finally:
    bench.kill_server()
  print(table(done))
  for fault in done:
    if fault.seen:
      print(f"fault {fault.number} ({fault.kind}, run {fault.chain}): {fault.seen}")


if __name__ == "__main__":
  app.run(main)
