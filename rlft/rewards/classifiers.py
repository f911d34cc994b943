"""Any attribute classifier as a set reward: how evenly its classes occur among a prompt's images.

    parity?classifier=jax:file.py:function     function(images) -> probs
    parity?classifier=host:file.py:function    function(images, prompts, metadata) -> probs
    parity?classifier=factory:file.py:function a Reward whose score returns probs

`images` are `[B, H, W, 3]` float32 in [0, 1] and probs `[B, A]`; a row that is not finite says that
there is nothing to classify in that image.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from rlft.rewards import parity, sets, user
from rlft.rewards.scoring import errors, host
from rlft.types import HostReward, JaxReward, Reward, Scores, UserError

# `(images, prompts, metadata) -> probs`, all of length B, called from several threads at once.
HostClassifier = Callable[[np.ndarray, Sequence[str], Sequence[Mapping[str, Any]]], np.ndarray]


def parity_of(
  classifier: str, *, credit: sets.Credit = "set", shares: parity.Shares = "hard"
) -> Reward:
  """'parity': minus the statistical parity of a classifier's classes, on sets of images.

  Args:
    classifier: 'jax:', 'host:' or 'factory:' and a function, as for a reward of one's own.
    credit: who gets the score, see `rlft.rewards.sets`.
    shares: 'soft' has a gradient, see `parity.parity_reward`.

  Raises:
    UserError: no such function, or it judges something else than single images.
  """
  if classifier.partition(":")[0] not in user.KINDS:
    raise UserError(
      f"reward 'parity': classifier={classifier} is no function: write"
      f" {', '.join(f'{kind}:file.py:function' for kind in user.KINDS)}"
    )
  found = user.user_reward(classifier)
  prepares = isinstance(found, JaxReward) and found.prepare is not None
  if found.is_set or prepares:
    what = "sets of images (is_set)" if found.is_set else "what prepare says about the prompt"
    raise UserError(f"reward 'parity': {classifier} takes {what}: give a function of single images")
  if isinstance(found, HostReward):
    reward = host_parity(found.score, classifier, credit=credit, shares=shares)
    return dataclasses.replace(reward, threads=found.threads, needs=found.needs)

  def classify(params, images):
    probs = found.score(params, images, None)
    _check(classifier, probs, len(images))
    return probs

  reward = parity.parity_reward(classify, classifier, found.params, credit=credit, shares=shares)
  return dataclasses.replace(reward, needs=found.needs)


def host_parity(
  classify: HostClassifier,
  name: str,
  *,
  credit: sets.Credit = "set",
  shares: parity.Shares = "hard",
) -> HostReward:
  """`parity.parity_reward` for a classifier that runs on the host."""

  def score(images, prompts, metadata):
    num_prompts, num_images = images.shape[:2]
    repeated = ([x for x in texts for _ in range(num_images)] for texts in (prompts, metadata))
    probs = host.as_numpy(classify(images.reshape(-1, *images.shape[2:]), *repeated))
    _check(name, probs, num_prompts * num_images)
    probs = np.asarray(probs, np.float32).reshape(num_prompts, num_images, -1)
    with on_cpu():
      return jax.tree.map(np.asarray, _scores(probs, credit, shares))

  return HostReward(name, score, is_set=True, is_measure=credit != "leave-one-out")


def on_cpu() -> contextlib.AbstractContextManager:
  """Runs JAX on the CPU, where there is such a backend: a host reward must not queue up behind the
  images that the accelerator draws meanwhile."""
  try:
    return jax.default_device(jax.local_devices(backend="cpu")[0])
  except RuntimeError:
    return contextlib.nullcontext()


@functools.partial(jax.jit, static_argnums=(1, 2))
def _scores(probs: jax.Array, credit: str, shares: str) -> Scores:
  return sets.score_sets(probs, parity.MEASURES[shares], credit=credit)


def _check(name: str, probs: Any, count: int) -> None:
  shape = getattr(probs, "shape", ())
  if not errors.is_real_array(probs) or len(shape) != 2 or shape[0] != count or shape[1] < 2:
    raise UserError(
      f"the classifier {name!r} returned {errors.describe(probs)}, expected float32[{count},"
      " A]: return the probabilities of its A classes (2 or more) for each image"
    )
