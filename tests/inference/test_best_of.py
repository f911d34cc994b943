"""The best of several images: choices on literals, and what is measured of them."""

import json

from inference_cases import PROMPTS, SETTINGS, drawing, drawn, replace_sampler
import models_cases
import numpy as np
import pytest

from rlft.config.settings import EvalConfig, ScoringSettings
from rlft.inference import best_of
from rlft.inference.best_of import BestOfSettings
from rlft.inference.measure import measure
from rlft.models.files import pretrained
from rlft.types import UserError

NAN = float("nan")


def test_the_best_and_of_equals_the_first():
  scores = np.array([[1.0, 2.0, NAN, NAN], [1.0, NAN, 0.0, NAN], [0.0, 3.0, 1.0, NAN]])
  assert best_of.best(scores, lower_is_better=False).tolist() == [0, 2, 2, 0]
  assert best_of.best(scores, lower_is_better=True).tolist() == [2, 0, 1, 0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """The directory of a model with random weights."""
  path = tmp_path_factory.mktemp("best_of") / "model"
  pretrained.save(path, models_cases.tiny_pipeline())
  return str(path)


@pytest.fixture
def metrics(tmp_path, monkeypatch):
  """A file of metrics: of each image, of sets, and one that less is better of; and prompts."""
  replace_sampler(monkeypatch)
  (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
  path = tmp_path / "metrics.py"
  path.write_text(
    "def mean(images, prompts, metadata):\n"
    "  return images.mean((1, 2, 3))\n"
    "def of_set(images, prompts, metadata):\n"
    "  return images.mean((1, 2, 3, 4))\n"
    "of_set.is_set = True\n"
    "def dark(images, prompts, metadata):\n"
    "  return images.mean((1, 2, 3))\n"
    "dark.lower_is_better = True\n"
  )
  return path


def measured(model, metrics, choice, *, metric="mean", images=12, per_prompt=3, output=None):
  prompts, name = str(metrics.parent / "prompts.txt"), f"host:{metrics}:{metric}"
  evals = [EvalConfig("a", prompts, name, images=images, images_per_prompt=per_prompt)]
  scoring = ScoringSettings(reward_timeout_s=60.0, reward_threads=2)
  return measure(drawing(model), evals, scoring=scoring, output=output, choice=choice)


@pytest.mark.parametrize("reward", ["mean", "of_set", "dark"])
def test_the_best_are_measured(model, metrics, tmp_path, reward):
  output = tmp_path / "eval.json"
  choice = BestOfSettings(4, f"host:{metrics}:{reward}")
  table = measured(model, metrics, choice, output=output)
  # Of the images of four seeds, by place; a reward on sets chooses three at a time.
  texts = [PROMPTS[place // 3 % len(PROMPTS)] for place in range(12)]
  means = np.stack([drawn(texts, SETTINGS["seed"] + n).mean((1, 2, 3)) for n in range(4)])
  if reward == "of_set":
    sets = means.reshape(4, 4, 3).mean(axis=2)
    expected = means.reshape(4, 4, 3)[sets.argmax(axis=0), np.arange(4)].mean()
  else:
    expected = (means.min(axis=0) if reward == "dark" else means.max(axis=0)).mean()
  found = json.loads(output.read_text())
  assert found["results"]["a"]["mean"] == pytest.approx(expected, rel=1e-5)
  assert found["results"]["a"]["images"] == 12 and found["images_drawn"] == 48
  about = {"best_of": 4, "best_of_reward": choice.best_of_reward}
  assert found["settings"] == SETTINGS | about
  assert found["results"]["a"]["trained_on"] == (reward == "mean")
  assert table.endswith(f"each is the best of 4 by {choice.best_of_reward}: 48 drawn")


def test_without_a_choice_nothing_is_said_of_it(model, metrics, tmp_path):
  output = tmp_path / "eval.json"
  table = measured(model, metrics, BestOfSettings(), output=output)
  found = json.loads(output.read_text())
  assert found["settings"] == SETTINGS and found["images_drawn"] == 12 and "best of" not in table


@pytest.mark.parametrize(
  ("count", "reward", "message"),
  [
    (4, "", "--best_of=4 needs a reward to choose by: give --best_of_reward"),
    (1, "jpeg", "--best_of_reward=jpeg has no effect: give --best_of=2 or more, too"),
    (2, "jpge", "--best_of_reward=jpge: there is none of this name .did you mean 'jpeg'"),
    (2, "skin-tone-parity", "chooses sets of images: give evaluations with the same images_per"),
    (2, "skin-tone-parity?credit=leave-one-out", "is the credit of images within their set"),
    (0, "", "best_of=0 is out of range"),
  ],
)
def test_mistakes(model, metrics, count, reward, message):
  with pytest.raises(UserError, match=message):
    measured(model, metrics, BestOfSettings(count, reward), per_prompt=1)
