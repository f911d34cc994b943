"""Rewards by name. `make_reward` turns what the user wrote in a flag into a `Reward`.

To add one, write a file with a zero-argument factory and name it in `FACTORIES`.
"""

from collections.abc import Callable
import difflib

from rlft.rewards import emoji, jpeg, user
from rlft.types import Reward, UserError

FACTORIES: dict[str, Callable[[], Reward]] = {
  "emoji-tone-parity": emoji.tone_parity,
  "emoji-objects": emoji.objects,
  "emoji-preference": emoji.preference,
  "jpeg": jpeg.jpeg,
}


def make_reward(spec: str) -> Reward:
  """Makes the reward that `spec` names: a key of `FACTORIES`, an oracle, or a user's function.

  Args:
    spec: e.g. 'jpeg', 'oracle-parity', 'host:module:function', 'jax:path/to/file.py:function'.

  Returns:
    The reward; its `name` is `spec`.

  Raises:
    UserError: an unknown name, or a function that cannot be imported.
  """
  if spec.partition(":")[0] in user.KINDS:
    return user.user_reward(spec)
  if spec in FACTORIES:
    return FACTORIES[spec]()
  # Imported only here: the oracles themselves use this package (statistical parity).
  from rlft.emoji.oracles import ORACLES

  if spec in ORACLES:
    return ORACLES[spec]()
  known = [*FACTORIES, *ORACLES]
  near = difflib.get_close_matches(spec, known, n=1)
  hint = f" (did you mean {near[0]!r}?)" if near else ""
  raise UserError(
    f"unknown reward {spec!r}{hint}: use one of {', '.join(known)}, or your own function as"
    " host:module:function, host:file.py:function or jax:file.py:function"
  )
