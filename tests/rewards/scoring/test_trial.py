"""Rewards are tried before anything large is compiled."""

import contextlib
import time

import jax.numpy as jnp
import numpy as np
import pytest

from rlft import catalog
from rlft.rewards.scoring import trial
from rlft.types import HostReward, JaxReward, Prompt, UserError

PLAIN = [Prompt("a dog"), Prompt("a cat")]
NAMED = [Prompt("a dog"), Prompt("a cat", {"objects": ["cat"]})]


def refuse(*arrays):
  raise ValueError("no luck")


def attempt(*rewards, prompts=PLAIN, group=1):
  uses = [trial.Use("--eval=name=e: metric", reward, prompts, group) for reward in rewards]
  trial.try_each(uses, image_shape=(8, 4, 3), timeout_s=2)


def test_a_jax_reward_is_traced_with_the_prompts():
  seen = []

  def prepare(prompts, metadata):
    return np.array([len(prompt) for prompt in prompts])

  def score(params, images, features):
    seen.append((images.shape, images.dtype, features.shape))
    return params * images.mean((2, 3, 4)).mean(1) + features[:, 0]

  reward = JaxReward("r", score, prepare=prepare, params=np.float32(2), is_set=True)
  attempt(reward, reward, group=4)  # Once, as the second is the same.
  assert seen == [((2, 4, 8, 4, 3), jnp.float32, (2, 4))]


def test_a_host_reward_is_called_once():
  calls = []

  def score(images, prompts, metadata):
    calls.append((images.shape, images.dtype, prompts, metadata))
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0
    return np.zeros(len(prompts))

  reward = HostReward("r", score)
  attempt(reward, reward, HostReward("s", score, is_set=True, threads=3), prompts=NAMED, group=4)
  assert calls == [
    ((2, 8, 4, 3), np.float32, ["a dog", "a cat"], [{}, {"objects": ["cat"]}]),
    ((1, 4, 8, 4, 3), np.float32, ["a dog"], [{}]),
  ]


@pytest.mark.parametrize(
  ("reward", "message"),
  [
    (HostReward("r", refuse), "raised ValueError: no luck .*test_trial.py"),
    (HostReward("r", lambda images, *_: images), r"returned float32\[2, 8, 4, 3\], expected"),
    (HostReward("r", lambda *_: time.sleep(5)), "scored 0 of the 1 parts of the batch in 2 s"),
    (JaxReward("r", refuse), "raised ValueError: no luck .*test_trial.py"),
    (JaxReward("r", lambda _, images, __: images), r"returned float32\[2, 8, 4, 3\], expected"),
    (JaxReward("r", lambda _, images, __: images @ images), "raised TypeError"),
    (JaxReward("r", lambda *_: 0, prepare=refuse), "raised ValueError: no luck"),
    (
      JaxReward("r", lambda *_: 0, needs=("objects", "words")),
      " needs 'objects' or 'words' in the prompts' metadata, which none of 2 that were looked at"
      " has, and 'a dog' has not: give",
    ),
  ],
)
def test_what_fails_is_an_error_of_one_line(reward, message):
  with pytest.raises(UserError, match=f"^--eval=name=e: metric=r ?{message}") as error:
    attempt(reward)
  assert "\n" not in str(error.value)


def test_one_prompt_with_metadata_is_enough():
  score = lambda images, prompts, metadata: np.zeros(len(prompts))  # noqa: E731
  attempt(HostReward("r", score, needs=("objects",)), prompts=NAMED)


@pytest.mark.parametrize(("may_lack", "enough"), [(0.6, True), (0.5, True), (0.4, False)])
def test_a_task_needs_metadata_of_nearly_all_its_prompts(may_lack, enough):
  score = lambda images, prompts, metadata: np.zeros(len(prompts))  # noqa: E731
  prompts = [*NAMED, *NAMED] * 1000  # those that lack it are not among the first alone
  use = trial.Use("t", HostReward("r", score, needs=("objects",)), prompts, 1, may_lack)
  context = contextlib.nullcontext() if enough else pytest.raises(UserError, match="500 of 1,000")
  with context:
    trial.try_each([use], image_shape=(8, 4, 3), timeout_s=5)


def test_metadata_need_not_be_words():
  score = lambda images, prompts, metadata: np.zeros(len(prompts))  # noqa: E731
  for value in ([{"class": "dog", "count": 2}], [["Is it a dog?", "yes"]], 3, np.array(["dog"])):
    prompts = [Prompt("a dog", {"objects": value})]
    attempt(HostReward("r", score, needs=("objects",)), prompts=prompts)
  for value in ([], "", None):
    with pytest.raises(UserError, match="none of 1 that were looked at has"):
      prompts = [Prompt("a dog", {"objects": value})]
      attempt(HostReward("r", score, needs=("objects",)), prompts=prompts)


@pytest.mark.parametrize("value", [3, {"dog": 1}, ["dog", 3]])
def test_words_of_another_kind_are_refused(value):
  prompts = [Prompt("a dog", {"objects": value})]
  with pytest.raises(UserError, match="metadata has 'objects': .* which is no list of words"):
    attempt(catalog.make_reward("oracle-both"), prompts=prompts)
