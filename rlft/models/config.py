"""From a `config.json` of diffusers or transformers to a frozen dataclass or a one-line refusal."""

from collections.abc import Collection, Mapping
import dataclasses
import types
import typing
from typing import Any, TypeVar

from rlft.types import UserError

T = TypeVar("T")

# What to do about a model that is not implemented; the end of a message.
USE_SUPPORTED = "use a Stable Diffusion 1.x, 2.x or SDXL base text-to-image model"
_LARGEST, _MOST_LAYERS = 2**20, 1000  # more than any model has, and soon built in vain


def freeze(value: Any) -> Any:
  """Lists become tuples, so that a config (and the module that holds it) can be hashed."""
  return tuple(freeze(v) for v in value) if isinstance(value, list | tuple) else value


def parse(
  cls: type[T],
  data: Mapping[str, Any],
  *,
  what: str,
  fixed: Mapping[str, Any] | None = None,
  ignored: Collection[str] | None = None,
) -> T:
  """Builds the dataclass `cls` from the parsed JSON `data`.

  Args:
    cls: frozen dataclass; its defaults are those of the PyTorch class.
    data: the parsed `config.json`; keys that begin with an underscore are not configuration.
    what: the file, for messages.
    fixed: options that would change the computation, with the only value that is implemented.
      An option that is `None` or `False` in `fixed` may be either.
    ignored: keys without influence on the computation; `None` ignores every unknown key.

  Raises:
    UserError: an option is unknown, has a value that is not implemented, or one of another type or
      beyond all sizes.
  """
  names = {field.name for field in dataclasses.fields(cls)}
  hints, kept = typing.get_type_hints(cls), {}
  for key, value in data.items():
    if key in names:
      kept[key] = freeze(value)
      require(
        _fits(kept[key], hints[key], _range(key)),
        f"{what}: {key}={str(value)[:100]} is not supported; {USE_SUPPORTED}",
      )
    elif fixed is not None and key in fixed:
      if value != fixed[key] and not (value in (None, False) and fixed[key] in (None, False)):
        raise UserError(
          f"{what}: {key}={value!r} is not supported (only {fixed[key]!r}); {USE_SUPPORTED}"
        )
    elif ignored is not None and not key.startswith("_") and key not in ignored:
      raise UserError(f"{what}: unknown option {key}={value!r}; {USE_SUPPORTED}")
  return cls(**kept)


def _range(key: str) -> range:
  """What an integer with this name may be."""
  if key.endswith("_id") or key == "freq_shift":
    return range(-1, _LARGEST)
  return range(1, _MOST_LAYERS if "layers" in key else _LARGEST)


def _fits(value: Any, hint: Any, allowed: range) -> bool:
  """Whether a frozen value is of a type, and its integers are in the range."""
  inner = typing.get_args(hint)
  if isinstance(hint, types.UnionType):
    return any(_fits(value, one, allowed) for one in inner)
  if typing.get_origin(hint) is tuple:
    if not isinstance(value, tuple):
      return False
    if inner[-1] is Ellipsis:
      inner = inner[:1] * len(value)
    return len(value) == len(inner) and all(map(_fits, value, inner, [allowed] * len(value)))
  if isinstance(value, bool):
    return hint is bool
  if hint is int:
    return isinstance(value, int) and value in allowed
  if hint is float:
    return isinstance(value, int | float) and abs(value) <= _LARGEST  # Which NaN is not.
  return isinstance(value, hint)


def require(condition: bool, message: str) -> None:
  """Raises `UserError(message)` unless the condition holds."""
  if not condition:
    raise UserError(message)
