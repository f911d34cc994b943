"""Rewards that a user writes: a Python function, found by its module or its file.

    host:module:function   or   host:path/to/file.py:function
        function(images, prompts, metadata) -> scores; numpy arrays and lists, called from several
        threads at once: images [B, H, W, 3] float32 in [0, 1], prompts B strings, metadata B dicts.
    jax:module:function    or   jax:path/to/file.py:function
        function(images) -> scores; pure, jitted, called once on the images of all devices.
        Algorithms that follow the reward's gradient can be used with it, if it has one.
        With an attribute `function.prepare`, `(prompts, metadata) -> features` (a tree of numpy
        arrays `[B, ...]`), it is called as function(images, features).
    factory:module:function?key=value&...   or   factory:path/to/file.py:function?key=value&...
        function(key=value, ...) -> rlft.types.HostReward or rlft.types.JaxReward; for rewards that
        hold something: weights, a PyTorch model. Called once in a process for the same options,
        which rlft/rewards/grammar.py reads as the function's annotations say.

Scores are `[B]`, higher is better, NaN for an image that could not be scored. With
`function.is_set = True` the function scores the G images of a prompt together: it gets images
`[P, G, H, W, 3]`, P prompts and metadata (features `[P, G, ...]`), and returns `[P]`, or the credit
of each image `[P, G]`; `function.is_measure = False` says that this is relative to the set.
`function.lower_is_better = True` says that less is better, `function.needs = ("objects",)` that a
prompt needs one of these keys in its metadata.
"""

from collections.abc import Callable
import dataclasses
import difflib
import functools
import hashlib
import importlib
import inspect
import os
import pathlib
import sys
import tempfile
import types

from rlft.rewards import grammar
from rlft.rewards.scoring import errors
from rlft.storage import files
from rlft.types import HostReward, JaxReward, Reward, UserError

KINDS = ("host", "jax", "factory")
_MODULE = """\
__file__ = {path!r}
with open(__file__, "rb") as file:
  exec(compile(file.read(), __file__, "exec"))
"""
_DECLARED = ("is_set", "is_measure", "lower_is_better", "needs")  # by attributes of a function


def user_reward(spec: str) -> Reward:
  """Imports the function that `spec` names (see the head of this file) and makes it a reward.

  Raises:
    UserError: `spec` is incomplete, the import fails, the function is missing, not a function or
      takes other arguments, or a factory returns no reward.
  """
  kind, _, rest = spec.partition(":")
  given: dict[str, str] = {}
  if kind == "factory":
    name, given = grammar.split(spec)
    rest = name.partition(":")[2]
  elif "?" in rest:
    raise UserError(
      f"reward {spec!r}: a function of images takes no options: write a function that returns a"
      f" rlft.types.HostReward or JaxReward, and factory:{rest}"
    )
  target, _, name = rest.rpartition(":")
  if kind not in KINDS or not target or not name:
    raise UserError(
      f"reward {spec!r} is incomplete: write {kind}:module:function or {kind}:file.py:function"
    )
  function = _function(spec, target, name)
  if kind == "factory":
    return dataclasses.replace(_made(function, spec, tuple(given.items())), name=spec)
  prepare = getattr(function, "prepare", None)
  declared = {key: getattr(function, key) for key in _DECLARED if hasattr(function, key)}
  if kind == "host":
    _check_arguments(spec, function, "images", "prompts", "metadata")
    return HostReward(spec, function, **declared)
  if prepare is not None:
    _check_arguments(spec, function, "images", "features")
    _check_arguments(f"{spec}.prepare", prepare, "prompts", "metadata")
    score = lambda _, images, features: function(images, features)  # noqa: E731
    return JaxReward(spec, score, prepare=prepare, **declared)
  _check_arguments(spec, function, "images")
  return JaxReward(spec, lambda _, images, features: function(images), **declared)


@functools.cache  # As `_load_file`.
def _made(function: Callable, spec: str, given: tuple[tuple[str, str], ...]) -> Reward:
  """What a factory returns, if it is a reward."""
  try:
    reward = grammar.call(function, spec, dict(given))
  except UserError:
    raise
  except Exception as error:
    raise errors.not_made(spec, error) from error
  if not isinstance(reward, Reward):
    raise UserError(
      f"reward {spec!r}: its factory returned a {type(reward).__name__}: return"
      " rlft.types.HostReward(name, score) or JaxReward(name, score, params=...)"
    )
  if not callable(reward.score):
    raise UserError(
      f"reward {spec!r}: its factory returned a reward with a score of type"
      f" {type(reward.score).__name__}: give a function"
    )
  if isinstance(reward, HostReward):
    _check_arguments(f"{spec} (its score)", reward.score, "images", "prompts", "metadata")
  else:
    _check_arguments(f"{spec} (its score)", reward.score, "params", "images", "features")
  return reward


def _function(spec: str, target: str, name: str) -> Callable:
  module = _import(spec, target)
  if not hasattr(module, name):
    near = difflib.get_close_matches(name, vars(module), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "define it there"
    raise UserError(f"reward {spec!r}: {target} has no function {name!r}: {hint}")
  function = getattr(module, name)
  if not callable(function):
    raise UserError(
      f"reward {spec!r}: {name!r} in {target} is a {type(function).__name__}, not a function"
    )
  return function


def _import(spec: str, target: str) -> types.ModuleType:
  try:
    if not target.endswith(".py"):
      return importlib.import_module(target)
    path = files.local_path(target).resolve()
    if not path.is_file():
      raise UserError(f"reward {spec!r}: there is no file {path}: correct the path")
    return _load_file(path)
  except UserError:
    raise
  except Exception as error:
    cause = " ".join(f"{type(error).__name__}: {error}".split())
    raise UserError(
      f"reward {spec!r}: importing {target} failed with {cause}; correct that, and put the"
      " directory of every module that it needs on PYTHONPATH"
    ) from error


@functools.cache
def _load_file(path: pathlib.Path) -> types.ModuleType:
  # Cached: a reward may load a large model, and training and evaluation may both name it. The
  # module's own name does not hide another one.
  name = f"rlft_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
  folder = pathlib.Path(_modules().name)
  (folder / f"{name}.py").write_text(_MODULE.format(path=str(path)))
  importlib.invalidate_caches()
  return importlib.import_module(name)


@functools.cache
def _modules() -> tempfile.TemporaryDirectory:
  """A directory of modules that run users' files; it goes when this process ends.

  What a reward pickles for a pool of processes names its module, so that they must find it, too:
  those of multiprocessing get this process's path, all others its environment.
  """
  folder = tempfile.TemporaryDirectory(prefix="rlft_")
  sys.path.append(folder.name)
  path = os.environ.get("PYTHONPATH")
  os.environ["PYTHONPATH"] = f"{path}{os.pathsep}{folder.name}" if path else folder.name
  return folder


def _check_arguments(spec: str, function: Callable, *names: str) -> None:
  try:
    signature = inspect.signature(function)
  except (TypeError, ValueError):  # Written in C: it has no signature to check.
    return
  try:
    signature.bind(*names)
  except TypeError as error:
    raise UserError(
      f"reward {spec!r} takes {signature}, but is called with ({', '.join(names)}): change it"
    ) from error
