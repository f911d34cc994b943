"""What can be wrong with a reward while it runs, in one line each."""

import sysconfig
import traceback
from typing import Any

import jax.numpy as jnp

from rlft.types import Reward, UserError


class RewardError(UserError):
  """The reward failed: it raised, answered too late, or returned something else than scores."""


def raised(reward: Reward, error: BaseException) -> RewardError:
  """Says where `error` came out of the reward, and what to do."""
  message = " ".join(str(error).split())[:300]
  if isinstance(error, UserError):
    return RewardError(f"reward {reward.name!r}: {message}")
  return RewardError(
    f"reward {reward.name!r} raised {type(error).__name__}: {message}{_where(error)}; correct that,"
    " or return NaN for what cannot be scored"
  )


def check_scores(reward: Reward, scores: Any, num_scores: int) -> None:
  """Raises `RewardError` unless `scores` is a real array (numpy, JAX or traced) of `num_scores`."""
  shape, dtype = getattr(scores, "shape", None), getattr(scores, "dtype", None)
  numbers = dtype is not None and any(
    jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)
  )
  if shape != (num_scores,) or not numbers:
    found = type(scores).__name__ if dtype is None else f"{dtype}{list(shape)}"
    raise RewardError(
      f"reward {reward.name!r} returned {found}, expected float32[{num_scores}]: return one number"
      f" for each {'set of images' if reward.is_set else 'image'}"
    )


def _where(error: BaseException) -> str:
  """' (file:line)' of the deepest frame that is neither this package's nor a library's."""
  frames = traceback.extract_tb(error.__traceback__)
  frames = [frame for frame in frames if not frame.filename.endswith(_CALLERS)]
  frames = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)] or frames
  return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


_CALLERS = tuple(f"rlft/rewards/{name}.py" for name in ("scoring", "host", "user"))
_LIBRARIES = tuple(sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib"))
