"""The choice of settings: one after the other, each with the best of those before it."""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any

Settings = Mapping[str, Any]


def choose(
  start: Settings, rounds: Mapping[str, Sequence[Any]], value: Callable[[Settings], float]
) -> tuple[Settings, list[tuple[Settings, float]]]:
  """Tries the values of each setting in turn, and keeps the best.

  Args:
    start: all settings.
    rounds: values by setting, in the order in which they are tried; the start's is tried as well.
    value: what a combination is worth, more is better; NaN where it came to nothing.

  Returns:
    The best combination, and all that were tried with what they are worth.
  """
  tried = [(dict(start), value(start))]
  best = 0
  for name, values in rounds.items():
    settings = tried[best][0]
    for one in values:
      if one != settings[name]:
        changed = settings | {name: one}
        tried.append((changed, value(changed)))
    worth = [-math.inf if math.isnan(found) else found for _, found in tried]
    best = worth.index(max(worth))
  return tried[best][0], tried
