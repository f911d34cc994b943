"""Tries each reward on images of noise, before anything large is compiled.

Host rewards are called once, and JAX rewards traced.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlft.data import sources
from rlft.parallel import processes
from rlft.rewards import named
from rlft.rewards.scoring import errors, scorer
from rlft.rewards.scoring.host import HostCaller
from rlft.types import HostReward, JaxReward, Prompt, Reward, UserError

_PROMPTS = 64  # that a JAX reward is asked about
_IMAGES = 2  # that a host reward scores; of a reward on sets, one set
_WITH_METADATA = 1000  # prompts, spread evenly, that must have what a reward needs


@dataclasses.dataclass(frozen=True)
class Use:
  """What a reward is used for.

  Attributes:
    where: in the settings, e.g. '--eval=name=both: metric'.
    reward: the reward.
    prompts: whose images it scores.
    images_per_prompt: G.
    may_lack: the greatest share of the prompts that may lack what the reward needs; if 1, one of
      them has to have it.
  """

  where: str
  reward: Reward
  prompts: Sequence[Prompt]
  images_per_prompt: int
  may_lack: float = 1.0


def try_each(uses: Iterable[Use], *, image_shape: tuple[int, ...], timeout_s: float) -> None:
  """Tries rewards with the first of their prompts: JAX rewards are traced, host rewards called.

  Args:
    uses: what to try; a reward that is used twice in the same way is tried once.
    image_shape: `(H, W, 3)`.
    timeout_s: deadline in seconds for the call of a host reward.

  Raises:
    UserError: on every process, if a reward on one fails, returns something else than scores, or
      needs what its prompts' metadata has not.
  """
  tried: set[tuple[int, int, int, float]] = set()
  for use in uses:
    key = id(use.reward), id(use.prompts), use.images_per_prompt, use.may_lack
    if key in tried:
      continue
    tried.add(key)
    with processes.together(), errors.located(use.where, use.reward.name):
      _try(use, image_shape, timeout_s)


def _try(use: Use, image_shape: tuple[int, ...], timeout_s: float) -> None:
  reward, group = use.reward, use.images_per_prompt if use.reward.is_set else 1
  _check_metadata(use)
  if isinstance(reward, JaxReward):
    images, features = example(reward, use.prompts, group, image_shape)
    jax.eval_shape(
      lambda params, images, features: scorer.apply(reward, group, params, images, features),
      reward.params,
      images,
      features,
    )
  else:
    _call(reward, use.prompts, group, image_shape, timeout_s)


def example(
  reward: JaxReward, prompts: Sequence[Prompt], group: int, image_shape: tuple[int, ...]
) -> tuple[jax.ShapeDtypeStruct, Any]:
  """What a JAX reward is traced with: the shape of images of the first prompts, and features.

  Args:
    reward: whose features they are.
    prompts: of which the first are taken.
    group: images of each; G of a reward on sets, else 1.
    image_shape: `(H, W, 3)`.
  """
  prompts = [prompt for prompt in prompts[:_PROMPTS] for _ in range(group)]
  images = jax.ShapeDtypeStruct((len(prompts), *image_shape), jnp.float32)
  return images, scorer.prepared(reward, prompts)


def _check_metadata(use: Use) -> None:
  """Raises `UserError` if too few prompts have in their metadata what the reward needs."""
  if not (keys := use.reward.needs):
    return
  looked_at = sources.take(use.prompts, sources.spread(len(use.prompts), _WITH_METADATA))
  lacking = [p for p in looked_at if not any(named.has(p.metadata, key) for key in keys)]
  if len(lacking) < len(looked_at) and len(lacking) <= use.may_lack * len(looked_at):
    return
  of = "none" if len(lacking) == len(looked_at) else f"{len(looked_at) - len(lacking):,}"
  raise UserError(
    f"reward {use.reward.name!r} needs {' or '.join(map(repr, keys))} in the prompts' metadata,"
    f" which {of} of {len(looked_at):,} that were looked at {'has' if of == 'none' else 'have'},"
    f" and {lacking[0].text!r} has not: give prompts that have it (a .jsonl file, or a column of a"
    " table), or another reward"
  )


def _call(
  reward: HostReward,
  prompts: Sequence[Prompt],
  group: int,
  image_shape: tuple[int, ...],
  timeout_s: float,
) -> None:
  count = 1 if reward.is_set else _IMAGES
  shape = (count, group, *image_shape) if reward.is_set else (count, *image_shape)
  images = np.random.default_rng(0).random(shape, np.float32)
  caller = HostCaller(reward, timeout_s=timeout_s, threads=1)
  try:
    caller.finish(caller.start(images, list(itertools.islice(itertools.cycle(prompts), count))))
  finally:
    caller.close()
