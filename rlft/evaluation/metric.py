"""Applies metrics to streams of images, of which only the scores are kept."""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import math

import jax
from jax.sharding import NamedSharding
import numpy as np

from rlft.config.settings import ScoringSettings
from rlft.evaluation.distances import Distance
from rlft.evaluation.evaluate import EvalSpec, Measured, Metric
from rlft.parallel import sharding
from rlft.rewards.scoring import errors, trial
from rlft.rewards.scoring.scorer import Scorer
from rlft.types import Prompt, Reward, UserError

# At most so many images are held and scored at once: metrics may be large networks, and images
# large themselves (85 of 512 x 512 pixels).
_SCORED_AT_ONCE = 256
_BYTES_AT_ONCE = 2**28


def uses(specs: Iterable[EvalSpec]) -> list[trial.Use]:
  """What evaluations use their metrics for, to be tried; distances are when they are made."""
  return [
    trial.Use(f"--eval=name={spec.name}: metric", spec.metric, spec.prompts, spec.images_per_prompt)
    for spec in specs
    if not isinstance(spec.metric, Distance)
  ]


class MetricScorer:
  """Applies metrics to any number of images; what it compiled for one evaluation serves the next.

  Between two batches, no weights are on the devices.
  """

  def __init__(self, *, rows: NamedSharding, scoring: ScoringSettings):
    """Keeps the settings.

    Args:
      rows: how a batch is spread over the mesh.
      scoring: how host metrics are called.
    """
    self._settings = {
      "batch_sharding": rows,
      "timeout_s": scoring.reward_timeout_s,
      "threads": scoring.reward_threads,
    }
    self._rows = rows
    self._scorers: dict[tuple[int, int, int], Scorer] = {}

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self) -> None:
    """Ends the threads of host metrics once they are idle."""
    with contextlib.ExitStack() as stack:
      for scorer in self._scorers.values():
        stack.callback(scorer.close)

  def __call__(
    self,
    metrics: Sequence[Metric],
    batches: Iterable[np.ndarray],
    prompts: Sequence[Prompt],
    images_per_prompt: int,
  ) -> list[Measured]:
    """Scores any number of images by several metrics, and forgets each image when it is scored.

    Args:
      metrics: the same objects each time, to be compiled once.
      batches: N images in batches `[n, H, W, 3]` of any sizes, float32 in [0, 1], on every process.
      prompts: N; the images of a set follow each other.
      images_per_prompt: G, which divides N.

    Raises:
      RewardError: a host metric failed.
      UserError: a set metric gives the images of a set different scores.
    """
    # Each process scores whole sets on the host.
    whole = images_per_prompt * jax.process_count()
    count, unit = len(prompts), math.lcm(whole, self._rows.mesh.size)
    parts: list[list[Measured]] = [[] for _ in metrics]
    distances = [metric for metric in metrics if isinstance(metric, Distance)]
    embedders = {id(metric): jax.jit(metric.embed) for metric in distances}
    start = 0
    for size, images in regrouped(batches, count, unit):
      # Padded by copies of the last set, so that every batch has the same size.
      places = np.arange(size)
      last_set = len(images) - images_per_prompt + places % images_per_prompt
      places = np.where(places < len(images), places, last_set)
      placed = sharding.put(images if len(images) == size else images[places], self._rows)
      drawn_for = [prompts[start + place] for place in places]
      for metric, measured in zip(metrics, parts, strict=True):
        if isinstance(metric, Distance):
          features = sharding.fetch(embedders[id(metric)](metric.params, placed))
          measured.append(Measured(features[: len(images)]))
          continue
        scorer = self._scorer(metric, size, images_per_prompt)
        with errors.located("metric", metric.name):
          scored = scorer.score(placed, drawn_for)
        scores, found = (
          None if x is None else sharding.fetch(x)[: len(images)]
          for x in (scored.values, scored.found)
        )
        measured.append(Measured(scores, found))
        scorer.free()
      start += len(images)
    return [
      _joined(metric, measured, images_per_prompt)
      for metric, measured in zip(metrics, parts, strict=True)
    ]

  def _scorer(self, metric: Reward, size: int, images_per_prompt: int) -> Scorer:
    key = id(metric), size, images_per_prompt  # Weights have no hash; a scorer keeps its reward.
    if key not in self._scorers:
      self._scorers[key] = Scorer(
        metric, batch_size=size, images_per_prompt=images_per_prompt, **self._settings
      )
    return self._scorers[key]


def regrouped(
  batches: Iterable[np.ndarray], count: int, unit: int
) -> Iterator[tuple[int, np.ndarray]]:
  """Cuts a stream of `count` images anew, into batches of one size.

  Args:
    batches: `[n, H, W, 3]` each, n as it comes.
    count: images in all.
    unit: the size is a multiple of this.

  Yields:
    The size, and so many images; less at the end.
  """
  size, held = 0, []
  for images in batches:
    if not size:
      most = min(count, _SCORED_AT_ONCE, max(_BYTES_AT_ONCE // images[0].nbytes, 1))
      size = math.ceil(count / math.ceil(count / most) / unit) * unit  # Equal, not a rest to pad.
    held.append(images)
    while sum(map(len, held)) >= size:
      joined = np.concatenate(held) if len(held) > 1 else held[0]
      held = [joined[size:]]
      yield size, joined[:size]
  if any(map(len, held)):
    yield size, np.concatenate(held)


def _joined(metric: Metric, parts: Sequence[Measured], images_per_prompt: int) -> Measured:
  """What a metric says of all images, from what it says of batches."""
  scores = np.concatenate([part.scores for part in parts])
  if isinstance(metric, Distance):
    return Measured(metric.scores(scores))
  known = all(part.found is not None for part in parts)
  return Measured(
    _of_sets(metric, scores, images_per_prompt) if metric.is_set else scores,
    np.concatenate([part.found for part in parts]) if known else None,
  )


def _of_sets(metric: Reward, scores: np.ndarray, images_per_prompt: int) -> np.ndarray:
  """`[N / G]` scores of sets from those of their images.

  Raises:
    UserError: those of a set differ.
  """
  sets = scores.reshape(-1, images_per_prompt)
  if not np.array_equal(sets, np.broadcast_to(sets[:, :1], sets.shape), equal_nan=True):
    raise UserError(
      f"metric {metric.name!r} gives the images of a set different scores, and so no measure of"
      " the set: make it return one number for each set"
    )
  return sets[:, 0]
