import numpy as np
import pytest

from rlft.evaluation import evaluate
from rlft.types import HostReward, Prompt, UserError

THREE = [Prompt("a", {"objects": ["x"]}), Prompt("b"), Prompt("c")]


def metric(name="m", **settings):
  return HostReward(name, lambda *_: None, **settings)


class Model:
  """Paints the position of each image, two at a time; remembers what it was asked for."""

  def __init__(self):
    self.asked = []

  def __call__(self, prompts, seed):
    self.asked.append(([prompt.text for prompt in prompts], seed))
    images = np.arange(len(prompts), dtype=np.float32).repeat(12).reshape(-1, 2, 2, 3) / 255
    for start in range(0, len(prompts), 2):
      yield images[start : start + 2]


def painted(metrics, batches, prompts, images_per_prompt):
  values = np.concatenate(list(batches))[:, 0, 0, 0] * 255
  sums = values.reshape(-1, images_per_prompt).sum(axis=1)
  return [evaluate.Measured(sums if metric.is_set else values) for metric in metrics]


class Keeper:
  """Keeps the second image and the last; remembers what it was given."""

  def __init__(self):
    self.kept = []

  def choose(self, prompts):
    return [1, len(prompts) - 1]

  def save(self, name, images, prompts):
    assert all(image.shape == (2, 2, 3) and image.dtype == np.uint8 for image in images)
    self.kept.append((name, [int(image.mean()) for image in images], prompts[0].text))


def test_scores_of_images_and_of_sets():
  specs = [
    evaluate.EvalSpec("images", metric(), THREE, 2),
    evaluate.EvalSpec("sets", metric("oracle-parity", is_set=True), THREE, 6, 2),
  ]
  model = Model()
  got = evaluate.evaluate(specs, sample=model, score=painted, seed=5)
  assert model.asked == [(["a", "b"], 5), (["a", "a", "b", "b", "c", "c"], 5)]
  assert list(got) == ["images", "sets"]
  np.testing.assert_allclose(got["images"].scores, [0, 1])
  np.testing.assert_allclose(got["sets"].scores, [0 + 1, 2 + 3, 4 + 5])
  assert (got["sets"].mean, got["sets"].images, got["sets"].prompts) == (5.0, 6, 3)
  assert got["sets"].low <= 5.0 <= got["sets"].high
  assert (got["sets"].name, got["sets"].metric) == ("sets", "oracle-parity")


def test_a_short_list_of_prompts_is_repeated():
  model = Model()
  got = evaluate.evaluate(
    [evaluate.EvalSpec("a", metric(), THREE, 10, 2)], sample=model, score=painted, seed=0
  )
  assert model.asked[0][0] == list("aabbccaabb")
  assert (got["a"].images, got["a"].prompts) == (10, 3)


def test_images_are_sampled_once_for_evaluations_that_share_them():
  specs = [
    evaluate.EvalSpec("one", metric("m1"), THREE, 4),
    evaluate.EvalSpec("other", metric(), THREE[::-1], 4),
    evaluate.EvalSpec("two", metric("m2"), tuple(THREE), 4),
    evaluate.EvalSpec("sets", metric("m1"), THREE, 4, 2),
    evaluate.EvalSpec("metadata", metric("m1"), [Prompt("a"), *THREE[1:]], 4),
  ]
  model, keep = Model(), Keeper()
  got = evaluate.evaluate(specs, sample=model, score=painted, seed=0, keep=keep)
  assert [texts for texts, _ in model.asked] == [list("abca"), list("cbac"), list("aabb")] + [
    list("abca")
  ]
  names = [("one", "a"), ("other", "c"), ("sets", "a"), ("metadata", "a")]
  assert keep.kept == [(name, [1, 3], text) for name, text in names]
  assert list(got) == ["one", "other", "two", "sets", "metadata"]


def test_unscored_images_are_left_out_and_counted():
  def score(metrics, batches, prompts, images_per_prompt):
    scores = np.array([1.0, np.nan, 3.0, np.nan])
    return [evaluate.Measured(scores, found=np.array([1.0, 0.0, 1.0, 1.0]))]

  spec = evaluate.EvalSpec("a", metric(), THREE, 4)
  got = evaluate.evaluate([spec], sample=Model(), score=score, seed=0)["a"]
  assert (got.mean, got.unscored, got.found) == (2.0, 2, 0.75)


def test_direction():
  specs = [
    evaluate.EvalSpec("lower", metric("parity", lower_is_better=True), THREE, 2),
    evaluate.EvalSpec("higher", metric("emoji-tone-parity"), THREE, 2, trained_on=True),
  ]
  got = evaluate.evaluate(specs, sample=Model(), score=painted, seed=0)
  assert [one.lower_is_better for one in got.values()] == [True, False]
  assert [one.trained_on for one in got.values()] == [False, True]


@pytest.mark.parametrize(
  ("specs", "message"),
  [
    ([evaluate.EvalSpec("a", metric(), [], 2)], "has no prompts: give a source"),
    ([evaluate.EvalSpec("a", metric(), THREE, 3, 2)], "images=3 is not a positive multiple"),
    ([evaluate.EvalSpec("a", metric(), THREE, 0)], "images=0 is not a positive multiple"),
    ([evaluate.EvalSpec("a", metric(), THREE, 2)] * 2, "two of --eval have the name a"),
  ],
)
def test_bad_evaluations_are_refused_before_sampling(specs, message):
  model = Model()
  with pytest.raises(UserError, match=message):
    evaluate.evaluate(specs, sample=model, score=painted, seed=0)
  assert not model.asked


@pytest.mark.parametrize("is_set", [False, True])
def test_scores_of_the_wrong_shape(is_set):
  def score(*_):
    return [evaluate.Measured(np.zeros(3))]

  spec = evaluate.EvalSpec("a", metric("mine", is_set=is_set), THREE, 4, 2)
  with pytest.raises(UserError, match=r"metric mine returned scores of shape \[3\]: expected \["):
    evaluate.evaluate([spec], sample=Model(), score=score, seed=0)
