"""Settings of a comparison of pictures by people."""

from collections.abc import Mapping, Sequence
import dataclasses

from rlft.config import tasks
from rlft.config.fields import option

QUALITY, VARIETY = "quality", "variety"


@dataclasses.dataclass(frozen=True)
class PromptSet:
  """Prompts whose pictures are compared; each has a row in the tables."""

  name: str = option("a short name, used in the tables")
  prompts: str = option(
    "a source of prompts, as for an evaluation; if empty, those of the first folder of pictures", ""
  )
  count: int = option("at most this many of the prompts, spread evenly", 100, least=1)
  images: int = option("pictures of a prompt that are judged together", 1, least=1, most=24)
  ask: str = option(
    "what raters are asked: which is better, or which group is more varied",
    QUALITY,
    choices=(QUALITY, VARIETY),
  )
  oracle: str = option("the metric that simulated raters (--simulate) follow", "")


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

  seed: int = option(
    "seed of the pictures' noise, and of the order and sides of pairs", 0, least=0, below=2**31
  )
  raters_per_pair: int = option("number of people who compare each pair", 5, least=1)
  ties: bool = option("whether raters may answer 'no difference'", True)
  checks: float = option(
    "share of the pairs that a rater is shown a second time, to see who answers the same",
    0.1,
    least=0.0,
    most=1.0,
  )
  guidance_scale: float | None = option(
    "guidance scale of models without their own ?guidance_scale=; if not given, a run's own, and"
    " that of the first run for other models",
    None,
    above=0,
  )
  sampling_steps: int | None = option(
    "DDIM steps per image, chosen as for --guidance_scale", None, least=1
  )
  eta: float | None = option(
    "noise of the DDIM steps, chosen as for --guidance_scale", None, least=0, most=1
  )
  image_size: str = option(
    "height x width of the pictures in pixels, e.g. 512; if empty, the model's own", ""
  )
  pretrained: str = option("the base model of the runs, if it has moved since", "", path=True)


@dataclasses.dataclass(frozen=True)
class PageSettings:
  """How the page is served and who rates; each field is a flag of the same name."""

  output: str = option(
    "directory of the comparison: pictures, votes, results", "runs/rating", path=True
  )
  raters: int = option("number of links to hand out, one for each person", 5, least=1, most=10_000)
  simulate: int = option(
    "simulate this many raters with the sets' oracles, instead of serving a page",
    0,
    least=0,
    most=10_000,
  )
  noise: float = option(
    "with --simulate: the difference at which nearly three of four raters agree, in standard"
    " deviations of the differences",
    0.5,
    above=0,
  )
  min_consistency: float = option(
    "leave out raters who gave the same answer to less than this share of their repeated pairs",
    0.0,
    least=0,
    most=1,
  )
  results: bool = option("print and write the results so far, without serving the page", False)
  host: str = option(
    "address to listen at: 127.0.0.1 for this machine alone, 0.0.0.0 for others as well",
    "127.0.0.1",
  )
  port: int = option("port to listen at; 0 takes a free one", 8000, least=0, most=65535)
  address: str = option(
    "http://... of the page in the links, as raters reach it; if empty, from --host and --port", ""
  )
  batch_size: int = option("images drawn at once", 16, least=1)
