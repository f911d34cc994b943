"""Rewards by name. `make_reward` turns what the user wrote in a flag into a `Reward`.

To add one, write a file with a factory, a function that returns a `Reward`, and name it in
`FACTORIES`. Its keyword arguments are what a user may write behind the name; the grammar is in
rlft/rewards/grammar.py.
"""

from collections.abc import Callable, Mapping
import dataclasses
import difflib
import importlib

from rlft.rewards import grammar as options
from rlft.rewards import user
from rlft.types import Reward, UserError

# 'module:function' by name: a module is imported when one of its rewards is made, and no sooner.
FACTORIES: Mapping[str, str] = {
  "aesthetic-v1": "rlft.rewards.aesthetic:aesthetic_v1",
  "aesthetic-v2": "rlft.rewards.aesthetic:aesthetic_v2",
  "clip-diversity": "rlft.rewards.diversity:clip_diversity",
  "clip-score": "rlft.rewards.clip:clip_score",
  "clip-vendi": "rlft.rewards.diversity:clip_vendi",
  "emoji-objects": "rlft.emoji.rewards:objects",
  "emoji-preference": "rlft.emoji.rewards:preference",
  "emoji-tone-parity": "rlft.emoji.rewards:tone_parity",
  "hpsv2": "rlft.rewards.clip:hpsv2",
  "image-reward": "rlft.rewards.image_reward:image_reward",
  "jpeg": "rlft.rewards.jpeg:jpeg",
  "owlv2": "rlft.rewards.owlvit:owlv2",
  "owlvit": "rlft.rewards.owlvit:owlvit",
  "parity": "rlft.rewards.classifiers:parity_of",
  "pickscore": "rlft.rewards.clip:pickscore",
  "skin-tone-parity": "rlft.rewards.skin_tone:skin_tone_parity",
  "yolov3-tiny": "rlft.rewards.yolo:yolov3_tiny_reward",
}


def make_reward(spec: str) -> Reward:
  """Makes the reward that `spec` names.

  Args:
    spec: a key of `FACTORIES` or an oracle, with options where it has any
      ('pickscore?weights=DIRECTORY'); a user's own function ('host:module:function',
      'jax:path/to/file.py:function') or factory ('factory:path/to/file.py:function?key=value'); or
      a model on an inference server ('http://localhost:8080/v2/models/NAME?output=score').

  Returns:
    The reward; its `name` is `spec`.

  Raises:
    UserError: an unknown name or option, a function that cannot be imported, or a server that does
      not answer.
  """
  if spec.partition(":")[0] in user.KINDS:
    return user.user_reward(spec)
  name, given = options.split(spec)
  if name.startswith(("http://", "https://")):
    from rlft.rewards.remote import reward as remote

    return options.call(remote.remote_reward, spec, given, spec)
  return dataclasses.replace(options.call(_factory(name), spec, given), name=spec)


def _factory(name: str) -> Callable[..., Reward]:
  if name in FACTORIES:
    module, _, function = FACTORIES[name].partition(":")
    return getattr(importlib.import_module(module), function)
  # Imported only here: the oracles themselves use this package (statistical parity).
  from rlft.emoji.oracles import ORACLES

  if name in ORACLES:
    return ORACLES[name]
  known = [*FACTORIES, *ORACLES]
  near = difflib.get_close_matches(name, known, n=1)
  hint = f" (did you mean {near[0]!r}?)" if near else ""
  raise UserError(
    f"unknown reward {name!r}{hint}: use one of {', '.join(known)}, your own function as"
    " host:module:function, host:file.py:function or jax:file.py:function, your own factory as"
    " factory:file.py:function?key=value, or a server as http://host:port/v2/models/NAME"
  )
