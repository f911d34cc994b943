"""Settings of a comparison of pictures by people."""

from collections.abc import Mapping, Sequence
import dataclasses

from rlft.config import tasks
from rlft.config.fields import option

QUALITY, VARIETY = "quality", "variety"


@dataclasses.dataclass(frozen=True)
class PromptSet:
  """Prompts whose pictures are compared; each has a row in the tables."""

  name: str = option("used in tables")
  prompts: str = option(
    "as those of an evaluation; if empty, those of the first folder of pictures", ""
  )
  count: int = option("at most so many of the prompts, spread evenly", 100, least=1)
  images: int = option("pictures of a prompt that are judged together", 1, least=1, most=24)
  ask: str = option("what is asked; variety for sets", QUALITY, choices=(QUALITY, VARIETY))
  oracle: str = option("the metric that --simulate rates by", "")


# The paper's three tasks on test prompts of the emoji world; groups for the one on diversity.
PRESETS: Mapping[str, Sequence[PromptSet]] = {
  "emoji": (
    PromptSet("preference", "emoji:preference/test", oracle="oracle-preference"),
    PromptSet("composition", "emoji:pair/test", oracle="oracle-presence"),
    PromptSet(
      "skintone",
      "emoji:portrait/test",
      count=50,
      images=6,
      ask=VARIETY,
      oracle="oracle-parity",
    ),
  ),
}


def parse_set(text: str) -> tuple[PromptSet, ...]:
  """The sets that one `--set=text` stands for; see `tasks.parse_task`."""
  return tasks.parse("set", text, PromptSet, PRESETS)


@dataclasses.dataclass(frozen=True)
class StudySettings:
  """What is compared and how; each field is a flag of the same name. Fixed once it has begun."""

  seed: int = option("of the pictures' noise, and of orders and sides", 0, least=0, below=2**31)
  raters_per_pair: int = option("people who compare each pair", 5, least=1)
  ties: bool = option("whether 'no difference' may be answered", True)
  checks: float = option(
    "share of the pairs that each rater is shown a second time, to see who answers the same",
    0.1,
    least=0.0,
    most=1.0,
  )
  guidance_scale: float | None = option(
    "of models for which nothing else is said; if not given, a run's own, and for other models"
    " that of the first run",
    None,
    above=0,
  )
  sampling_steps: int | None = option("as --guidance_scale", None, least=1)
  eta: float | None = option("as --guidance_scale", None, least=0, most=1)
  image_size: str = option("height and width of drawn pictures in pixels", "")
  pretrained: str = option(
    "where the base model of the runs is now, if it has moved", "", path=True
  )


@dataclasses.dataclass(frozen=True)
class PageSettings:
  """How the page is served and who rates; each field is a flag of the same name."""

  output: str = option(
    "directory of the comparison: pictures, votes, results", "runs/rating", path=True
  )
  raters: int = option("links to hand out, one for each person", 5, least=1, most=10_000)
  simulate: int = option("raters whom oracles simulate, instead of a page", 0, least=0, most=10_000)
  noise: float = option(
    "of simulated raters: the difference at which three of four agree, in standard deviations of"
    " the differences",
    0.5,
    above=0,
  )
  min_consistency: float = option(
    "raters who answer less than this share of repeated pairs the same are left out of the results",
    0.0,
    least=0,
    most=1,
  )
  results: bool = option("print and write the results so far, and end", False)
  host: str = option("address to listen at; others than this machine reach 0.0.0.0", "127.0.0.1")
  port: int = option("to listen at; 0 takes a free one", 8000, least=0, most=65535)
  address: str = option(
    "http://... at which raters reach the page, for the links; if empty, by --host and --port", ""
  )
  batch_size: int = option("images drawn at once", 16, least=1)
