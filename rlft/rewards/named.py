"""What a prompt's metadata names (objects, an occupation), and the mean over what is named."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rlft.types import UserError


def names(known: Mapping[str, Any], key: str) -> list[str]:
  """The words under `key` of one prompt's metadata; none if the key is missing or empty."""
  # A column of a table may hold None, one word, or an array of words.
  found = known.get(key)
  return [] if found is None else [found] if isinstance(found, str) else list(found)


def require(
  keys: Sequence[str], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> None:
  """Raises `UserError` if the metadata of a prompt has nothing under any of `keys`."""
  for prompt, known in zip(prompts, metadata, strict=True):
    if not any(names(known, key) for key in keys):
      raise UserError(
        f"the prompt {prompt!r} has no {' or '.join(map(repr, keys))} in its metadata: use"
        " prompts that say what to draw, or another reward"
      )


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
