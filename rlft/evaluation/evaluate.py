"""Held-out evaluation: the same prompts and seeds before, during and after training.

Knows no models: the caller brings a function that samples and one that scores.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
from typing import Any, Protocol

import numpy as np

from rlft.evaluation import statistics
from rlft.evaluation.distances import Distance
from rlft.evaluation.results import EvalResult
from rlft.storage import images as images_lib
from rlft.types import Prompt, Reward, UserError

Metric = Reward | Distance


@dataclasses.dataclass(frozen=True)
class EvalSpec:
  """A metric and the held-out prompts on which it is measured.

  Attributes:
    name: of the evaluation, in tables and file names.
    metric: scores the images.
    prompts: held-out list; an evaluation takes the first `images / images_per_prompt` and starts
      again at the first (with other noise) if there are fewer.
    images: N, in all; a multiple of `images_per_prompt`.
    images_per_prompt: G; the set size of a set metric.
    trained_on: the metric is also a reward of the run, so that its rise may be reward hacking.
  """

  name: str
  metric: Metric
  prompts: Sequence[Prompt]
  images: int
  images_per_prompt: int = 1
  trained_on: bool = False


@dataclasses.dataclass(frozen=True)
class Measured:
  """What a metric says of N images.

  Attributes:
    scores: `[N]`, or `[N / G]` of a set metric; NaN: could not be scored.
    found: `[N]`, 1 where an image shows what is measured, else 0; None where that is not known.
  """

  scores: np.ndarray
  found: np.ndarray | None = None


class Sample(Protocol):
  """Samples an image for each prompt."""

  def __call__(self, prompts: list[Prompt], seed: int) -> Iterable[np.ndarray]:
    """N prompts -> N images in batches `[n, H, W, 3]` of any sizes, float32 in [0, 1].

    Noise depends on (seed, position).
    """


class Score(Protocol):
  """Applies metrics."""

  def __call__(
    self,
    metrics: list[Metric],
    batches: Iterable[np.ndarray],
    prompts: list[Prompt],
    images_per_prompt: int,
  ) -> Sequence[Measured]:
    """What each metric says of the images that `Sample` returns.

    `prompts` has length N; the `images_per_prompt` images of one set follow each other.
    """


class Keep(Protocol):
  """Keeps some of the images, for people to look at."""

  def choose(self, prompts: Sequence[Prompt]) -> Sequence[int]:
    """The places of the images to keep among those of N prompts."""

  def save(self, name: str, images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> None:
    """Takes the chosen images, `[H, W, 3]` uint8, of an evaluation and of the prompts given."""


def evaluate(
  specs: Sequence[EvalSpec],
  *,
  sample: Sample,
  score: Score,
  seed: int,
  keep: Keep | None = None,
) -> dict[str, EvalResult]:
  """Samples and scores every evaluation.

  Evaluations with the same prompts, images and images_per_prompt share their images. These pass
  by in batches: what stays of them are scores, and the few that `keep` chooses.

  Args:
    specs: evaluations with different names.
    sample: draws the images.
    score: applies metrics to them.
    seed: of the noise; the same every time, so that results can be compared image by image.
    keep: keeps some images of each shared set, under the name of the first of its evaluations.

  Returns:
    A result by name, in the order of `specs`.

  Raises:
    UserError: no prompts, repeated names, sizes that do not divide, scores of the wrong shape.
  """
  _check(specs)
  measured = {}
  for group in sharing(specs):
    first, prompts = group[0], prompts_of(group[0])
    kept = dict.fromkeys(keep.choose(prompts) if keep else ())
    batches = _watched(sample(prompts, seed), kept)
    found = score([spec.metric for spec in group], batches, prompts, first.images_per_prompt)
    for spec, one in zip(group, found, strict=True):
      measured[spec.name] = _result(spec, one)
    if keep:
      keep.save(first.name, list(kept.values()), prompts)
  return {spec.name: measured[spec.name] for spec in specs}


def sharing(specs: Sequence[EvalSpec]) -> list[list[EvalSpec]]:
  """Groups of evaluations that share their images."""
  shared: dict[tuple[Any, ...], list[EvalSpec]] = {}
  for spec in specs:
    # Metadata may hold lists, which have no hash; their representation tells them apart as well.
    key = (spec.images, spec.images_per_prompt, repr(prompts_of(spec)))
    shared.setdefault(key, []).append(spec)
  return list(shared.values())


def images(specs: Sequence[EvalSpec]) -> int:
  """How many images evaluations draw."""
  return sum(group[0].images for group in sharing(specs))


def _watched(
  batches: Iterable[np.ndarray], kept: dict[int, np.ndarray | None]
) -> Iterator[np.ndarray]:
  """Passes images on; puts those whose places are keys of `kept` there, in uint8."""
  start = 0
  for images in batches:
    for place in kept.keys() & set(range(start, start + len(images))):
      kept[place] = images_lib.to_uint8(images[place - start])
    start += len(images)
    yield images


def _check(specs: Sequence[EvalSpec]) -> None:
  names = [spec.name for spec in specs]
  for spec in specs:
    where, size, per_prompt = f"--eval=name={spec.name}", spec.images, spec.images_per_prompt
    if names.count(spec.name) > 1:
      raise UserError(f"two of --eval have the name {spec.name}: give each its own with name=...")
    if not spec.prompts:
      raise UserError(f"{where} has no prompts: give a source that has some with prompts=...")
    if size < 1 or per_prompt < 1 or size % per_prompt:
      raise UserError(
        f"{where}: images={size} is not a positive multiple of images_per_prompt={per_prompt}:"
        " change one of them"
      )


def prompts_of(spec: EvalSpec) -> list[Prompt]:
  """The prompt of each of the N images."""
  return [
    spec.prompts[place % len(spec.prompts)]
    for place in range(spec.images // spec.images_per_prompt)
    for _ in range(spec.images_per_prompt)
  ]


def _result(spec: EvalSpec, measured: Measured) -> EvalResult:
  scores = np.asarray(measured.scores, np.float32)
  expected = spec.images // spec.images_per_prompt if spec.metric.is_set else spec.images
  if scores.shape != (expected,):
    raise UserError(
      f"--eval=name={spec.name}: metric {spec.metric.name} returned scores of shape"
      f" {list(scores.shape)}: expected [{expected}], one for each"
      f" {'set' if spec.metric.is_set else 'image'}; correct the metric"
    )
  low, high = statistics.bootstrap_interval(scores)
  return EvalResult(
    name=spec.name,
    metric=spec.metric.name,
    mean=statistics.mean(scores),
    low=low,
    high=high,
    images=spec.images,
    prompts=min(len(spec.prompts), spec.images // spec.images_per_prompt),
    scores=scores,
    lower_is_better=spec.metric.lower_is_better,
    trained_on=spec.trained_on,
    found=float("nan") if measured.found is None else float(np.mean(measured.found)),
  )
