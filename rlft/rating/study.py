"""A comparison: its models, its prompts, its pairs, and the directory that holds them."""

from collections.abc import Sequence
import dataclasses
import itertools
import json
import pathlib
from typing import Any

from rlft.inference import contenders
from rlft.inference.contenders import Contender
from rlft.rating.settings import PromptSet, StudySettings
from rlft.storage import files
from rlft.types import UserError

_STUDY = "study.json"


@dataclasses.dataclass(frozen=True)
class Item:
  """A prompt, of which every contender has pictures.

  Attributes:
    set: place of its set.
    text: the prompt.
  """

  set: int
  text: str


@dataclasses.dataclass(frozen=True)
class Pair:
  """Places of an item and of the two contenders whose pictures of it are compared."""

  item: int
  first: int
  second: int


@dataclasses.dataclass(frozen=True)
class Study:
  """What is compared.

  Attributes:
    directory: where all is kept.
    settings: fixed ones.
    contenders: at least two.
    sets: of prompts.
    items: the prompts, set by set.
  """

  directory: pathlib.Path
  settings: StudySettings
  contenders: Sequence[Contender]
  sets: Sequence[PromptSet]
  items: Sequence[Item]

  @property
  def pairs(self) -> list[Pair]:
    """Every two contenders for every prompt."""
    two = list(itertools.combinations(range(len(self.contenders)), 2))
    return [Pair(item, *both) for item in range(len(self.items)) for both in two]

  def picture(self, item: int, contender: int, number: int) -> pathlib.Path:
    """The file of a picture; its name is made of numbers alone."""
    return self.directory / "pictures" / f"{item:06d}-{contender}-{number}.png"

  def pictures(self, item: int, contender: int) -> list[pathlib.Path]:
    """The files of a contender's pictures of an item, those of a set together."""
    count = self.sets[self.items[item].set].images
    return [self.picture(item, contender, number) for number in range(count)]

  def save(self) -> None:
    """Writes everything but the pictures.

    Raises:
      UserError: the directory cannot be written.
    """
    content = {
      "settings": dataclasses.asdict(self.settings),
      "contenders": [dataclasses.asdict(one) for one in self.contenders],
      "sets": [dataclasses.asdict(one) for one in self.sets],
      "items": [dataclasses.asdict(one) for one in self.items],
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    files.write_atomic(self.directory / _STUDY, text)

  @classmethod
  def load(cls, directory: pathlib.Path) -> "Study | None":
    """What `save` wrote; None if there is nothing.

    Raises:
      UserError: it cannot be read.
    """
    path = directory / _STUDY
    if not path.exists():
      return None
    with files.reading(path):
      text = path.read_text()
    try:
      content = json.loads(text)
      return cls(
        directory,
        StudySettings(**content["settings"]),
        tuple(Contender(**one) for one in content["contenders"]),
        tuple(PromptSet(**one) for one in content["sets"]),
        tuple(Item(**one) for one in content["items"]),
      )
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(f"{path} holds no comparison ({error!r}): move the file away") from error


def parse_models(specs: Sequence[str]) -> list[Contender]:
  """The contenders that `--models` names, see `contenders.parse`.

  Raises:
    UserError: fewer than two, an option that is none, or two of one name.
  """
  if len(specs) < 2:
    raise UserError(
      f"{len(specs)} models are given: give --models=... twice or more, each a run, a model or a"
      " folder of pictures"
    )
  return contenders.parse(specs)


def check_same(kept: Study, given: Study) -> None:
  """Refuses to go on with a comparison as another one.

  Raises:
    UserError: it names the first thing that differs.
  """
  for what in ("contenders", "sets", "settings", "items"):
    if (was := getattr(kept, what)) != (now := getattr(given, what)):
      was, now = _difference(was, now)
      raise UserError(
        f"{kept.directory} holds another comparison, with {was} in the place of {now} among its"
        f" {what}: give another --output, or --output alone to go on with it"
      )


def _difference(was: Any, now: Any) -> tuple[str, str]:
  """What differs, of settings or of the first entries that are not the same, in words."""
  if not isinstance(was, StudySettings):
    both = itertools.zip_longest(was, now)
    was, now = next((one, other) for one, other in both if one != other)
  a, b = ({} if one is None else dataclasses.asdict(one) for one in (was, now))

  def told(one: dict[str, Any], other: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in one.items() if v != other.get(k)) or "nothing"

  return told(a, b), told(b, a)
