"""What can be wrong with a reward while it runs, in one line each."""

from collections.abc import Iterator
import contextlib
import functools
import sysconfig
import traceback
from typing import Any

import jax.numpy as jnp

from rlft.types import Reward, Scores, UserError


class RewardError(UserError):
  """The reward failed: it raised, answered too late, or returned something else than scores."""


def raised(reward: Reward, error: BaseException) -> RewardError:
  """Says where `error` came out of the reward, and what to do."""
  message = " ".join(str(error).split())
  if isinstance(error, UserError):
    return RewardError(f"reward {reward.name!r}: {message}")
  message = message[:300]
  return RewardError(
    f"reward {reward.name!r} raised {type(error).__name__}: {message}{_where(error)}; correct that,"
    " or return NaN for what cannot be scored"
  )


def not_made(spec: str, error: BaseException) -> UserError:
  """Says where `error` came out of the factory of the reward `spec`."""
  message = " ".join(str(error).split())[:300]
  return UserError(
    f"reward {spec!r}: its factory raised {type(error).__name__}: {message}{_where(error)}; correct"
    " that"
  )


@contextlib.contextmanager
def located(where: str, spec: str) -> Iterator[None]:
  """Says of a mistake with the reward `spec` where it was made, e.g. '--eval=name=e: metric'."""
  try:
    yield
  except UserError as error:
    message, head = str(error), f"reward {spec!r}"
    rest = message.removeprefix(head) if message.startswith(head) else f": {message}"
    raise type(error)(f"{where}={spec}{rest}") from error


def is_real_array(value: Any) -> bool:
  """Whether `value` is an array (numpy, JAX or traced) of real numbers."""
  dtype = getattr(value, "dtype", None)
  return dtype is not None and any(
    jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)
  )


def describe(value: Any) -> str:
  """'float32[2, 3]' of an array, else the type's name."""
  dtype = getattr(value, "dtype", None)
  return type(value).__name__ if dtype is None else f"{dtype}{list(value.shape)}"


def scores_of_images(reward: Reward, returned: Any, num_prompts: int, group_size: int) -> Scores:
  """What a reward returned, as one number for each image; see `_per_image`.

  Raises:
    RewardError: `returned` is neither an array of scores nor `Scores` with such.
  """
  if not isinstance(returned, Scores):
    returned = Scores(returned)
  per_image = functools.partial(_per_image, reward, num_prompts=num_prompts, group_size=group_size)
  others = (None if x is None else per_image(x) for x in (returned.whole, returned.found))
  return Scores(per_image(returned.values), *others)


def _per_image(reward: Reward, scores: Any, num_prompts: int, group_size: int) -> Any:
  """One score for each image, of what a reward returned: each image of a set has the set's score.

  Args:
    reward: what returned it.
    scores: `[P]` or, of a set reward, `[P, G]`; numpy, JAX or traced.
    num_prompts: P; of a reward that is not on sets, the number of images.
    group_size: G; 1 for a reward that is not on sets.

  Returns:
    `[P * G]`, of the type that it was.

  Raises:
    RewardError: `scores` is not a real array of one of these shapes.
  """
  numbers, shape = is_real_array(scores), getattr(scores, "shape", None)
  if numbers and shape == (num_prompts,):
    return scores.repeat(group_size)
  if numbers and reward.is_set and shape == (num_prompts, group_size):
    return scores.reshape(-1)
  found = describe(scores)
  wanted = f"float32[{num_prompts}]: return one number for each image"
  if reward.is_set:
    wanted = (
      f"float32[{num_prompts}] or float32[{num_prompts}, {group_size}]: return one number for each"
      " set of images, or for each image of each set"
    )
  raise RewardError(f"reward {reward.name!r} returned {found}, expected {wanted}")


def _where(error: BaseException) -> str:
  """' (file:line)' of the deepest frame that is neither this package's nor a library's."""
  frames = traceback.extract_tb(error.__traceback__)
  frames = [frame for frame in frames if not frame.filename.endswith(_CALLERS)]
  frames = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)] or frames
  return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


_CALLERS = tuple(
  f"rlft/rewards/{name}.py" for name in ("scoring/scorer", "scoring/host", "user", "grammar")
)
_LIBRARIES = tuple(sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib"))
