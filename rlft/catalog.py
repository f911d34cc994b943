"""Which names there are. The only file that knows everybody: to add something, name it here.

'module:function' by the name that a user writes: a module is imported when the first of its things
is made, and no sooner. A function's keyword arguments are the options behind the name.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import difflib
import functools
import importlib
import inspect
import os
from typing import Any

from rlft.algorithms.base import Algorithm
from rlft.config.fields import suggestion
from rlft.config.settings import EMOJI, AlgorithmSettings, EvalConfig, TaskConfig
from rlft.data import pairs as pairs_lib
from rlft.data import prompts as prompts_lib
from rlft.data import sources, splits
from rlft.evaluation.evaluate import EvalSpec, Metric
from rlft.evaluation.suites import Given, Suite
from rlft.rewards import grammar, user
from rlft.rewards.scoring import errors
from rlft.types import Prompt, Reward, UserError

REWARDS: Mapping[str, str] = {
  "aesthetic-v1": "rlft.rewards.aesthetic:aesthetic_v1",
  "aesthetic-v2": "rlft.rewards.aesthetic:aesthetic_v2",
  "clip-diversity": "rlft.rewards.diversity:clip_diversity",
  "clip-score": "rlft.rewards.clip:clip_score",
  "clip-vendi": "rlft.rewards.diversity:clip_vendi",
  "emoji-objects": "rlft.emoji.rewards:objects",
  "emoji-preference": "rlft.emoji.rewards:preference",
  "emoji-tone-parity": "rlft.emoji.rewards:tone_parity",
  "geneval-owl": "rlft.rewards.geneval:geneval_owl",
  "hpsv2": "rlft.rewards.clip:hpsv2",
  "image-reward": "rlft.rewards.image_reward:image_reward",
  "jpeg": "rlft.rewards.jpeg:jpeg",
  "owlv2": "rlft.rewards.owlvit:owlv2",
  "owlvit": "rlft.rewards.owlvit:owlvit",
  "parity": "rlft.rewards.classifiers:parity_of",
  "pickscore": "rlft.rewards.clip:pickscore",
  "skin-found": "rlft.rewards.skin_tone:skin_found",
  "skin-tone-parity": "rlft.rewards.skin_tone:skin_tone_parity",
  "yolov3-tiny": "rlft.rewards.yolo:yolov3_tiny_reward",
}

ALGORITHMS: Mapping[str, str] = {
  "ddpo": "rlft.algorithms.policy_gradient:ddpo",
  "dpok": "rlft.algorithms.policy_gradient:dpok",
  "draft": "rlft.algorithms.reward_gradient:DRaFT",
  "policy-gradient": "rlft.algorithms.policy_gradient:PolicyGradient",
  "raft": "rlft.algorithms.weighted_denoising:Raft",
  "refl": "rlft.algorithms.reward_gradient:ReFL",
  "reward-weighted": "rlft.algorithms.weighted_denoising:RewardWeighted",
}

# Ground truth of the emoji world: metrics that nothing should be trained on.
ORACLES: Mapping[str, str] = {
  "oracle-both": "rlft.emoji.oracles:both",
  "oracle-distance": "rlft.emoji.guards:distance",
  "oracle-diversity": "rlft.emoji.guards:diversity",
  "oracle-likeness": "rlft.emoji.guards:likeness",
  "oracle-parity": "rlft.emoji.oracles:parity",
  "oracle-preference": "rlft.emoji.oracles:preference",
  "oracle-presence": "rlft.emoji.oracles:presence",
  "oracle-skin": "rlft.emoji.guards:skin",
}
# Metrics of all images of an evaluation together: no rewards.
DISTANCES: Mapping[str, str] = {
  "cmmd": "rlft.evaluation.distances:cmmd",
  "kid": "rlft.evaluation.distances:kid",
}
# What is measured together: functions of `suites.Given`.
SUITES: Mapping[str, str] = {
  "composition": "rlft.evaluation.suites:composition",
  "distance": "rlft.evaluation.suites:distance",
  "diversity": "rlft.evaluation.suites:diversity",
  "emoji": "rlft.evaluation.suites:emoji",
  "fairness": "rlft.evaluation.suites:fairness",
  "geneval": "rlft.evaluation.suites:geneval",
  "standard": "rlft.evaluation.suites:standard",
}
# Prompts that are in no file, 'KIND:NAME/SPLIT': functions of NAME and SPLIT.
PROMPTS: Mapping[str, str] = {
  "emoji": "rlft.emoji.prompts:prompts",
  "paper": "rlft.data.compose:load",
  "records": "rlft.data.records:load",
  "tfds": "rlft.data.prompts:load_tfds",
}
# Images with captions that are in no folder: functions of (size, seed, count).
PAIRS: Mapping[str, str] = {EMOJI: "rlft.emoji.world:pairs"}


def _function(address: str) -> Callable[..., Any]:
  module, _, name = address.partition(":")
  return getattr(importlib.import_module(module), name)


# ---------------------------------------------------------------------------- rewards


def make_reward(spec: str) -> Reward:
  """Makes the reward that `spec` names.

  Args:
    spec: a key of `REWARDS` or `ORACLES`, with options where it has any
      ('pickscore?weights=DIRECTORY'); a user's own function ('host:module:function',
      'jax:path/to/file.py:function') or factory ('factory:path/to/file.py:function?key=value'); or
      a model on an inference server ('http://localhost:8080/v2/models/NAME?output=score'), or a
      vision-language model that is asked ('vlm://localhost:8000/NAME?question=...').

  Returns:
    The reward; its `name` is `spec`.

  Raises:
    UserError: an unknown name or option, a function that cannot be imported, or a server that does
      not answer.
  """
  if spec.partition(":")[0] in user.KINDS:
    return user.user_reward(spec)
  name, given = grammar.split(spec)
  if name in DISTANCES:
    raise UserError(
      f"reward {spec!r}: {name} is a distance of all images to a folder of pictures, which"
      " launch/evaluate.py measures: give a reward of images or sets"
    )
  if name.startswith(("http://", "https://")):
    from rlft.rewards.remote import reward as remote

    return grammar.call(remote.remote_reward, spec, given, spec)
  if name.startswith(("vlm://", "vlms://")):
    from rlft.rewards.remote import vlm

    return grammar.call(vlm.vlm_reward, spec, given, spec)
  return dataclasses.replace(grammar.call(_factory(name, spec), spec, given), name=spec)


def _factory(name: str, spec: str) -> Callable[..., Reward]:
  known = {**REWARDS, **ORACLES}
  if name in known:
    return _function(known[name])
  near = difflib.get_close_matches(name, known, n=1)
  hint = f" (did you mean {near[0]!r}?)" if near else ""
  raise UserError(
    f"reward {spec!r}: there is none of this name{hint}: use one of {', '.join(known)}, your own"
    " function as host:module:function, host:file.py:function or jax:file.py:function, your own"
    " factory as factory:file.py:function?key=value, a server as http://host:port/v2/models/NAME,"
    " or a vision-language model as vlm://host:port/NAME"
  )


# ---------------------------------------------------------------------------- algorithms


def make_algorithm(settings: AlgorithmSettings) -> Algorithm:
  """Makes the algorithm that `settings.algorithm` names.

  Its fields that are settings, too, have their values; the others are options behind its name.

  Raises:
    UserError: an unknown name or option, a setting that the algorithm has no use for, or one that
      is given as an option.
  """
  spec = settings.algorithm
  name, given = grammar.split(spec, "algorithm")
  if name not in ALGORITHMS:
    raise UserError(f"--algorithm={name} is not known: {suggestion(name, ALGORITHMS)}")
  factory = _function(ALGORITHMS[name])
  names = inspect.signature(factory).parameters
  shared = {}
  for field in dataclasses.fields(settings):
    value = getattr(settings, field.name)
    if field.name in names:
      shared[field.name] = value
    elif field.name != "algorithm" and value != field.default:
      raise UserError(f"--{field.name}={value} has no effect with --algorithm={name}: leave it out")
    if field.name in given:
      raise UserError(
        f"--algorithm={spec}: {field.name} is a flag of its own: give"
        f" --{field.name}={given[field.name]}"
      )
  return grammar.call(functools.partial(factory, **shared), spec, given, kind="algorithm")


# ---------------------------------------------------------------------------- data


def load_prompts(spec: str) -> Sequence[Prompt]:
  """The prompts of a source, in its order; lines and rows without text are left out.

  Args:
    spec: 'KIND:NAME/SPLIT' with a key of `PROMPTS`, or a file that `rlft.data.prompts` can read; a
      part of one, or a mixture, as `rlft.data.splits` has them.

  Returns:
    At least one prompt.

  Raises:
    UserError: the source does not exist, cannot be read, or has no prompts.
  """
  if terms := _mixed(spec):
    weights, names = zip(*terms, strict=True)
    return sources.Mixture([load_prompts(name) for name in names], weights)
  source, part = _parted(spec)
  kind = source.partition(":")[0]
  whole = _load_named(kind, source) if kind in PROMPTS else _load_file(source)
  return splits.take_part(spec, whole, part) if part else whole


def check_prompts(spec: str) -> None:
  """Checks that there is such a source of prompts, without reading a file.

  Raises:
    UserError: as `load_prompts`.
  """
  if terms := _mixed(spec):
    for _, name in terms:
      check_prompts(name)
    return
  source, part = _parted(spec)
  if part:
    splits.check_part(spec, part)
  kind = source.partition(":")[0]
  if kind in PROMPTS:
    _load_named(kind, source)
  else:
    prompts_lib.check_file(source)


def prompts_from(spec: str, folder: str) -> str:
  """The same source, with a file that is not here taken from `folder`; `spec` is no mixture."""
  source, _ = _parted(spec)
  kind, colon, rest = spec.partition(":")
  if colon and kind in PROMPTS:
    name = source.partition(":")[2].rpartition("/")[0]
    elsewhere = not os.path.isdir(name) and os.path.isdir(os.path.join(folder, name))
    return f"{kind}:{os.path.join(folder, rest)}" if elsewhere else spec
  path, _ = prompts_lib.split_column(source)
  elsewhere = not os.path.exists(path) and os.path.isfile(os.path.join(folder, path))
  return os.path.join(folder, spec) if elsewhere else spec


def _mixed(spec: str) -> list[tuple[float, str]]:
  # A file may have any name.
  return [] if os.path.isfile(os.path.expanduser(spec)) else splits.split_mixture(spec)


def _parted(spec: str) -> tuple[str, str]:
  """A source, and what is asked of it; TFDS cuts its own splits by places."""
  source, part = splits.split_part(spec)
  return (spec, "") if spec.startswith("tfds:") and splits.is_slice(part) else (source, part)


def _load_file(spec: str) -> Sequence[Prompt]:
  """The prompts of a file, read once for all of its parts while it stays as it is."""
  path, _ = prompts_lib.check_file(spec)
  status = os.stat(path)
  return _load_once(os.path.abspath(path), spec, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _load_once(path: str, spec: str, *stamp: int) -> Sequence[Prompt]:
  del path, stamp
  return prompts_lib.load_file(spec)


@functools.cache
def _load_named(kind: str, spec: str) -> Sequence[Prompt]:
  name, slash, split = spec.partition(":")[2].rpartition("/")
  if not (name and slash and split):
    raise UserError(f"prompts {spec}: write {kind}:NAME/SPLIT")
  return _function(PROMPTS[kind])(name, split)


def load_pairs(
  spec: str, *, size: tuple[int, int], seed: int = 0, count: int = 8192
) -> pairs_lib.Pairs:
  """Opens a source of images with captions for the pretraining loss.

  Args:
    spec: a key of `PAIRS`, or a folder that `rlft.data.pairs` can read.
    size: (H, W) of the images in pixels.
    seed: of what is drawn.
    count: of what is drawn.

  Raises:
    UserError: the source does not exist, cannot be read, is empty or has not the size.
  """
  if spec in PAIRS:
    return _function(PAIRS[spec])(size, seed, count)
  return pairs_lib.load_folder(spec, size=size)


def check_pairs(spec: str) -> None:
  """Checks that there is such a source of pairs, without reading it.

  Raises:
    UserError: as `load_pairs`.
  """
  if spec not in PAIRS:
    pairs_lib.check_folder(spec)


# ---------------------------------------------------------------------------- evaluations


def make_suite(spec: str, weights_dir: str) -> Suite:
  """Makes the suite that `spec` names.

  Args:
    spec: a key of `SUITES`, with options ('standard?prompts=FILE').
    weights_dir: where the weights of reward models are.

  Raises:
    UserError: an unknown name or option, or nothing that it could measure.
  """
  name, given = grammar.split(spec, "suite")
  if name not in SUITES:
    raise UserError(f"--suite={name} is not known: {suggestion(name, SUITES)}")
  means = Given(spec, weights_dir, lambda prompts: len(load_prompts(prompts)))
  return grammar.call(_function(SUITES[name]), spec, given, means, kind="suite")


def make_metric(spec: str) -> Metric:
  """Makes the metric that `spec` names: a reward, see `make_reward`, or a key of `DISTANCES`."""
  if spec.partition("?")[0] in DISTANCES:
    name, given = grammar.split(spec, "metric")
    return grammar.call(_function(DISTANCES[name]), spec, given, spec, kind="metric")
  return make_reward(spec)


def make_specs(
  evals: Sequence[EvalConfig],
  *,
  trained_on: Sequence[TaskConfig] = (),
  make: Callable[[str], Metric] = make_metric,
) -> list[EvalSpec]:
  """Opens the prompts and metrics of evaluations.

  Args:
    evals: from the flags.
    trained_on: tasks that the model was trained with.
    make: what makes a metric of its name; one that remembers loads large weights once.

  Raises:
    UserError: an unknown metric, or prompts that cannot be read.
  """
  for entry in evals:
    if _mixed(entry.prompts):
      raise UserError(
        f"--eval=name={entry.name}: prompts={entry.prompts} is a mixture, of which an evaluation"
        " would see the first source: give one for each"
      )
  is_trained_on = grammar.trained_on(trained_on)
  metrics: dict[str, Metric] = {}
  for entry in evals:
    if entry.metric not in metrics:
      metrics[entry.metric] = _metric(entry, make)
    if metrics[entry.metric].is_set and entry.images_per_prompt == 1:
      raise UserError(
        f"--eval=name={entry.name}: metric={entry.metric} measures the images of a prompt as a set:"
        " give images_per_prompt, e.g. 16"
      )
  return [
    EvalSpec(
      name=entry.name,
      metric=metrics[entry.metric],
      prompts=load_prompts(entry.prompts),
      images=entry.images,
      images_per_prompt=entry.images_per_prompt,
      trained_on=is_trained_on(entry.metric),
    )
    for entry in evals
  ]


def _metric(entry: EvalConfig, make: Callable[[str], Metric]) -> Metric:
  """The reward that an evaluation names, if its scores mean the same in every batch."""
  if grammar.is_combination(entry.metric):
    raise UserError(
      f"--eval=name={entry.name}: metric={entry.metric} adds up rewards relative to their batch,"
      " which measures nothing: give an evaluation for each of them"
    )
  with errors.located(f"--eval=name={entry.name}: metric", entry.metric):
    metric = make(entry.metric)
  if not metric.is_measure:
    raise UserError(
      f"--eval=name={entry.name}: metric={entry.metric} is the credit of images within their set,"
      " not a measure of the set: use it with credit=set"
    )
  return metric
