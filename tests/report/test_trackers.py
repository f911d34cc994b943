import dataclasses
import io
import sys
import types

import numpy as np
import PIL.Image
import pytest
import tensorboard_cases

from rlft.evaluation import results
from rlft.report import metrics, samples, trackers
from rlft.types import Prompt, UserError


@pytest.fixture
def workdir(tmp_path):
  """A run that has been evaluated after 4 iterations."""
  scores = np.array([1.0, 2.0, 3.0], np.float32)
  found = results.EvalResult("liked", "m", 2.0, 1.0, 3.0, 3, 3, scores, found=0.5)
  other = dataclasses.replace(found, name="other", mean=float("nan"), found=float("nan"))
  results.append_history(tmp_path, 4, {"liked": found, "other": other})
  images = np.zeros((2, 8, 8, 3), np.uint8)
  images[1, ..., 1] = 200
  samples.Keeper(tmp_path, 4).save("liked", images, [Prompt("a dog"), Prompt("a cat")])
  return tmp_path


class Fake:
  """What of wandb is used; keeps what it is given."""

  def __init__(self, failure=None):
    self.started, self.steps, self.logged, self.finished = [], {}, [], False
    self._failure = failure
    self.Image = lambda picture, caption: (picture.size, caption)

  def init(self, **settings):
    if self._failure:
      raise self._failure
    self.started.append(settings)
    return types.SimpleNamespace(
      define_metric=lambda name, step_metric=None: self.steps.update({name: step_metric}),
      log=self.logged.append,
      finish=lambda: setattr(self, "finished", True),
    )


def open_writer(workdir, names, first_iteration=0):
  opened = trackers.open_trackers(names, workdir, first_iteration=first_iteration, config={"a": 1})
  return metrics.MetricsWriter(workdir, first_iteration=first_iteration, trackers=opened)


def test_wandb_gets_metrics_evaluations_and_pictures(workdir, monkeypatch):
  fake = Fake()
  monkeypatch.setitem(sys.modules, "wandb", fake)
  for first in (0, 4):  # A run that goes on is the same one.
    with open_writer(workdir, "wandb", first) as writer:
      writer.write(first, {"loss": np.float32(0.5)})
      writer.write_evaluation(4)
  one, other = fake.started
  assert one == other and one["resume"] == "allow" and one["dir"] == str(workdir)
  assert (one["project"], one["name"], one["config"]) == ("rlft", workdir.name, {"a": 1})
  assert fake.steps == {"iteration": None, "*": "iteration"} and fake.finished
  numbers, evaluation, pictures = fake.logged[:3]
  assert numbers == {"iteration": 0, "loss": 0.5}
  means = {f"eval/liked/{key}": value for key, value in {"mean": 2, "low": 1, "high": 3}.items()}
  # What is not known of the other's mean is left out.
  rest = {"eval/liked/found": 0.5, "eval/other/low": 1.0, "eval/other/high": 3.0}
  assert evaluation == {"iteration": 4, **means, **rest}
  shown = {"samples/liked/0": ((10, 10), "a dog"), "samples/liked/1": ((10, 10), "a cat")}
  assert pictures == {"iteration": 4, **shown}
  assert not (workdir / "tensorboard").exists()


def test_tensorboard_gets_evaluations_and_pictures(workdir):
  with open_writer(workdir, "tensorboard") as writer:
    writer.write_evaluation(4)
  found = {
    value.tag: (event.step, value)
    for event in tensorboard_cases.events(workdir)
    for value in event.summary.value
  }
  step, mean = found["eval/liked/mean"]
  assert (step, mean.simple_value) == (4, 2.0) and "eval/other/mean" not in found
  step, cat = found["samples/liked/1"]
  assert step == 4 and cat.metadata.summary_description == "a cat"
  with PIL.Image.open(io.BytesIO(cat.image.encoded_image_string)) as picture:
    assert picture.size == (10, 10) and picture.getpixel((5, 5)) == (0, 200, 0)


def test_both_or_none(workdir, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", Fake())
  for names, count in (("none", 0), ("tensorboard+wandb", 2)):
    opened = trackers.open_trackers(names, workdir, first_iteration=0, config={})
    assert len(opened) == count
    for one in opened:
      one.close()


def test_wandb_that_is_missing_or_refuses_is_one_line(workdir, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match=r"wandb needs wandb: pip install 'rlft\[wandb\]'"):
    open_writer(workdir, "wandb")
  monkeypatch.setitem(sys.modules, "wandb", Fake(RuntimeError("no\nkey")))
  with pytest.raises(UserError, match="--tracker=wandb: no key; log in with 'wandb login', or set"):
    open_writer(workdir, "wandb")
