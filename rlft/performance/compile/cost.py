"""What a run costs: its work, in hours and money on chips whose peak is known.

Time is work / (chips x peak x utilisation). Work are the products and convolutions of the programs,
what remat does twice counted twice; rewards, reading, compiling and saving are not in it.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import math
from typing import Any

from rlft.config.settings import Config, EvalConfig
from rlft.performance.compile.chips import Chip
from rlft.performance.compile.table import Row
from rlft.run.evaluation import is_due

# Of the peak. Stable Diffusion 2 base was trained anew in 6.8 days on 128 A100
# (databricks.com/blog/diffusion). Its 550,000 steps at 256 x 256 and 850,000 at 512 x 512 pixels,
# of 2048 images with 0.53 and 2.41 TFLOP, are 20 % of what these chips do at their peak.
UTILISATION = 0.2


@dataclasses.dataclass(frozen=True)
class Work:
  """FLOPs of what a run still has to do, over all devices."""

  sampling: float
  updates: float
  evaluation: float

  @property
  def total(self) -> float:
    return self.sampling + self.updates + self.evaluation


def remaining_work(config: Config, rows: Sequence[Row], done: int) -> Work:
  """The work from iteration `done` to the end, given that of each program of an iteration."""
  draws = [row for row in rows if _draws(row)]
  learns = [row for row in rows if not _draws(row)]
  count = max(0, config.iterations - done)
  size = max(task.batch_size for task in config.task)
  batch = sum(row.result.flops for row in draws if row.call.images == size)
  return Work(
    sampling=count * sum(row.result.flops * row.call.times for row in draws),
    updates=count * sum(row.result.flops * row.call.times for row in learns),
    evaluation=batch * _batches(config, size, done),
  )


def evaluations(config: Config, done: int) -> int:
  """How many evaluations there are from iteration `done` on."""
  return sum(is_due(config, iteration) for iteration in range(done, config.iterations + 1))


def drawn_by_evaluation(evals: Sequence[EvalConfig]) -> list[int]:
  """Images that evaluations draw, for each set of them: those with the same prompts share it."""
  return _images((one.prompts, one.images, one.images_per_prompt) for one in evals)


def _batches(config: Config, size: int, done: int) -> int:
  """Batches that evaluations draw; all are as large as the largest task's.

  The base model's measurement at its own best guidance counts as drawn with the run's.
  """
  best = _images(
    (one.prompts, one.images, one.images_per_prompt, one.base_guidance)
    for one in config.eval
    if one.base_guidance not in (0, config.policy.guidance_scale)
  )
  always, once = (
    sum(math.ceil(images / size) for images in drawn)
    for drawn in (drawn_by_evaluation(config.eval), best if done == 0 else [])
  )
  return evaluations(config, done) * always + once


def _images(sets: Iterable[tuple[Any, ...]]) -> list[int]:
  return [images for _, images, *_ in dict.fromkeys(sets)]


def _draws(row: Row) -> bool:
  """Whether it is one of the two programs that draw; names may end with the size of the batch."""
  return row.call.name.split()[0] in ("encode", "sample")


def chip_hours(flops: float, chip: Chip, utilisation: float) -> float:
  """Hours that one chip is busy with this work."""
  return flops / (chip.flops * utilisation) / 3600
