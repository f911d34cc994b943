"""What a run writes may lie in a bucket; here it is one in memory, in the place of gcsfs."""

import pathlib

from etils import epath
from etils.epath import backend
import fsspec
import numpy as np
import pytest

from rlft.data import pairs, prompts
from rlft.evaluation import results
from rlft.inference.draw import check_output
from rlft.models.files import pretrained
from rlft.report import page, samples
from rlft.report.metrics import MetricsWriter
from rlft.report.trackers import open_trackers
from rlft.storage import checksums, files
from rlft.storage.lock import Lock
from rlft.types import Prompt, UserError

RUN = "gs://bucket/run"


@pytest.fixture
def bucket(monkeypatch):
  """The addresses of what is in the bucket, and its contents."""
  system = fsspec.filesystem("memory")
  system.store.clear()
  monkeypatch.setenv("EPATH_USE_TF", "false")
  monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: system)
  yield system.store
  system.store.clear()


def test_files(bucket):
  assert isinstance(files.path_of(RUN), epath.Path)
  path = files.path_of(RUN) / "a.jsonl"
  assert files.read_jsonl(path) == []
  files.write_atomic(path, '{"iteration": 0}\n{"iteration": 1}\n{"iter')
  assert files.read_jsonl(path) == [{"iteration": 0}, {"iteration": 1}]
  assert files.keep_before(path, 1) == [{"iteration": 0}]
  lines = files.Lines(path)
  lines.add('{"iteration": 1}')
  lines.add('{"iteration": 2}')
  lines.close()
  assert [line["iteration"] for line in files.read_jsonl(path)] == [0, 1, 2]
  files.check_writable(RUN)
  check_output(f"{RUN}/eval.json")
  assert list(bucket) == [f"{RUN}/a.jsonl"]  # Nothing beside it.


def test_a_run(bucket, caplog):
  for first in (0, 1):
    opened = open_trackers("tensorboard", RUN, first_iteration=first, config={})
    with MetricsWriter(RUN, first_iteration=first, trackers=opened) as writer:
      for iteration in range(first, first + 2):
        writer.write(iteration, {"loss": 0.5})
  assert "no TensorBoard files are written to the bucket" in caplog.text
  assert "metrics.jsonl has the same numbers" in caplog.text
  keeper = samples.Keeper(RUN, 0)
  image = np.zeros((8, 8, 3), np.uint8)
  keeper.save("held-out", [image], [Prompt("a dog")])
  assert [sheet.prompts for sheet in samples.read_samples(RUN)["held-out"]] == [("a dog",)]
  results.append_history(RUN, 0, {})
  assert results.read_history(RUN) == [(0, {})]
  assert str(page.write_report(RUN)) == f"{RUN}/report.html"
  assert [line["iteration"] for line in files.read_jsonl(f"{RUN}/metrics.jsonl")] == [0, 1, 2]
  names = ("eval_history.jsonl", "grids/held-out/000000.json", "grids/held-out/000000.png")
  names += ("metrics.jsonl", "report.html")
  assert sorted(bucket) == [f"{RUN}/{name}" for name in names]


def test_sums_and_the_lock(bucket):
  lock = Lock(files.path_of(RUN) / "checkpoints.lock")
  lock.check()
  lock.release()
  assert not bucket
  folder = files.path_of(RUN) / "checkpoint"
  files.write_atomic(folder / "state" / "d", "1")
  checksums.write(folder)
  checksums.check(folder)
  files.write_atomic(folder / "state" / "d", "2")
  with pytest.raises(checksums.DamagedError, match="state/d is not as it was written"):
    checksums.check(folder)


@pytest.mark.parametrize(
  ("error", "message"),
  [
    (ImportError("no module"), "buckets need gcsfs: pip install gcsfs"),
    (RuntimeError("denied\nby 3 rules"), "denied by 3 rules"),
  ],
)
def test_a_bucket_that_cannot_be_used(monkeypatch, error, message):
  def fail(path):
    raise error

  monkeypatch.setattr(backend.fsspec_backend, "fs", fail)
  monkeypatch.setenv("EPATH_USE_TF", "false")
  for use in (files.check_writable, files.read_jsonl, lambda path: files.write_atomic(path, "x")):
    with pytest.raises(UserError, match=message) as caught:
      use(f"{RUN}/a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("use", [prompts.load_file, pairs.check_folder, pretrained.find])
def test_what_is_mapped_into_memory_or_read_in_parts_must_be_here_or_in_a_bucket(use):
  with pytest.raises(UserError, match="is not on this machine: give a path that is"):
    use("https://example.org/x")


@pytest.fixture
def objects(tmp_path, monkeypatch):
  """Writes objects of the bucket memory://bucket; what is copied lies below the temporary path."""
  system = fsspec.filesystem("memory")
  system.store.clear()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  yield lambda name, content: system.pipe_file(f"/bucket/{name}", content)
  system.store.clear()


def test_what_is_in_a_bucket_is_copied_here_until_it_changes(objects, caplog):
  objects("data/prompts.csv", b"caption\na dog\n")
  objects("data/more/prompts.txt", b"a cat")
  for _ in range(2):
    found = prompts.load_file("memory://bucket/data/prompts.csv?column=caption")
    assert [prompt.text for prompt in found] == ["a dog"]
  assert caplog.text.count("copying") == 1
  objects("data/prompts.csv", b"caption\na fox\n")
  assert prompts.load_file("memory://bucket/data/prompts.csv?column=caption")[0].text == "a fox"
  folder = pathlib.Path(files.staged("memory://bucket/data/"))
  assert folder.name == "data" and (folder / "more" / "prompts.txt").read_text() == "a cat"
  with pytest.raises(UserError, match=r"data has no model_index\.json: give the top directory"):
    pretrained.find("memory://bucket/data")


@pytest.mark.parametrize("use", [prompts.load_file, pairs.check_folder, pretrained.find])
def test_what_is_not_in_a_bucket(use, objects):
  objects("other", b"")
  with pytest.raises(UserError, match="^memory://bucket/x does not exist: give what is in the"):
    use("memory://bucket/x")


def test_objects_outside_of_their_folder_are_refused(objects):
  objects("data/../../x", b"")
  with pytest.raises(UserError, match=r"has objects with '\.\.' in their names"):
    files.staged("memory://bucket/data")


def test_a_copy_that_fails_leaves_nothing(objects, tmp_path, monkeypatch):
  objects("data/a", b"a")
  monkeypatch.setattr(
    type(fsspec.filesystem("memory")), "get_file", lambda *_: (_ for _ in ()).throw(OSError("gone"))
  )
  with pytest.raises(UserError, match="cannot read memory://bucket/data: gone"):
    files.staged("memory://bucket/data")
  assert list((tmp_path / "rlft" / "buckets").iterdir()) == []


def test_other_buckets_are_refused():
  with pytest.raises(UserError, match="s3://bucket/run is no directory, nor in a bucket as gs://"):
    files.check_writable("s3://bucket/run")
