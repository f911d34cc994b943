"""What a prompt's metadata names (objects, an occupation), and the mean over what is named."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlft.types import UserError


def names(known: Mapping[str, Any], key: str) -> list[str]:
  """The words under `key` of one prompt's metadata; none if the key is missing or empty.

  Raises:
    UserError: there is something else than words.
  """
  # A column of a table may hold None, one word, or an array of words.
  found = known.get(key)
  words = [] if found is None else [found] if isinstance(found, str) else found
  if not isinstance(words, (list, tuple, np.ndarray)) or not all(
    isinstance(word, str) for word in words
  ):
    raise UserError(
      f"a prompt's metadata has {key!r}: {str(found)[:50]}, which is no list of words: write e.g."
      f' {{"prompt": "a dog and a cat", "{key}": ["dog", "cat"]}}'
    )
  return list(words)


def has(known: Mapping[str, Any], key: str) -> bool:
  """Whether one prompt's metadata has anything under `key`, words or something else."""
  found = known.get(key)
  return found is not None and (not hasattr(found, "__len__") or len(found) > 0)


def mean(confidences: jax.Array, present: jax.Array) -> jax.Array:
  """Mean over what each prompt names.

  Args:
    confidences: `[B, M]` in [0, 1].
    present: `[B, M]` bool, False for padding.

  Returns:
    `[B]` float32 in [0, 1]; NaN where nothing is named.
  """
  total = jnp.sum(jnp.where(present, confidences, 0.0), axis=1)
  count = jnp.sum(present, axis=1)
  return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan)
