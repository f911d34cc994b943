"""From a `config.json` of diffusers or transformers to a frozen dataclass or a one-line refusal."""

from collections.abc import Collection, Mapping
import dataclasses
from typing import Any, TypeVar

from rlft.types import UserError

T = TypeVar("T")

# What to do about a model that is not implemented; the end of a message.
USE_SUPPORTED = "use a Stable Diffusion 1.x, 2.x or SDXL base text-to-image model"


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
    UserError: an option is unknown or has a value that is not implemented.
  """
  names = {field.name for field in dataclasses.fields(cls)}
  kept = {}
  for key, value in data.items():
    if key in names:
      kept[key] = freeze(value)
    elif fixed is not None and key in fixed:
      if value != fixed[key] and not (value in (None, False) and fixed[key] in (None, False)):
        raise UserError(
          f"{what}: {key}={value!r} is not supported (only {fixed[key]!r}); {USE_SUPPORTED}"
        )
    elif ignored is not None and not key.startswith("_") and key not in ignored:
      raise UserError(f"{what}: unknown option {key}={value!r}; {USE_SUPPORTED}")
  return cls(**kept)


def require(condition: bool, message: str) -> None:
  """Raises `UserError(message)` unless the condition holds."""
  if not condition:
    raise UserError(message)
