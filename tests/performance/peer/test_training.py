"""The peer: messages, a process that stands for TRL's, what is kept and done again after a stop."""

import io
import json
import pathlib
import sys

from evaluation_cases import result
import numpy as np
import pytest

from rlft.config import fields
from rlft.config.settings import Config, TaskConfig
from rlft.data import sources
from rlft.evaluation import results
from rlft.performance.peer import training, trl_worker
from rlft.performance.peer.process import WORKER, Peer
from rlft.types import UserError

FAKE = pathlib.Path(__file__).with_name("fake_worker.py")
PROMPTS = ("a", "b", "c", "d", "e")


@pytest.fixture(autouse=True)
def real_messages(monkeypatch):
  monkeypatch.setenv("TRL_WORKER", str(WORKER))


def start(work, **options):
  return Peer(sys.executable, {**work, "options": {**work["options"], **options}}, worker=FAKE)


def test_messages():
  stream = io.BytesIO()
  trl_worker.send(stream, {"images": [1, 2]}, b"\n\x00\x01")
  trl_worker.send(stream, {})
  assert stream.getvalue() == b'{"images": [1, 2], "bytes": 3}\n\n\x00\x01{"bytes": 0}\n'
  stream.seek(0)
  assert trl_worker.receive(stream) == ({"images": [1, 2]}, b"\n\x00\x01")
  assert trl_worker.receive(stream) == ({}, b"")
  assert trl_worker.receive(stream) is None
  # The other side was killed while it wrote.
  assert trl_worker.receive(io.BytesIO(b'{"bytes": 3}\n\x00')) is None
  assert trl_worker.receive(io.BytesIO(b'{"byt')) is None


def config(tmp_path, **changes):
  (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
  task = TaskConfig("t", str(tmp_path / "prompts.txt"), "red", batch_size=4, images_per_prompt=2)
  settings = {"pretrained": "emoji-sd", "task": (task,), "iterations": 3, "eval_every": 2}
  return fields.make(Config, **(settings | {"seed": 5} | changes))


def train(tmp_path, *, said=None, start=start, options=None, **changes):
  """Trains with a reward that is the number of an image's prompt, and a tenth of its colour."""

  def measure(folder):
    epochs = json.loads((folder / "unet" / "state.json").read_text())["epochs"]
    return {"judge": result(np.full(4, float(epochs)))}

  def score(images, prompts):
    numbers = np.array([PROMPTS.index(prompt.text) for prompt in prompts], np.float32)
    return numbers + images.mean((1, 2, 3)) / 10

  return training.train(
    config(tmp_path, **changes),
    options or {},
    tmp_path / "run",
    start=start,
    measure=measure,
    score=score,
    cores=1,
    say=(said if said is not None else []).append,
  )


def kept(tmp_path):
  """What the process saw, and the epochs of evaluations and of metrics."""
  state = training.newest_state(tmp_path / "run")
  history = results.read_history(tmp_path / "run")
  assert all(found["judge"].mean == epoch for epoch, found in history)
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  log = json.loads((state / "unet" / "state.json").read_text())["log"]
  return log, [epoch for epoch, _ in history], [json.loads(line) for line in lines]


def test_a_training(tmp_path, capsys):
  said = []
  assert train(tmp_path, said=said) == ""
  log, evaluated, lines = kept(tmp_path)
  assert evaluated == [0, 2, 3]
  assert [line["iteration"] for line in lines] == [0, 1, 2]
  assert all(line["time/iteration_s"] > 0 for line in lines)
  for epoch, (prompts, rewards) in enumerate(log):
    # As in a run of ours: two prompts, two images each.
    drawn = sources.drawn(config(tmp_path).task and PROMPTS, 5, 0, epoch, count=2)
    assert prompts == [text for text in drawn for _ in range(2)]
    expected = [PROMPTS.index(text) + 0.025 * epoch for text in prompts]
    assert rewards == pytest.approx(expected)
    assert lines[epoch]["reward/t/mean"] == pytest.approx(np.mean(expected))
  assert [path.name for path in (tmp_path / "run").glob("state-*")] == ["state-00003"]
  assert "3/3 done" in capsys.readouterr().err
  assert "begins, 3 epochs" in said[0]

  def not_again(work):
    raise AssertionError("it is done")

  assert train(tmp_path, start=not_again) == ""


@pytest.mark.parametrize("stopped", ["in an epoch", "before saving", "while saving", "unmeasured"])
def test_a_training_that_was_killed_goes_on(tmp_path, stopped):
  with pytest.raises(UserError, match="TRL's process has ended: out of memory"):
    train(tmp_path, start=lambda work: start(work, dies_at=2))
  run = tmp_path / "run"
  assert [len(found) for found in kept(tmp_path)] == [2, 2, 2]
  if stopped == "before saving":
    with open(run / "metrics.jsonl", "a") as file:
      file.write('{"iteration": 2, "time/iteration_s": 9, "reward/t/mean": 9}\n{"iter')
  if stopped == "while saving":
    (run / "state-00003.part").mkdir()
  if stopped == "unmeasured":
    results.resume_history(run, 1)
  said = []
  assert train(tmp_path, said=said) == ""
  assert "goes on after epoch 2 of 3" in said[0]
  log, evaluated, lines = kept(tmp_path)
  assert (len(log), evaluated) == (3, [0, 2, 3])
  assert [line["iteration"] for line in lines] == [0, 1, 2] and lines[2]["time/iteration_s"] < 9
  assert not list(run.glob("*.part"))


def test_one_that_diverges_fails_for_good(tmp_path):
  why = train(tmp_path, options={"value": float("nan")})
  assert why == "epoch 0: the images are not finite"
  assert train(tmp_path, start=None) == why


def test_mistakes(tmp_path):
  with pytest.raises(UserError, match="samples with guidance only"):
    train(tmp_path, guidance_scale=1.0)
  with pytest.raises(UserError, match="one task and the whole network"):
    train(tmp_path, lora_rank=2)
  with pytest.raises(UserError, match=r"cannot be run \(No such file.*trl_venv.sh"):
    Peer(str(tmp_path / "python"), {})
