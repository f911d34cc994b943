"""A run with everything in a bucket: all the libraries that talk to one, together, over HTTP."""

from importlib import util
import pathlib

import forked_cases
import fsspec
import gcs_server
import jax
import numpy as np
import pytest
import train_cases as cases

from rlft.config.settings import Config
from rlft.data import pairs
from rlft.storage import checkpoint, files, folders, lock
from rlft.storage.checkpoint import Checkpointer
from rlft.types import UserError

if not util.find_spec("gcsfs"):  # Not imported here: what it asks for in doing so is set below.
  pytest.skip("gcsfs is not installed", allow_module_level=True)

RUN = "gs://bucket/runs/first"
TIMEOUT_S = 300.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return cases.folder(tmp_path_factory)


@pytest.fixture(scope="module")
def bucket(folder, tmp_path_factory):
  """A server with the folder's files in it, to which this process and those below it go."""
  # Small pages, so that lists have several. TensorStore asks once in a process where it is.
  with gcs_server.Server("bucket", page=7) as server, pytest.MonkeyPatch.context() as patch:
    for name, value in server.environment().items():
      patch.setenv(name, value)
    patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})  # The variable was read before.
    patch.setenv("EPATH_USE_TF", "false")
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    for part in ("model", "pairs", "prompts.txt"):
      for path in (folder / part, *(folder / part).rglob("*")):
        if path.is_file():
          server.put("bucket", f"data/{path.relative_to(folder)}", path.read_bytes())
    yield server


@pytest.fixture
def answers(bucket):
  """The server, which answers all again after the test."""
  yield bucket
  bucket.refuse("")


@pytest.fixture(scope="module")
def launch(bucket, tmp_path_factory):
  """Starts a script of `launch` with one device; the bucket is where this process has it."""
  nursery = forked_cases.Nursery(cases.environment_of_runs())
  said = tmp_path_factory.mktemp("said")
  started = []

  def start(script, *arguments):
    command = [cases.ROOT / "launch" / f"{script}.py", *arguments]
    started.append(nursery.start(command, said / str(len(started))))
    return started[-1]

  yield start
  for process in started:  # Those that a test which failed left behind.
    process.kill()
  nursery.close()


def run_config(data: str, folder: pathlib.Path, workdir: str | pathlib.Path) -> Config:
  """A run of three iterations; its reward is a file of this machine, as code always is."""
  task = cases.task(folder, "green", "host:green", prompts=f"{data}/prompts.txt")
  return cases.config(
    folder,
    workdir,
    pretrained=f"{data}/model",
    task=(task,),
    pretrain_weight=0.0,
    train_timesteps=1,
    iterations=3,
    checkpoint_every=1,
  )


def checkpoints(bucket: gcs_server.Server) -> list[str]:
  """What the run's checkpoints are called."""
  return sorted({name.split("/")[3] for name in bucket.names("bucket", "runs/first/checkpoints/")})


def damage(bucket: gcs_server.Server, name: str) -> None:
  """Flips a bit of the largest object of a checkpoint of the run."""
  objects = bucket.buckets["bucket"]
  names = bucket.names("bucket", f"runs/first/checkpoints/{name}/state/")
  largest = max(names, key=lambda name: len(objects[name].data))
  data = bytearray(objects[largest].data)
  data[len(data) // 2] ^= 1
  bucket.put("bucket", largest, data)


def test_a_run_is_killed_goes_on_and_is_read(folder, bucket, launch, tmp_path):
  command = cases.flags(run_config("gs://bucket/data", folder, RUN))

  # Killed while it writes the third checkpoint. A second run beside it is refused.
  bucket.hold("first/checkpoints/iteration_3/state/.*/d/")
  killed = launch("train", *command)
  try:
    assert bucket.wait_for_held(TIMEOUT_S), killed.errors()
    second = launch("train", *command)
    assert second.wait(TIMEOUT_S) == 2
    assert f"{RUN} is being written to by process {killed.pid} on" in second.errors()
  finally:
    killed.kill()
    bucket.go_on()
  assert checkpoints(bucket) == ["iteration_1", "iteration_2", "iteration_3"]
  assert folders.newest(f"{RUN}/checkpoints") == folders.step_of(2, 0)  # The third is not whole.

  # The second is damaged besides, and is set aside; the same command goes on from the first.
  damage(bucket, "iteration_2")
  resumed = launch("train", *command)
  assert resumed.wait(TIMEOUT_S) == 0, resumed.errors()
  warnings = resumed.errors().splitlines()
  assert "which is dead" in warnings[0]
  assert "is not as it was written; moved to iteration_2.unreadable" in warnings[1]
  assert "Adaptive" not in resumed.errors()  # What fsspec says of each file that it opens.
  assert checkpoints(bucket) == ["iteration_2", "iteration_2.unreadable", "iteration_3"]
  assert "runs/first/checkpoints.lock" not in bucket.names("bucket")

  # Both libraries were there, and what the run was made of came from there.
  asked = "\n".join(path for _, path in bucket.asked)
  for part in (
    "&tensorstore=",
    "/download/storage/v1/b/bucket/o/data%2Fmodel",
    "data%2Fprompts.txt",
  ):
    assert part in asked

  # It is the run that nothing happened to, on a disk.
  whole = launch("train", *cases.flags(run_config(str(folder), folder, tmp_path / "whole")))
  assert whole.wait(TIMEOUT_S) == 0, whole.errors()
  cases.assert_same_run(files.path_of(RUN), tmp_path / "whole")
  on_disk = {str(path.relative_to(tmp_path / "whole")) for path in (tmp_path / "whole").iterdir()}
  in_bucket = {name.split("/")[2] for name in bucket.names("bucket", "runs/first/")}
  assert in_bucket == on_disk - {"tensorboard"}

  # What reads a run; one reads its checkpoint, too.
  report = launch("report", RUN)
  export = launch("export", f"--workdir={RUN}", f"--output={tmp_path}/exported")
  for process in (report, export):
    assert process.wait(TIMEOUT_S) == 0, process.errors()
  assert f"report: {RUN}/report.html" in report.output()
  assert (tmp_path / "exported" / "model_index.json").exists()

  damage(bucket, "iteration_3")
  reader = Checkpointer(f"{RUN}/checkpoints", read_only=True)
  with pytest.raises(UserError, match="iteration_3 in gs://bucket/.* is not as it was written"):
    reader.restore_numpy()
  reader.close()


def test_pretraining_images(folder, bucket):
  here, there = (pairs.check_folder(f"{at}/pairs") for at in (folder, "gs://bucket/data"))
  assert here == there


def test_a_bucket_that_is_not_there(bucket):
  for use in (files.check_writable, lambda name: files.write_atomic(name, "x"), files.staged):
    with pytest.raises(UserError, match="gs://none/x.*there is no such bucket or object"):
      use("gs://none/x")


STATE = {"a": np.arange(8.0), "b": np.ones((4, 4))}


def saved(directory: str, *iterations: int) -> None:
  checkpointer = Checkpointer(directory)
  try:
    for iteration in iterations:
      checkpointer.save(iteration, STATE, {})
  finally:
    checkpointer.close()


@pytest.mark.parametrize("who", ["download", "tensorstore="])
def test_a_checkpoint_that_may_not_be_read_is_left_as_it_is(answers, who, monkeypatch):
  """Whether gcsfs is refused, or TensorStore after the sums were compared."""
  monkeypatch.setattr(checkpoint, "_PAUSES_S", (0.0,))
  directory = f"gs://bucket/refused/{who.strip('=')}"
  saved(directory, 1, 2)
  before = answers.names("bucket", "refused")
  answers.refuse(f"^GET (?=.*{who}).*iteration_2/state/")
  checkpointer = Checkpointer(directory)
  with pytest.raises(UserError, match="iteration_2 in .* could not be read .* left as it is"):
    checkpointer.restore(jax.tree.map(jax.numpy.asarray, STATE))
  checkpointer.close()
  assert answers.names("bucket", "refused") == before
  answers.refuse("")


@pytest.mark.parametrize("what", ["POST .*iteration_3", "POST .*iteration_3/SHA256SUMS"])
@pytest.mark.parametrize("status", [400, 403])
def test_a_checkpoint_that_may_not_be_written(answers, what, status, tmp_path):
  """gcsfs raises an OSError, and another exception for most statuses."""
  directory = f"gs://bucket/{tmp_path.name}/checkpoints"
  saved(directory, 1, 2)
  answers.refuse(what, status)
  with pytest.raises(UserError, match=f"iteration_3 could not be written in {directory}"):
    saved(directory, 3)
  answers.refuse("")
  assert folders.newest(directory) == folders.step_of(2, 0)
  saved(directory, 3)
  assert folders.newest(directory) == folders.step_of(3, 0)


def test_the_lock_of_another_machine(answers, monkeypatch):
  """Its holder lives as long as its heartbeat is seen, which a refusal in between does not end."""
  monkeypatch.setattr(lock, "_BEAT_S", 0.05)
  path = files.path_of("gs://bucket/locked/checkpoints.lock")
  held = lock.Lock(path)
  answers.refuse("GET .*checkpoints.lock", 400)
  with pytest.raises(UserError, match="cannot read .*checkpoints.lock: refused"):
    held.check()
  answers.refuse("")
  monkeypatch.setattr(lock, "_machine", lambda: "another")
  with pytest.raises(UserError, match="is being written to by process"):
    lock.Lock(path, patience_s=5)
  held._released.set()  # As if it had died.
  held._thread.join()
  taken = lock.Lock(path, patience_s=0.3)
  with pytest.raises(UserError, match="took it over"):
    held.check()
  taken.release()
  assert answers.names("bucket", "locked") == []
