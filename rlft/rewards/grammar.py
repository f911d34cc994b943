"""The options of a reward, as a user writes them: `name?key=value&key=value`.

Everything before the first '?' names the reward. What follows are keyword arguments of its factory,
whose annotations say how to read them: str, int, float, bool (true or false), pathlib.Path, a
`Literal` of strings, or one of these `| None`; an argument without annotation is text. In values,
%XX stands for a byte of UTF-8: %26 for '&', %25 for '%', and %2C for the comma, at which `--task`
and `--eval` are cut. All else stands for itself, also '?', '=', '+' and ':'.

In a shell, quote the flag: '&' and '?' have meanings there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import inspect
import itertools
import math
import pathlib
import re
from typing import Any
import urllib.parse

from rlft.config import fields
from rlft.config.settings import TaskConfig
from rlft.types import UserError

_PLUS = re.compile(r"\s\+\s")
_WEIGHT = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*\*\s*")
# Options that change who gets a score, how it is computed or asked for, and not what it measures.
_HOW = frozenset(
  ("credit", "shares", "dtype")
  + ("batch_size", "in_flight", "timeout_s", "deadline_s", "retries", "start_s", "token_env")
)
_VETO = re.compile(r"(.+?)\s*(>=|<=)\s*(\S+)")


def split(spec: str, kind: str = "reward") -> tuple[str, dict[str, str]]:
  """Takes 'name?key=value&...' apart.

  Args:
    spec: what the user wrote.
    kind: what it names, for messages.

  Returns:
    The name, and the options as text, decoded, in the order given.

  Raises:
    UserError: an option without '=', twice, or with a '%' that starts no byte.
  """
  name, _, query = spec.partition("?")
  options: dict[str, str] = {}
  for item in query.split("&") if query else ():
    key, equals, value = item.partition("=")
    if not equals or not key:
      raise UserError(f"{kind} {spec!r}: '{item}' is not key=value (write & in a value as %26)")
    if key in options:
      raise UserError(f"{kind} {spec!r}: {key} is given twice, remove one")
    if re.search("%(?![0-9A-Fa-f]{2})", value):
      raise UserError(f"{kind} {spec!r}: write % as %25 in {key}={value}")
    options[key] = urllib.parse.unquote(value)
  return name, options


def call(
  factory: Callable[..., Any],
  spec: str,
  options: Mapping[str, str],
  *positional: Any,
  kind: str = "reward",
) -> Any:
  """Calls a factory with a user's options.

  Args:
    factory: its signature says which options there are.
    spec: what the user wrote, for messages.
    options: from `split`.
    *positional: arguments that are no options.
    kind: what the factory makes, for messages.

  Returns:
    What the factory returns.

  Raises:
    UserError: an unknown option, one that is missing, or a value of the wrong type.
  """
  return factory(*positional, **_convert(factory, spec, options, len(positional), kind))


def _convert(
  factory: Callable, spec: str, options: Mapping[str, str], positional: int, kind: str
) -> dict[str, Any]:
  """The options as keyword arguments of the factory."""
  parameters, others = _parameters(factory, positional)
  values = {}
  for key, text in options.items():
    if key in parameters:
      values[key] = _read(spec, key, text, parameters[key].annotation, kind)
    elif others:
      values[key] = text
    else:
      remedy = fields.suggestion(key, parameters) if parameters else "it takes none"
      raise UserError(f"{kind} {spec!r}: unknown option '{key}', {remedy}")
  missing = [
    name
    for name, parameter in parameters.items()
    if parameter.default is parameter.empty and name not in values
  ]
  if missing:
    join = "&" if options else "?"
    raise UserError(f"{kind} {spec!r}: add {join}{'&'.join(f'{name}=...' for name in missing)}")
  return values


def _parameters(factory: Callable, positional: int) -> tuple[dict[str, inspect.Parameter], bool]:
  """The options of a factory, and whether it takes others (`**kwargs`)."""
  try:
    try:
      signature = inspect.signature(factory, eval_str=True)
    except NameError:  # An annotation that exists only for type checkers.
      signature = inspect.signature(factory)
  except (TypeError, ValueError):  # Written in C.
    return {}, True
  parameters = list(signature.parameters.values())[positional:]
  named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
  others = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
  return {parameter.name: parameter for parameter in parameters if parameter.kind in named}, others


def _read(spec: str, key: str, text: str, annotation: Any, kind: str) -> Any:
  """Reads one value as its annotation says."""
  try:
    value = fields.convert(text, annotation)
  except ValueError as error:
    raise UserError(f"{kind} {spec!r}: {key}={text} {error}") from None
  except TypeError:
    raise UserError(
      f"{kind} {spec!r}: {key} cannot be given as text, as its factory takes {annotation}: annotate"
      " it with str, int, float or bool there"
    ) from None
  if not text and isinstance(value, str | pathlib.Path):
    raise UserError(f"{kind} {spec!r}: {key}={text} has no value, write {key}=...")
  return value


# Sums and vetoes.


def is_combination(spec: str) -> bool:
  """Whether `spec` is a sum, and not the name of one reward."""
  return len(_PLUS.split(spec)) > 1 or _WEIGHT.match(spec) is not None


def terms(spec: str) -> list[tuple[float, str]]:
  """The weights and names in a sum; a weight is 1 where none is given.

  Raises:
    UserError: an empty term, or one without effect.
  """
  found = []
  for part in _PLUS.split(spec):
    weight = _WEIGHT.match(part)
    name = part[weight.end() if weight else 0 :].strip()
    if not name:
      raise UserError(f"reward={spec}: a term has no name: write NUMBER*NAME + NUMBER*NAME")
    value = float(weight[1]) if weight else 1.0
    if value == 0 or not math.isfinite(value):
      raise UserError(
        f"reward={spec}: the weight of {name} is {value:g}: give another, or watch={name} to"
        " measure it without training on it"
      )
    found.append((value, name))
  return found


def parse_veto(text: str) -> tuple[str, bool, float]:
  """The name, whether it must be at least the bound (else at most), and the bound.

  Raises:
    UserError: it is not of the form NAME>=NUMBER or NAME<=NUMBER.
  """
  match = _VETO.fullmatch(text.strip())
  try:
    bound = float(match[3]) if match else math.nan
  except ValueError:
    bound = math.nan
  if not math.isfinite(bound):
    raise UserError(
      f"veto={text}: write NAME>=NUMBER, or NAME<=NUMBER where less is better, for what must hold"
    )
  return match[1], match[2] == ">=", bound


def labelled(text: str) -> list[tuple[str, float, str]]:
  """The terms of a reward with names for metrics: `[(label, weight, name), ...]`."""
  found: list[tuple[str, float, str]] = []
  for weight, name in terms(text):
    found.append((_label(name, [label for label, _, _ in found]), weight, name))
  return found


def _label(spec: str, taken: Sequence[str]) -> str:
  """A name for metrics: of a function or model its last part; numbered if it is taken."""
  name = re.split(r"[:/]", spec.partition("?")[0].rstrip("/"))[-1]
  name = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
  numbered = (f"{name}-{number}" for number in itertools.count(2))
  return next(label for label in itertools.chain([name], numbered) if label not in taken)


def trained_on(tasks: Iterable[TaskConfig]) -> Callable[[str], bool]:
  """A function that says whether any task is trained on the reward with this name.

  It does not matter how it is computed, nor how credit is given within a set.
  """
  names = [name for task in tasks for _, name in terms(task.reward)]
  names += [parse_veto(task.veto)[0] for task in tasks if task.veto]
  known = {_measured(name) for name in names}
  return lambda name: _measured(name) in known


def same(spec: str, other: str) -> bool:
  """Whether two names are of one reward, computed and given to images in whatever way."""
  return _measured(spec) == _measured(other)


def _measured(spec: str) -> tuple[str, frozenset]:
  name, given = split(spec)
  return name, frozenset((key, value) for key, value in given.items() if key not in _HOW)
