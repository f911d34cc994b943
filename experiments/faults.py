"""Harms a small run in every way, at random moments, and checks that nothing is lost.

    mkdir /tmp/faults; mount -t tmpfs -o size=64m tmpfs /tmp/faults
    python experiments/faults.py --faults=200 --seed=1 --workdir=/tmp/faults

A run of launch/train.py on the tests' tiny model is harmed, started again with the same command,
harmed again, and so on to its end. Its whole state and every number in metrics.jsonl must then be
those of an undisturbed run, bit for bit. Then the next run begins; every eighth is a run of two
processes. A fault counts as recovered if the harmed process ended as it should, with one line and
no traceback, the next one went on from the last good checkpoint and made another, and the run ended
with the same bits. The outcome of each fault is kept in WORKDIR/results.jsonl, so the command goes
on where it was stopped, and WORKDIR/table.md has the table so far.

Without the small file system, the kind of fault that fills the disk is left out. Needs the extra
`test`. A fault takes about 6 s of a core; experiments/faults.md has what this printed here.
"""

import argparse
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
import subprocess
import sys
import time

_ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(_ROOT / "tests"))

import forked_cases  # noqa: E402
import train_cases as cases  # noqa: E402

from rlft.config.settings import Config  # noqa: E402
from rlft.storage import files  # noqa: E402

ITERATIONS = 24  # of a run; one takes about 0.3 s, so there is time to harm it
_MARGIN = 6  # last iterations, in which a run is left alone: it may end before it is harmed
_PATIENCE_S = 1200.0  # a process that needs longer hangs
_SMALL_DISK = 1 << 30  # bytes; one that is larger is not filled
_SERVER = _ROOT / "experiments" / "rewards" / "remote_server.py"
_REWARDS = """
import pathlib
import time

import numpy as np

_FAULT = pathlib.Path(__file__).with_name("fault")


def _how(which, process=0):
  found = _FAULT.read_text().split() if _FAULT.exists() else []
  return found[1] if found and found[0] == which and found[2:] in ([], [str(process)]) else ""


def _values(images, channel, how):
  time.sleep(0.1)
  if how == "raises":
    raise ValueError("no luck")
  if how == "hangs":
    time.sleep(3600)
  values = images[..., channel].mean((1, 2))
  return {"nan": np.full(len(images), np.nan), "misshapen": values[1:]}.get(how, values)


def local(images, prompts, metadata):
  import jax

  return _values(images, 1, _how("local", jax.process_index()))


def served(images, prompts, metadata):
  return _values(images, 0, _how("served"))
"""


class Bench:
  """The folder of all runs, a reward server, and the run that is being harmed.

  Attributes:
    folder: of everything.
    iterations: of a run.
    processes: of the run that is being harmed.
    chain: its number.
    fault: a file that tells the rewards what to do.
  """

  def __init__(self, folder: pathlib.Path, iterations: int = ITERATIONS):
    self.folder, self.iterations, self.chain, self.processes = folder, iterations, 0, 1
    self._server = None
    tiny = folder / "tiny"
    if not (folder / "port").exists():
      shutil.rmtree(tiny, ignore_errors=True)
      cases.make_folder(tiny)
      (tiny / "rewards.py").write_text(_REWARDS)
      (folder / "port").write_text(str(forked_cases.free_port()))
    self.fault = tiny / "fault"
    self.fault.unlink(missing_ok=True)
    self._nursery = forked_cases.Nursery(cases.environment_of_runs(tiny / "cache"))

  @property
  def workdir(self) -> pathlib.Path:
    return self.folder / f"run_{self.chain}"

  @property
  def checkpoints(self) -> pathlib.Path:
    return self.workdir / "checkpoints"

  @property
  def has_small_disk(self) -> bool:
    return shutil.disk_usage(self.folder).total < _SMALL_DISK

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
      command = [_SERVER, f"--model={model}:served", f"--port={port}"]
      self._server = self._nursery.start(command, self.folder / "served")
      while not (self._server.output() or self._server.poll()):
        time.sleep(0.02)

  def kill_server(self) -> None:
    if self._server is not None:
      self._server.kill()
      self._server = None

  def close(self) -> None:
    self.kill_server()
    self._nursery.close()

  def start(self, workdir: pathlib.Path | None = None, name: str = "said") -> "Started":
    """Starts the run, or lets it go on.

    Args:
      workdir: another one than that of the run that is being harmed.
      name: of the files for what it prints.
    """
    self.serve()
    command = [
      cases.ROOT / "launch" / "train.py",
      *cases.flags(self.config(workdir or self.workdir)),
    ]
    if self.processes > 1:
      command.append("--process_timeout_s=30")
    return Started(self._nursery.start_run(command, self.folder / name, self.processes))

  def reference(self) -> pathlib.Path:
    """The workdir of the run, of as many processes, that nobody disturbed."""
    workdir = self.folder / f"reference_{self.processes}"
    if not (workdir / "report.html").exists():
      shutil.rmtree(workdir, ignore_errors=True)
      started = self.start(workdir)
      if any(started.end()):
        raise SystemExit(f"the undisturbed run failed: {started.errors()}")
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


class Started:
  """The processes of a run, one of which, the victim, is harmed."""

  def __init__(self, processes: Sequence[forked_cases.Forked]):
    self.processes, self.victim, self.hung = processes, 0, False

  def send_signal(self, number: int) -> None:
    """To the victim."""
    self.processes[self.victim].send_signal(number)

  @property
  def others(self) -> list[forked_cases.Forked]:
    return [process for i, process in enumerate(self.processes) if i != self.victim]

  def errors(self) -> str:
    """What all have said."""
    return "".join(process.errors() for process in self.processes)

  def wait_for(self, condition: Callable[[], bool]) -> bool:
    """Returns True when the condition holds; False if a process ends or hangs before."""
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
      if any(process.poll() is not None for process in self.processes):
        return condition()
      if time.monotonic() > deadline:
        self.hung = True
        return False
      time.sleep(0.02)
    return True

  def end(self) -> list[int]:
    """The exit statuses; what hangs is killed."""
    for process in self.processes:
      try:
        process.wait(_PATIENCE_S)
      except subprocess.TimeoutExpired:
        self.hung = True
        process.kill()
    return [process.returncode for process in self.processes]

  def kill(self) -> None:
    for process in self.processes:
      process.kill()


# ---------------------------------------------------------------------------- kinds of fault


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of fault.

  Attributes:
    name: in the table.
    harm: `(bench, started, random numbers)`; does it, while the run goes on.
    statuses: how the victim may end; None if it goes on.
    others: how another process of the run must end; None in a run of one process.
    damage: what is then done to the newest checkpoint.
    early: strikes at any moment after the start, also before the run has gone on.
    fills_disk: needs a disk that may be filled.
  """

  name: str
  harm: Callable[[Bench, Started, random.Random], None]
  statuses: Sequence[int] | None
  _: dataclasses.KW_ONLY
  others: int | None = None
  damage: Callable[[pathlib.Path, random.Random], None] | None = None
  early: bool = False
  fills_disk: bool = False


def _signals(*numbers: int) -> Callable[[Bench, Started, random.Random], None]:
  def harm(bench, started, draw):
    for number in numbers:
      started.send_signal(number)
      time.sleep(draw.uniform(0, 0.3))

  return harm


def _reward(which: str, how: str) -> Callable[[Bench, Started, random.Random], None]:
  return lambda bench, started, draw: bench.fault.write_text(f"{which} {how}")


def _raise_on_one(bench: Bench, started: Started, draw: random.Random) -> None:
  bench.fault.write_text(f"local raises {started.victim}")


def _kill_server(bench: Bench, started: Started, draw: random.Random) -> None:
  bench.kill_server()


def _limit_files(bench: Bench, started: Started, draw: random.Random) -> None:
  """Lets no file of the process become longer, as a quota does."""
  longest = max(path.stat().st_size for path in _files(bench.checkpoints / bench.saved()[-1]))
  limits = draw.randrange(longest), resource.RLIM_INFINITY
  resource.prlimit(started.processes[0].pid, resource.RLIMIT_FSIZE, limits)


def _fill_disk(bench: Bench, started: Started, draw: random.Random) -> None:
  """Leaves less room on the disk than a checkpoint needs, until the run has ended."""
  size = sum(path.stat().st_size for path in _files(bench.checkpoints / bench.saved()[-1]))
  spare, filler = draw.randrange(size), bench.folder / "filler"

  def fill() -> bool:
    # Again and again: a checkpoint that is being written may end, and an older one be deleted.
    room = shutil.disk_usage(bench.folder).free - spare
    with contextlib.suppress(OSError):
      file.write(bytes(max(room, 0)))
    return False

  try:
    with open(filler, "wb", buffering=0) as file:
      started.wait_for(fill)
    started.end()
  finally:
    filler.unlink()


def _second_run(bench: Bench, started: Started, draw: random.Random) -> None:
  """Starts the same command beside the process, which stands still so long."""
  started.send_signal(signal.SIGSTOP)
  second = bench.start(name="second")
  statuses, errors = second.end(), second.errors()
  started.send_signal(signal.SIGCONT)
  if statuses != [2] or "is being written to by process" not in errors or "Traceback" in errors:
    raise Lost(f"a second run ended with {statuses}: {errors}")


def _freeze(bench: Bench, started: Started, draw: random.Random) -> None:
  """Stops the victim until the others have ended."""
  started.send_signal(signal.SIGSTOP)
  with contextlib.suppress(subprocess.TimeoutExpired):
    for other in started.others:
      other.wait(_PATIENCE_S)
  started.send_signal(signal.SIGKILL)


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


_KILL, _TERM = _signals(signal.SIGKILL), _signals(signal.SIGTERM)
KINDS = (
  Kind("kill -9", _KILL, [-9]),
  Kind("SIGTERM", _TERM, [0]),
  Kind("SIGUSR1", _signals(signal.SIGUSR1), [0]),
  # The second may come when all is saved and Python is about to end.
  Kind("SIGTERM twice", _signals(signal.SIGTERM, signal.SIGTERM), [0, -15]),
  Kind("kill -9 at the start", _KILL, [-9], early=True),
  Kind("SIGTERM at the start", _TERM, [0, -15], early=True),
  Kind("disk full", _fill_disk, [2], fills_disk=True),
  Kind("files limited", _limit_files, [2]),
  Kind("bit flipped", _KILL, [-9], damage=_flip),
  Kind("file truncated", _KILL, [-9], damage=_truncate),
  Kind("file missing", _KILL, [-9], damage=_delete),
  Kind("reward NaN", _reward("local", "nan"), [2]),
  Kind("reward raises", _reward("local", "raises"), [2]),
  Kind("reward misshapen", _reward("local", "misshapen"), [2]),
  Kind("reward hangs", _reward("local", "hangs"), [2]),
  Kind("reward server killed", _kill_server, [2]),
  Kind("reward server hangs", _reward("served", "hangs"), [2]),
  Kind("second run", _second_run, None),
  Kind("kill -9 of one of two", _KILL, [-9], others=1),
  Kind("SIGTERM to one of two", _TERM, [0], others=0),
  Kind("one of two frozen", _freeze, [-9], others=1),
  Kind("reward raises on one of two", _raise_on_one, [2], others=2),
)


# ---------------------------------------------------------------------------- one after another


class Lost(Exception):
  """A run did not survive; the message says what was seen."""


@dataclasses.dataclass
class Fault:
  """What became of a fault.

  Attributes:
    number: counts all.
    chain: counts the runs.
    kind: its name.
    seen: why the run is lost.
    seconds: until all processes had ended.
    hung: whether one did not.
    traceback: whether one was printed.
  """

  number: int
  chain: int
  kind: str
  seen: str = ""
  seconds: float = 0.0
  hung: bool = False
  traceback: bool = False


class Harness:
  """Harms one run after another until there were enough faults."""

  def __init__(self, bench: Bench, folder: pathlib.Path, seed: int, kinds: Sequence[Kind]):
    self._bench, self._seed, self._kinds = bench, seed, kinds
    self._results, self._table = folder / "results.jsonl", folder / "table.md"
    self._done = [Fault(**line) for line in files.read_jsonl(self._results)]
    alone, shared = ([k for k in kinds if (k.others is None) == one] for one in (True, False))
    self._turns = [alone] * 7 * bool(alone) + [shared] * bool(shared)
    bench.chain = max((fault.chain for fault in self._done), default=-1) + 1

  def run(self, faults: int) -> list[Fault]:
    """What became of each fault. A run that was going on when this was stopped is begun anew."""
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
      files.write_atomic(self._table, table(self._done, self._kinds) + "\n")
      self._bench.chain += 1
    return self._done

  def _harm_one_run(self, chain: list[Fault], most: int) -> None:
    """Appends to `chain` what is done to a run, until it has ended; raises `Lost`."""
    bench = self._bench
    kinds = self._turns[bench.chain % len(self._turns)]
    bench.processes = 1 if kinds[0].others is None else 2
    reference = bench.reference()
    begun = time.monotonic()
    started, expected = bench.start(), None
    start_s = 0.0  # How long the last one took to go on.
    try:
      while True:
        number = len(self._done) + len(chain)
        draw = random.Random(f"{self._seed} {number}")
        kind = kinds[number % len(kinds)]
        finish = len(chain) == most
        if kind.early and start_s and not finish:
          time.sleep(draw.uniform(0, start_s))
        else:
          self._go_on(started, chain, expected)
          start_s = time.monotonic() - begun
          time.sleep(draw.uniform(0, 1))
        if finish or bench.iterations_done() > bench.iterations - _MARGIN:
          break
        chain.append(Fault(number, bench.chain, kind.name))
        started.victim = draw.randrange(bench.processes)
        expected = self._harm(kind, started, draw, chain[-1])
        if kind.statuses is not None:
          begun = time.monotonic()
          started = bench.start()
      if any(statuses := started.end()):
        raise Lost(f"ended with {statuses}: {started.errors()}")
      self._compare(reference)
    finally:
      started.kill()
      bench.fault.unlink(missing_ok=True)

  def _go_on(self, started: Started, chain: Sequence[Fault], expected: int | None) -> None:
    """Waits until a run has made two checkpoints and, if it was harmed, one more than before."""
    bench = self._bench
    before = max(map(_place, bench.saved()), default=(0, 0))

    def goes_on():
      saved = bench.saved()
      ended = bench.iterations_done() == bench.iterations
      return len(saved) > 1 and (_place(saved[-1]) > before or ended)

    going = started.wait_for(goes_on)
    errors = started.errors()
    if chain:
      chain[-1].hung |= started.hung
      chain[-1].traceback |= "Traceback" in errors
    if not going:
      raise Lost(f"did not go on: {errors}")
    if expected is not None and f"at iteration {expected}\n" not in errors:
      raise Lost(f"did not go on from iteration {expected}: {errors}")
    if chain:
      print(f"fault {chain[-1].number} ({chain[-1].kind}): goes on", flush=True)

  def _harm(self, kind: Kind, started: Started, draw: random.Random, fault: Fault) -> int | None:
    """Does a fault; from which iteration the run must go on."""
    bench, begun = self._bench, time.monotonic()
    kind.harm(bench, started, draw)
    if kind.statuses is None:
      return None
    statuses, errors = started.end(), started.errors()
    fault.seconds = round(time.monotonic() - begun, 1)
    fault.hung, fault.traceback = started.hung, "Traceback" in errors
    bench.fault.unlink(missing_ok=True)
    allowed = [[kind.others]] * bench.processes
    allowed[started.victim] = kind.statuses
    for process, expected in zip(started.processes, allowed, strict=True):
      said = process.errors().count("error: ")
      if process.returncode not in expected or said != (process.returncode > 0):
        raise Lost(f"{kind.name} ended with {statuses}: {errors}")
    left = [path.name for path in bench.workdir.glob("*.tmp")]
    if left and min(statuses) >= 0:  # Nobody cleans up behind one that is killed.
      raise Lost(f"{kind.name} left {left}")
    saved = bench.saved()
    if kind.damage is not None:
      kind.damage(bench.checkpoints / saved.pop(), draw)
    return _place(saved[-1])[0] if saved else None

  def _compare(self, reference: pathlib.Path) -> None:
    """Raises `Lost` where the run is not, bit for bit, the one that nobody disturbed."""
    try:
      cases.assert_same_run(self._bench.workdir, reference)
    except AssertionError as error:
      raise Lost(f"other numbers: {error}") from error


def table(faults: Sequence[Fault], kinds: Sequence[Kind] = KINDS) -> str:
  """By kind: how many were done, recovered from, lost, hung or printed tracebacks; longest end."""
  lines = [
    "| fault | injected | recovered | lost | hangs | tracebacks | ended within |",
    "|---|---|---|---|---|---|---|",
  ]
  groups = [(kind.name, [one for one in faults if one.kind == kind.name]) for kind in kinds]
  for name, group in [*groups, ("**all**", list(faults))]:
    lost = sum(bool(one.seen) for one in group)
    hung, traced = (sum(getattr(one, key) for one in group) for key in ("hung", "traceback"))
    numbers = (len(group), len(group) - lost, lost, hung, traced)
    longest = max((one.seconds for one in group), default=0.0)
    lines.append(f"| {name} | {' | '.join(map(str, numbers))} | {longest:.0f} s |")
  return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--faults", type=int, default=24, help="how many")
  parser.add_argument("--seed", type=int, default=0, help="of the moments and of what is damaged")
  parser.add_argument("--workdir", type=pathlib.Path, required=True, help="directory of everything")
  parser.add_argument("--kinds", help="only these kinds of fault: names with commas between")
  options = parser.parse_args(arguments)
  folder = options.workdir.absolute()
  folder.mkdir(parents=True, exist_ok=True)
  wanted = options.kinds.split(",") if options.kinds else [kind.name for kind in KINDS]
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # Or the run would be left alone.
  bench = Bench(folder)
  kinds = [kind for kind in KINDS if kind.name in wanted]
  kinds = [kind for kind in kinds if bench.has_small_disk or not kind.fills_disk]
  try:
    done = Harness(bench, folder, options.seed, kinds).run(options.faults)
  finally:
    bench.close()
  print(table(done, kinds))
  for fault in done:
    if fault.seen:
      print(f"fault {fault.number} ({fault.kind}, run {fault.chain}): {fault.seen}")


if __name__ == "__main__":
  main()
