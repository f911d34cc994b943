"""The best of several images by a reward: what it is worth without any training."""

from collections.abc import Iterator, Sequence
import dataclasses

import numpy as np

from rlft import catalog
from rlft.config.fields import option
from rlft.evaluation import metric
from rlft.evaluation.evaluate import EvalSpec, Sample
from rlft.evaluation.metric import MetricScorer
from rlft.inference.draw import Drawer
from rlft.rewards.scoring import errors, trial
from rlft.types import Prompt, Reward, UserError


@dataclasses.dataclass(frozen=True)
class BestOfSettings:
  """Best of n: how many images are drawn for each one that is measured; fields are flags."""

  best_of: int = option(
    "best of n: draw this many images and measure the one that --best_of_reward scores highest",
    1,
    least=1,
  )
  best_of_reward: str = option("the reward by which --best_of chooses", "")


@dataclasses.dataclass(frozen=True)
class BestOf:
  """How the best is chosen.

  Attributes:
    count: of how many; a reward on sets chooses whole sets.
    reward: by which.
    group: images that are scored and chosen together: G of a reward on sets, else 1.
  """

  count: int
  reward: Reward
  group: int

  def about(self) -> dict[str, int | str]:
    """What tells figures of it from others, by the names of the flags."""
    return {"best_of": self.count, "best_of_reward": self.reward.name}


def make(settings: BestOfSettings, specs: Sequence[EvalSpec]) -> BestOf | None:
  """What the settings say; None if one image is drawn for each.

  Args:
    settings: from the flags.
    specs: the evaluations whose images are chosen.

  Raises:
    UserError: a setting without the other, or a reward that cannot choose.
  """
  count, name = settings.best_of, settings.best_of_reward
  if count == 1:
    if name:
      raise UserError(f"--best_of_reward={name} has no effect: give --best_of=2 or more, too")
    return None
  if not name:
    raise UserError(f"--best_of={count} needs a reward to choose by: give --best_of_reward")
  with errors.located("--best_of_reward", name):
    reward = catalog.make_reward(name)
  if not reward.is_measure:
    raise UserError(
      f"--best_of_reward={name} is the credit of images within their set, not a measure of the set:"
      " use it with credit=set"
    )
  sizes = {spec.images_per_prompt for spec in specs} if reward.is_set else {1}
  if reward.is_set and (len(sizes) > 1 or 1 in sizes):
    raise UserError(
      f"--best_of_reward={name} chooses sets of images: give evaluations with the same"
      " images_per_prompt, e.g. 16"
    )
  return BestOf(count, reward, max(sizes))


def uses(how: BestOf, specs: Sequence[EvalSpec]) -> list[trial.Use]:
  """What the reward is used for, to be tried."""
  return [
    trial.Use("--best_of_reward", how.reward, spec.prompts, spec.images_per_prompt)
    for spec in specs
  ]


def best(scores: np.ndarray, *, lower_is_better: bool) -> np.ndarray:
  """`[N]` which of n is the best, by `[n, N]` scores: of equals the first, NaN only if all are."""
  signed = -scores if lower_is_better else scores
  return np.argmax(np.where(np.isnan(signed), -np.inf, signed), axis=0)


def sample(how: BestOf, draw: Drawer, score: MetricScorer) -> Sample:
  """Draws the candidates for each image, and returns the best.

  The candidates of a seed are the images of it and of the seeds that follow. So the first is what
  is measured without a choice, and a gain can be told image by image.

  Args:
    how: see there.
    draw: the model.
    score: applies the reward.
  """

  def chosen(prompts: list[Prompt], seed: int) -> Iterator[np.ndarray]:
    texts, start = [prompt.text for prompt in prompts], 0
    streams = [
      metric.regrouped(
        draw.batches(texts, seed=seed + number, progress="" if number else "evaluating"),
        len(texts),
        how.group,
      )
      for number in range(how.count)
    ]
    for parts in zip(*streams, strict=True):
      candidates = np.stack([images for _, images in parts])
      count = candidates.shape[1]
      images = candidates.reshape(-1, *candidates.shape[2:])
      drawn_for = prompts[start : start + count] * how.count
      (found,) = score([how.reward], [images], drawn_for, how.group)
      scores = found.scores.reshape(how.count, -1)
      places = best(scores, lower_is_better=how.reward.lower_is_better).repeat(how.group)
      yield candidates[places, np.arange(count)]
      start += count

  return chosen
