"""Compares pictures by people: makes the pictures, asks, counts."""

from collections.abc import Sequence
import importlib.util
import pathlib
import signal
import urllib.parse

from rlft.config import fields
from rlft.config.settings import EMOJI_SD
from rlft.inference.contenders import Contender, config_of
from rlft.rating import pictures, results, simulate
from rlft.rating import study as study_lib
from rlft.rating.links import Links
from rlft.rating.settings import PRESETS, QUALITY, PageSettings, PromptSet, StudySettings
from rlft.rating.study import Item, Study
from rlft.rating.votes import Plan, Votes
from rlft.storage import files
from rlft.types import UserError

_VOTES, _SIMULATED = "votes.sqlite", "simulated.sqlite"
_NEEDED = ("starlette", "uvicorn", "krippendorff")


def rate(
  models: Sequence[str],
  sets: Sequence[PromptSet],
  settings: StudySettings,
  page: PageSettings,
) -> str:
  """Draws what is missing, then serves the page until it is stopped, or simulates raters.

  Args:
    models: as `study.parse_models` reads them; none to go on with what is in the directory.
    sets: of prompts; none for what `default_sets` says.
    settings: fixed ones.
    page: how it is served and who rates.

  Returns:
    The results, and where they are.

  Raises:
    UserError: something cannot be read, drawn, served or written.
  """
  _check_page(page)
  for name in _NEEDED:
    if importlib.util.find_spec(name) is None:
      raise UserError(f"comparing pictures needs {name}: pip install 'rlft[rating]'")
  files.check_local(page.output)
  directory = files.local_path(page.output)
  study = open_study(directory, models, sets, settings)
  if page.simulate:
    simulate.oracles(study)  # Their mistakes are found before anything is drawn.
  how = pictures.collect(study, batch_size=page.batch_size)
  plan = Plan(
    pairs=len(study.pairs),
    raters=page.simulate or page.raters,
    raters_per_pair=study.settings.raters_per_pair,
    checks=study.settings.checks,
    seed=study.settings.seed,
  )
  # Votes of people are never among those of oracles, which begin anew: with another --noise, say.
  if page.simulate:
    with files.writing(directory):
      for path in directory.glob(f"{_SIMULATED}*"):
        path.unlink()
  votes = Votes(directory / (_SIMULATED if page.simulate else _VOTES), plan)
  try:
    if page.simulate:
      simulate.rate(study, votes, count=page.simulate, noise=page.noise, seed=study.settings.seed)
    elif not page.results:
      _serve(study, votes, plan, page, how)
    answered = votes.answered()
    found = results.find(study, answered, min_consistency=page.min_consistency)
    name = "simulated" if page.simulate else "results"
    text = results.write(study, answered, found, name=name)
    return f"{text}\nwrote {directory / name}.md, .json, .csv and -votes.csv"
  finally:
    votes.close()


def open_study(
  directory: pathlib.Path,
  models: Sequence[str],
  sets: Sequence[PromptSet],
  settings: StudySettings,
) -> Study:
  """A new comparison, or the one in the directory if it is the same.

  Raises:
    UserError: there is another one in the directory, or something given cannot be used.
  """
  kept = Study.load(directory)
  if kept is not None and models and not _is_begun(directory):
    kept = None  # Nothing was made of it, for a mistake, say, that is mended now.
  if kept is not None and not models:
    if sets or settings not in (StudySettings(), kept.settings):
      raise UserError(
        f"{directory} holds a comparison, whose prompts and settings are fixed: give --output alone"
        " to go on with it, or another --output and --models for a new one"
      )
    return kept
  contenders = study_lib.parse_models(models)
  sets = tuple(sets) or default_sets(contenders)
  _check(sets, settings)
  items = [
    Item(place, prompt.text)
    for place, entry in enumerate(sets)
    for prompt in pictures.prompts_of(entry, contenders)
  ]
  given = Study(directory, settings, tuple(contenders), sets, tuple(items))
  if kept is not None:
    study_lib.check_same(kept, given)
    return kept
  pictures.check(given)
  with files.writing(directory):
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
  given.save()
  return given


def _is_begun(directory: pathlib.Path) -> bool:
  """Whether there is a picture or a vote."""
  return (directory / _VOTES).exists() or any((directory / "pictures").glob("*.png"))


def default_sets(contenders: Sequence[Contender]) -> tuple[PromptSet, ...]:
  """Prompts where none are given: those of a folder of pictures, or of the emoji world.

  Raises:
    UserError: there is neither a folder nor a model of the emoji world.
  """
  if any(pictures.is_folder(one.source) for one in contenders):
    return (PromptSet("pictures"),)
  bases = [one.source for one in contenders]
  bases += [config.pretrained for one in contenders if (config := config_of(one.source))]
  if EMOJI_SD in bases:
    return tuple(PRESETS["emoji"])
  raise UserError(
    "there are no prompts: give --set=name=NAME,prompts=FILE, or --set=emoji for the emoji world"
  )


def _check_page(page: PageSettings) -> None:
  fields.check(page)
  if not page.output:
    raise UserError("--output is empty: give the directory of the comparison")
  if page.simulate and page.results:
    raise UserError("--results has no effect with --simulate, which prints them: leave it out")
  if page.address and not _is_server(page.address):
    raise UserError(
      f"--address={page.address} is no address of a server: give one as http://host:port"
    )


def _is_server(address: str) -> bool:
  try:
    parts = urllib.parse.urlsplit(address)
    parts.port  # noqa: B018  Raises where it is none.
  except ValueError:
    return False
  return parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.path.strip("/")


def _check(sets: Sequence[PromptSet], settings: StudySettings) -> None:
  fields.check(settings)
  names = [entry.name for entry in sets]
  for entry in sets:
    fields.check(entry, f"--set=name={entry.name},...,")
    if names.count(entry.name) > 1 or entry.name == results.ALL:
      raise UserError(f"--set=name={entry.name}: the name is taken: give another")
    if entry.ask != QUALITY and entry.images == 1:
      raise UserError(f"--set=name={entry.name}: ask={entry.ask} is about groups: add images=6")


def _serve(study: Study, votes: Votes, plan: Plan, page: PageSettings, how: Sequence[str]) -> None:
  from rlft.rating import serve

  def say(line: str) -> None:
    print(line, flush=True)

  for line in how:
    say(line)
  # The server stops for both, and what is after it is still to be done.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  serve.serve(study, votes, Links(study.directory), plan, page, say)
