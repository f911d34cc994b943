"""Rewards by name: the built-in host reward, and a user's functions."""

import io
import pathlib

import numpy as np
from PIL import Image
import pytest

from rlft import catalog
from rlft.types import HostReward, JaxReward, UserError

EXAMPLES = pathlib.Path(__file__).parents[2] / "experiments" / "rewards"

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

# Factories, in a file of their own: nothing says how often the other has been run.
FACTORY = """
import numpy as np
from rlft.types import HostReward, JaxReward, Reward, UserError

made = []

def scaled(factor: float, kind: str = "host", threads: int = 0) -> Reward:
  made.append(factor)
  if kind == "host":
    def score(images, prompts, metadata):
      return factor * images.mean(axis=(1, 2, 3))
    return HostReward("scaled", score, threads=threads)
  if kind == "jax":
    def score(params, images, features):
      return params * images.mean(axis=(1, 2, 3)) + features
    def prepare(prompts, metadata):
      return np.array([len(p) for p in prompts], np.float32)
    return JaxReward("scaled", score, prepare=prepare, params=np.float32(factor))
  if kind == "nothing":
    return HostReward("scaled", None)
  if kind == "arguments":
    return HostReward("scaled", lambda images: images)
  if kind == "function":
    return lambda images, prompts, metadata: images
  if kind == "fails":
    return {}[
      factor]
  raise UserError("no weights in x.pt: give weights=...")
"""


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "my_rewards.py"
  path.write_text(FILE)
  return path


def test_jpeg_is_minus_the_kilobytes_of_the_file():
  reward = catalog.make_reward("jpeg")
  noise = np.random.default_rng(0).random((32, 32, 3), np.float32)
  images = np.stack([np.full((32, 32, 3), 0.5, np.float32), noise, np.full_like(noise, np.nan)])
  scores = reward.score(images, [""] * 3, [{}] * 3)
  assert isinstance(reward, HostReward) and not reward.is_set
  file = io.BytesIO()
  Image.fromarray(np.uint8(noise * 255 + 0.5)).save(file, "JPEG", quality=95)
  np.testing.assert_allclose(scores, [scores[0], -len(file.getvalue()) / 1000, np.nan])
  assert scores[1] < -1.5 < -1 < scores[0] < -0.3  # The header alone is 0.6 kB.


def test_functions_from_a_file(file):
  images = np.arange(24, dtype=np.float32).reshape(2, 2, 2, 3)
  host = catalog.make_reward(f"host:{file}:brightness")
  assert isinstance(host, HostReward) and not host.is_set
  assert host.name == f"host:{file}:brightness"
  np.testing.assert_allclose(host.score(images, ["", ""], [{}, {}]), [5.5, 17.5])
  assert catalog.make_reward(f"host:{file}:contrast").is_set
  jax = catalog.make_reward(f"jax:{file}:red")
  assert isinstance(jax, JaxReward) and jax.prepare is None
  np.testing.assert_allclose(jax.score(None, images, None), [4.5, 16.5])
  named = catalog.make_reward(f"jax:{file}:named")
  features = named.prepare(["a", "dog"], [{}, {}])
  np.testing.assert_allclose(named.score(None, images, features), [5.5, 52.5])


def test_a_file_is_run_once(file):
  a = catalog.make_reward(f"host:{file}:brightness")
  assert a.score is catalog.make_reward(f"host:{file}:brightness").score


POOL = """
from concurrent import futures
import multiprocessing
import subprocess
import sys

def one(number):
  return number + 0.5

def pool(images, prompts, metadata):
  with futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as workers:
    return list(workers.map(one, range(len(images))))

def programs(images, prompts, metadata):
  code = f"import {__name__} as own; print(own.one(1), own.__file__)"
  return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
"""


def test_other_processes_find_the_functions_of_a_file(tmp_path):
  path = tmp_path / "json.py"  # This name is taken.
  path.write_text(POOL)
  reward = catalog.make_reward(f"host:{path}:pool")
  assert reward.score(np.zeros((2, 1, 1, 3)), ["", ""], [{}, {}]) == [0.5, 1.5]
  reward = catalog.make_reward(f"host:{path}:programs")
  assert reward.score([], [], []) == f"1.5 {path}\n"


@pytest.fixture
def factory(tmp_path):
  path = tmp_path / "my_factories.py"
  path.write_text(FACTORY)
  return f"factory:{path}:scaled"


def test_a_factory_is_called_with_the_options(factory):
  images = np.arange(24, dtype=np.float32).reshape(2, 2, 2, 3)
  host = catalog.make_reward(f"{factory}?factor=2&threads=1")
  assert isinstance(host, HostReward) and host.threads == 1
  assert host.name == f"{factory}?factor=2&threads=1"
  np.testing.assert_allclose(host.score(images, ["", ""], [{}, {}]), [11, 35])
  jax = catalog.make_reward(f"{factory}?kind=jax&factor=2")
  features = jax.prepare(["a", "dog"], [{}, {}])
  np.testing.assert_allclose(jax.score(jax.params, images, features), [12, 38])


def test_a_factory_is_called_once_for_the_same_options(factory):
  for factor in (1, 2, 1, 1, 2):
    catalog.make_reward(f"{factory}?factor={factor}")
  made = catalog.make_reward(f"{factory}?factor=1").score.__globals__["made"]
  assert made == [1, 2]


def test_a_factory_of_a_module(factory, tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  reward = catalog.make_reward("factory:my_factories:scaled?factor=3")
  np.testing.assert_allclose(reward.score(np.ones((1, 2, 2, 3)), [""], [{}]), [3])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ("", r"': add \?factor=..."),
    ("?factor=a", "factor=a is not a number"),
    ("?fator=1", "unknown option 'fator', did you mean factor?"),
    ("?factor=1&kind=nothing", "returned a reward with a score of type NoneType: give a function"),
    ("?factor=1&kind=arguments", "its score.* takes .images., but is called with .images, prompts"),
    (
      "?factor=1&kind=function",
      r"its factory returned a function: return rlft.types.HostReward\(name, score\) or",
    ),
    ("?factor=1&kind=fails", r"raised KeyError: 1.0 \(.*my_factories.py:\d+\); correct that"),
    ("?factor=1&kind=else", "no weights in x.pt: give weights=..."),
  ],
)
def test_mistakes_in_a_factory(factory, options, message):
  with pytest.raises(UserError, match=message) as error:
    catalog.make_reward(factory + options)
  assert "\n" not in str(error.value)


def test_the_examples():
  images = np.zeros((2, 8, 8, 3), np.float32)
  images[0, ..., 0], images[1, ::2, :, 2] = 1, 1
  host = catalog.make_reward(f"host:{EXAMPLES}/host_function.py:warmth")
  np.testing.assert_allclose(host.score(images, ["", ""], [{}, {}]), [1, -0.5])
  jax = catalog.make_reward(f"jax:{EXAMPLES}/jax_function.py:suits")
  features = jax.prepare(["", ""], [{"objects": ["lion"]}, {"objects": ["fish"]}])
  np.testing.assert_allclose(jax.score(None, images, features), [1, 0.5])


def test_the_example_with_torch():
  pytest.importorskip("torch")
  spec = f"factory:{EXAMPLES}/factory_torch.py:sharpness?channels=4"
  flat, noise = np.full((16, 16, 3), 0.7, "f4"), np.random.default_rng(0).random((16, 16, 3), "f4")
  reward = catalog.make_reward(spec)
  flat, noise = reward.score(np.stack([flat, noise]), ["", ""], [{}, {}])
  assert reward.threads == 1
  assert flat < 1e-6 < 0.05 < noise


def test_function_from_a_module(file, monkeypatch):
  monkeypatch.syspath_prepend(file.parent)
  reward = catalog.make_reward("host:my_rewards:brightness")
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
    catalog.make_reward(spec.format(file=file))
  assert message.format(file=file) in str(error.value)
  assert "\n" not in str(error.value)


def test_a_file_that_fails_to_import(tmp_path):
  path = tmp_path / "broken.py"
  path.write_text("import json\njson.loads('{')\n")
  with pytest.raises(UserError, match="importing .* failed with JSONDecodeError: .*PYTHONPATH"):
    catalog.make_reward(f"host:{path}:f")
