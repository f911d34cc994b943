"""What the emoji world's guards say of pictures whose faults are known.

    python experiments/guards.py

Eight renderings of each of 16 test prompts (singles, pairs and portraits), spoiled in one way after
another, by distance, diversity and likeness (docs/protocol.md, which has the table). Duration: a
minute on 2 cores.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.ndimage

from rlft.emoji import guards, prompts
from rlft.evaluation.tables import Table
from rlft.rewards.scoring import scorer
from rlft.types import Prompt

PROMPTS, EACH = 16, 8


def drawn(asked: list[Prompt], **how: Any) -> np.ndarray:
  """`[16, 8, H, W, 3]` float32 in [0, 1]: renderings of what the prompts name."""
  rng = np.random.default_rng(1)
  found = [guards.render(prompt.metadata, rng, EACH, **how) for prompt in asked]
  return np.stack(found) / np.float32(255)


def pictures(asked: list[Prompt]) -> Mapping[str, np.ndarray]:
  """All pictures of the table, by what they are."""
  clean = drawn(asked, **guards.CLEAN)
  rng = np.random.default_rng(2)

  def noisy(size: float) -> np.ndarray:
    return np.clip(clean + rng.normal(size=clean.shape, scale=size), 0, 1).astype(np.float32)

  return {
    "other clean renderings": clean,
    "slightly blurred": scipy.ndimage.gaussian_filter(clean, (0, 0, 0.6, 0.6, 0)),
    "noise of 0.1 on each channel": noisy(0.1),
    "crowded": drawn(asked, **guards.CLEAN | {"crowded": True}),
    "as the world draws them: washed out, crowded": drawn(asked),
    "noise of 0.2": noisy(0.2),
    "the same picture 8 times": np.repeat(clean[:, :1], EACH, axis=1),
    "of other prompts": np.roll(clean, 1, axis=0),
    "burnt (contrast doubled)": np.clip(2 * clean - 0.5, 0, 1),
  }


def measured(asked: list[Prompt], images: np.ndarray) -> list[float]:
  """Distance, diversity and likeness, mean over the prompts."""
  repeated = [prompt for prompt in asked for _ in range(EACH)]
  flat = images.reshape(-1, *images.shape[2:])
  found = []
  for reward in (guards.distance(), guards.diversity(), guards.likeness()):
    group = EACH if reward.is_set else 1
    features = scorer.prepared(reward, repeated)
    scores = scorer.apply(reward, group, reward.params, flat, features)
    found.append(float(np.mean(scores.values)))
  return found


def main() -> None:
  tasks = {"single": 5, "pair": 6, "portrait": 5}
  asked = [
    found[place * len(found) // count]
    for task, count in tasks.items()
    for found in [prompts.prompts(task, "test")]
    for place in range(count)
  ]
  rows = []
  for name, images in pictures(asked).items():
    distance, diversity, likeness = measured(asked, images)
    rows.append((name, f"{distance:.2f}", f"{diversity:.1f}", f"{likeness:.2f}"))
  print(Table(("pictures", "distance", "diversity", "likeness"), rows).markdown())


if __name__ == "__main__":
  main()
