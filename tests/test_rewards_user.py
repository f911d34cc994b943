"""Rewards by name: the built-in host reward, and a user's functions."""

import io
import sys
import types

import numpy as np
from PIL import Image
import pytest

from rlft import emoji, rewards
from rlft.types import Reward, UserError

FILE = """
import dataclasses
import numpy as np

@dataclasses.dataclass
class Box:
  value: "int" = 1

def brightness(images, prompts, metadata):
  return images.mean(axis=(1, 2, 3))

def contrast(images, prompts, metadata):
  return images.std(axis=(1, 2, 3, 4))
contrast.is_set = True

def red(images):
  return images[..., 0].mean(axis=(1, 2))

def named(images, features):
  return images.mean(axis=(1, 2, 3)) * features
named.prepare = lambda prompts, metadata: np.array([len(p) for p in prompts], np.float32)

def two_arguments(images, prompts):
  return images.mean(axis=(1, 2, 3))

number = 3
"""


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "my_rewards.py"
  path.write_text(FILE)
  return path


def test_jpeg_is_minus_the_kilobytes_of_the_file():
  reward = rewards.make_reward("jpeg")
  noise = np.random.default_rng(0).random((32, 32, 3), np.float32)
  images = np.stack([np.full((32, 32, 3), 0.5, np.float32), noise, np.full_like(noise, np.nan)])
  scores = reward.score(images, [""] * 3, [{}] * 3)
  assert reward.kind == "host" and not reward.is_set
  file = io.BytesIO()
  Image.fromarray(np.uint8(noise * 255 + 0.5)).save(file, "JPEG", quality=95)
  np.testing.assert_allclose(scores, [scores[0], -len(file.getvalue()) / 1000, np.nan])
  assert scores[1] < -1.5 < -1 < scores[0] < -0.3  # The header alone is 0.6 kB.


def test_functions_from_a_file(file):
  images = np.arange(24, dtype=np.float32).reshape(2, 2, 2, 3)
  host = rewards.make_reward(f"host:{file}:brightness")
  assert (host.name, host.kind, host.is_set) == (f"host:{file}:brightness", "host", False)
  np.testing.assert_allclose(host.score(images, ["", ""], [{}, {}]), [5.5, 17.5])
  assert rewards.make_reward(f"host:{file}:contrast").is_set
  jax = rewards.make_reward(f"jax:{file}:red")
  assert jax.kind == "jax" and jax.prepare is None
  np.testing.assert_allclose(jax.score(None, images, None), [4.5, 16.5])
  named = rewards.make_reward(f"jax:{file}:named")
  features = named.prepare(["a", "dog"], [{}, {}])
  np.testing.assert_allclose(named.score(None, images, features), [5.5, 52.5])


def test_a_file_is_run_once(file):
  a = rewards.make_reward(f"host:{file}:brightness")
  assert a.score is rewards.make_reward(f"host:{file}:brightness").score


def test_function_from_a_module(file, monkeypatch):
  monkeypatch.syspath_prepend(file.parent)
  reward = rewards.make_reward("host:my_rewards:brightness")
  np.testing.assert_allclose(reward.score(np.ones((1, 2, 2, 3)), [""], [{}]), [1])


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("host:brightness", "incomplete: write host:module:function or host:file.py:function"),
    ("jax:", "incomplete: write jax:module:function or jax:file.py:function"),
    ("host:{file}x.py:brightness", "there is no file {file}x.py: correct the path"),
    ("host:no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
    ("host:{file}:brightnes", "has no function 'brightnes': did you mean 'brightness'?"),
    ("host:{file}:number", "'number' in {file} is a int, not a function"),
    ("host:{file}:red", "takes (images), but is called with (images, prompts, metadata)"),
    ("jax:{file}:two_arguments", "takes (images, prompts), but is called with (images)"),
  ],
)
def test_mistakes_get_one_line_that_says_what_to_do(file, spec, message):
  with pytest.raises(UserError) as error:
    rewards.make_reward(spec.format(file=file))
  assert message.format(file=file) in str(error.value)
  assert "\n" not in str(error.value)


def test_a_file_that_fails_to_import(tmp_path):
  path = tmp_path / "broken.py"
  path.write_text("import json\njson.loads('{')\n")
  with pytest.raises(UserError, match="importing .* failed with JSONDecodeError: .*PYTHONPATH"):
    rewards.make_reward(f"host:{path}:f")


def test_names_of_rewards_and_oracles(monkeypatch):
  oracles = types.ModuleType("rlft.emoji.oracles")
  oracles.ORACLES = {"oracle-parity": lambda: Reward("oracle-parity", "host", len)}
  monkeypatch.setitem(sys.modules, "rlft.emoji.oracles", oracles)
  monkeypatch.setattr(emoji, "oracles", oracles, raising=False)
  assert rewards.make_reward("oracle-parity").name == "oracle-parity"
  with pytest.raises(
    UserError, match=r"'oracle-party' \(did you mean 'oracle-parity'\?\): use one"
  ):
    rewards.make_reward("oracle-party")
  with pytest.raises(
    UserError, match="'qqq': use one of emoji-tone-parity, .*jpeg, oracle-parity, "
  ):
    rewards.make_reward("qqq")
