"""What a user may write for a reward: name?key=value&key=value."""

import pathlib
import subprocess
import sys
from typing import Literal

import numpy as np
import pytest

from rlft import catalog
from rlft.config import settings as config
from rlft.config import stored, tasks
from rlft.rewards import grammar
from rlft.types import HostReward, Reward, UserError


def factory(
  weights: str,
  size: int = 224,
  scale: float | None = None,
  *,
  dtype: Literal["float32", "bfloat16"] = "float32",
  clip: bool = True,
  table: pathlib.Path = pathlib.Path("t"),
  clock=None,
  shape: tuple[int, int] = (1, 1),
) -> dict:
  return locals()


def made(spec, function=factory):
  name, given = grammar.split(spec)
  assert name == "r"
  return grammar.call(function, spec, given)


def test_values_are_read_as_the_annotations_say():
  spec = "r?weights=/a/b.pt&size=32&scale=1e-2&dtype=bfloat16&clip=false&table=x/y&clock=now"
  assert made(spec) == {
    "weights": "/a/b.pt",
    "size": 32,
    "scale": 0.01,
    "dtype": "bfloat16",
    "clip": False,
    "table": pathlib.Path("x/y"),
    "clock": "now",
    "shape": (1, 1),
  }
  assert made("r?weights=org/name@v1/f.pt") == factory("org/name@v1/f.pt")


def test_a_value_may_hold_anything():
  # Only %, & and what --task cuts at need a code; the rest stands for itself.
  text = "http://h:1/v2?a=b&c=ü,100% +;#'\""
  assert made("r?weights=http://h:1/v2?a=b%26c=ü%2C100%25 +;#'\"")["weights"] == text
  assert grammar.split("r?a=%C3%BC&b=+") == ("r", {"a": "ü", "b": "+"})
  assert grammar.split("r") == grammar.split("r?") == ("r", {})


def test_a_factory_may_take_any_option():
  assert made("r?a=1&size=2", lambda size=1, **rest: (size, rest)) == ("2", {"a": "1"})


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("r?weigths=a", "'r?weigths=a': unknown option 'weigths', did you mean weights?"),
    ("r?size=2", "'r?size=2': add &weights=..."),
    ("r", "reward 'r': add ?weights=..."),
    ("r?weights=a&size=2.5", "size=2.5 is not a whole number"),
    ("r?weights=a&scale=much", "scale=much is not a number"),
    ("r?weights=a&scale=nan", "scale=nan is not a number"),
    ("r?weights=a&clip=yes", "clip=yes is neither true nor false"),
    ("r?weights=a&dtype=float16", "dtype=float16 is not known: did you mean bfloat16?"),
    ("r?weights=", "weights= has no value, write weights=..."),
    ("r?weights=a&weights=b", "weights is given twice, remove one"),
    ("r?weights=a&size", "'size' is not key=value (write & in a value as %26)"),
    ("r?weights=a&", "'' is not key=value"),
    ("r?weights=100%", "write % as %25 in weights=100%"),
    ("r?weights=a&shape=1", "shape cannot be given as text, as its factory takes tuple[int, int]"),
  ],
)
def test_mistakes_get_one_line_made_from_the_signature(spec, message):
  with pytest.raises(UserError) as error:
    made(spec)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("jpeg?quality=80", "'jpeg?quality=80': unknown option 'quality', it takes none"),
    ("oracle-both?a=1", "unknown option 'a', it takes none"),
    ("jpg?a=1", "reward 'jpg?a=1': there is none of this name (did you mean 'jpeg'?)"),
    ("host:f.py:g?a=1", "takes no options: write a function that returns a rlft.types.Host"),
  ],
)
def test_mistakes_in_the_name(spec, message):
  with pytest.raises(UserError) as error:
    catalog.make_reward(spec)
  assert message in str(error.value)


def test_the_reward_has_the_name_that_was_written(monkeypatch):
  def some(size: int) -> Reward:
    return HostReward("some", lambda images, prompts, metadata: np.full(len(images), size))

  monkeypatch.setattr(sys.modules[__name__], "some", some, raising=False)
  monkeypatch.setattr(catalog, "REWARDS", {"some": f"{__name__}:some"})
  reward = catalog.make_reward("some?size=3")
  assert reward.name == "some?size=3"
  np.testing.assert_array_equal(reward.score(np.zeros((2, 1, 1, 3)), ["", ""], [{}, {}]), [3, 3])


def test_a_task_takes_all_of_it():
  spec = "http://h:8000/v2/models/m/versions/2?output=score&token_env=A_B&x=a%2Cb?c=d"
  (task,) = tasks.parse_task(f"name=a,prompts=p.txt,reward={spec},batch_size=8")
  assert task.reward == spec and task.batch_size == 8
  (task,) = tasks.parse_task(f"emoji-preference,reward={spec}")
  assert task.reward == spec
  (entry,) = tasks.parse_eval(f"name=a,prompts=p.txt,metric={spec}")
  assert entry.metric == spec
  settings = config.Config(task=(task,), eval=(entry,))
  assert stored.from_json(stored.to_json(settings)) == settings
  with pytest.raises(UserError, match=r"'b' is not key=value \(a value cannot hold a comma\)"):
    tasks.parse_task("name=a,prompts=p.txt,reward=r?x=a,b")


def test_importing_the_package_imports_no_reward():
  program = "import sys, rlft.rewards.user; print(*(m for m in sys.modules if m[:4] == 'rlft'))"
  path = str(pathlib.Path(grammar.__file__).parents[2])
  found = subprocess.run(
    [sys.executable, "-c", program], env={"PYTHONPATH": path}, capture_output=True, text=True
  )
  assert set(found.stdout.split()) == {
    *("rlft", "rlft.config", "rlft.config.fields", "rlft.config.settings", "rlft.types"),
    *("rlft.storage", "rlft.storage.files"),
    *(
      "rlft.rewards",
      "rlft.rewards.scoring",
      "rlft.rewards.scoring.errors",
      "rlft.rewards.grammar",
      "rlft.rewards.user",
    ),
  }, found.stderr
