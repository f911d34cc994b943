"""The numbers of an iteration: names and means, from what its parts returned."""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from rlft.rewards.scoring.statistics import constant_share
from rlft.rewards.scoring.task import Scored

# What the updates of several tasks are summed up by.
_OF_TASKS = {
  "ratio/max_abs_deviation": max,
  "clip_fraction": np.mean,
  "approx_kl": np.mean,
  "kl_to_base": np.mean,
  "loss/denoising": np.mean,
  "graded/over_target": np.mean,
  "grad_norm": np.mean,
}


def of_task(
  name: str, scored: Scored, fetch: Callable[[jax.Array], np.ndarray], *, group: int | None = None
) -> dict[str, float]:
  """What a task's images scored.

      reward/<task>/...           what is trained on
      reward/<task>/<label>/...   a term of a sum, before it is normalised
      credit/<task>/...           what each image of a set gets, where that is not the set's score
      veto/<task>/...             the veto's reward, and `share`: of the images that it vetoed
      watch/<task>/...            the judge

  Each with `mean`, `std`, `min`, `max` of the images that could be scored, `unscored`, the share of
  the others, and `found`, the share of the images that show what is measured, where that is known.
  `reward/<task>/constant` is the share of the groups, or 1 for the whole batch, in which all scores
  are the same, so that nothing is learned from them; left out where none are compared.

  Args:
    name: of the task.
    scored: its images.
    fetch: gets a whole array from the devices.
    group: images that are compared with each other; None compares all of the batch, 0 none.
  """
  parts = {f"{name}/{label}": scores for label, scores in scored.terms.items()}
  parts = {f"reward/{key}": scores for key, scores in {name: scored.scores, **parts}.items()}
  if scored.veto is not None:
    parts[f"veto/{name}"] = scored.veto
  if scored.watch is not None:
    parts[f"watch/{name}"] = scored.watch
  metrics = {}
  for prefix, scores in parts.items():
    values = fetch(scores.values)
    if scores.whole is not None:
      metrics |= _statistics(f"credit{prefix.removeprefix('reward')}", values)
      values = fetch(scores.whole)
    metrics |= _statistics(prefix, values)
    if scores.found is not None:
      metrics[f"{prefix}/found"] = float(fetch(scores.found).mean())
  if group != 0:
    values = fetch(scored.scores.values)
    metrics[f"reward/{name}/constant"] = constant_share(values, group)
  if scored.vetoed is not None:
    metrics[f"veto/{name}/share"] = float(fetch(scored.vetoed).mean())
  return metrics


def _statistics(prefix: str, scores: np.ndarray) -> dict[str, float]:
  """Mean, spread and ends of `[B]` scores; NaN is counted and left out."""
  valid = scores[np.isfinite(scores)]
  statistics = {key: float("nan") for key in ("mean", "std", "min", "max")}
  if len(valid):
    statistics = {key: float(getattr(valid, key)()) for key in statistics}
  metrics = {f"{prefix}/{key}": value for key, value in statistics.items()}
  return metrics | {f"{prefix}/unscored": 1.0 - len(valid) / len(scores)}


def summarise(metrics: Mapping[str, float], images: int) -> dict[str, float]:
  """Puts the figures of the whole iteration before those of its tasks.

  Figures that no task has (of updates, these are what the algorithm reports) are left out.

  Args:
    metrics: `<key>/<task>` of all tasks.
    images: sampled in the iteration.
  """

  def of(key):
    return [value for name, value in metrics.items() if name.startswith(f"{key}/")]

  figures = {key: float(over(of(key))) for key, over in _OF_TASKS.items() if of(key)}
  times = {
    f"time/{phase}_s": sum(of(f"time/{phase}_s")) for phase in ("sample", "reward", "update")
  }
  seconds = sum(times.values())
  return {
    **figures,
    **times,
    "time/iteration_s": seconds,
    "images_per_second": images / seconds,
    **metrics,
  }
