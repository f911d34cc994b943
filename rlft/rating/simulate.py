"""Raters whom oracles simulate, so that the whole way can be shown without people."""

from collections.abc import Sequence
import itertools
import sys

import numpy as np
import tqdm

from rlft import catalog
from rlft.config.settings import ScoringSettings
from rlft.evaluation import raters, statistics
from rlft.inference import measure
from rlft.rating import pictures
from rlft.rating.study import Study
from rlft.rating.votes import SIDES, TIE, Question, Votes
from rlft.rewards.scoring import errors
from rlft.types import Reward, UserError


def oracles(study: Study) -> list[Reward]:
  """The metric by which the raters of each set are simulated.

  Raises:
    UserError: a set has none, or one that cannot score it.
  """
  found = []
  for entry in study.sets:
    if not entry.oracle:
      raise UserError(
        f"--set=name={entry.name} has no oracle to simulate raters by: add oracle=NAME"
      )
    with errors.located(f"--set=name={entry.name}: oracle", entry.oracle):
      metric = catalog.make_reward(entry.oracle)
    if metric.is_set and entry.images == 1:
      raise UserError(f"oracle {entry.oracle} of --set=name={entry.name} is of sets: add images=6")
    found.append(metric)
  return found


def scores(study: Study) -> np.ndarray:
  """What the oracles say of the pictures of each item, more being better.

  Returns:
    `[items, contenders]`; NaN where an oracle says nothing.

  Raises:
    UserError: a set has no oracle, or one that cannot score it.
  """
  found = np.full((len(study.items), len(study.contenders)), np.nan)
  with measure.scorer(ScoringSettings()) as score:
    for place, (entry, metric) in enumerate(zip(study.sets, oracles(study), strict=True)):
      rows = [row for row, item in enumerate(study.items) if item.set == place]
      prompts = pictures.prompts_of(entry, study.contenders)
      if [prompt.text for prompt in prompts] != [study.items[row].text for row in rows]:
        raise UserError(
          f"--set=name={entry.name}: its prompts are not those of which there are pictures: put"
          " them back as they were, or give another --output"
        )
      drawn_for = [prompt for prompt in prompts for _ in range(entry.images)]
      for column in range(len(study.contenders)):
        paths = [path for row in rows for path in study.pictures(row, column)]
        (measured,) = score([metric], [pictures.read(paths)], drawn_for, entry.images)
        each = measured.scores if metric.is_set else measured.scores.reshape(-1, entry.images)
        each = each if metric.is_set else each.mean(axis=1)
        found[rows, column] = -each if metric.lower_is_better else each
      if not np.isfinite(found[rows]).any():
        raise UserError(
          f"--set=name={entry.name}: oracle={entry.oracle} could score none of the pictures: give"
          " one that can"
        )
  return found


def rate(study: Study, votes: Votes, *, count: int, noise: float, seed: int = 0) -> None:
  """Lets simulated raters answer whatever the study asks them.

  Args:
    study: with all its pictures.
    votes: of the study.
    count: of raters.
    noise: see `raters.chance`; in standard deviations of the differences within a set.
    seed: of their luck.

  Raises:
    UserError: as `scores`.
  """
  _say("asking the oracles of all pictures")
  liked = scores(study)
  pairs = study.pairs
  items = np.array([pair.item for pair in pairs])
  first = liked[items, [pair.first for pair in pairs]]
  second = liked[items, [pair.second for pair in pairs]]
  sets = np.array([study.items[item].set for item in items])
  # Divided by what a set's differences are, so that one noise serves all oracles.
  units = np.array([statistics.spread((second - first)[sets == k]) for k in range(len(study.sets))])
  unit = np.where(units > 0, units, 1.0)[sets]
  second = np.where(second == first, np.nan, second)  # No difference: nothing to be said.
  chances = raters.chance(second / unit, first / unit, noise=noise)
  # First everybody's share, then what that leaves.
  _say(f"{count} simulated raters compare {len(pairs)} pairs")
  turns = [*itertools.product((False, True), range(1, count + 1))]
  for more, number in tqdm.tqdm(turns, desc="raters", disable=None, leave=False):
    # Luck of its own when a pair comes again.
    opinions = [_opinions(chances, [seed, number, again]) for again in range(2)]
    coin = np.random.default_rng([seed, number])
    while question := votes.next(number, more=more):
      answer = _answer(question, opinions[question.again], study.settings.ties, coin)
      votes.answer(number, question.id, answer)


def _opinions(chances: np.ndarray, seed: Sequence[int]) -> np.ndarray:
  """1 where a rater prefers the second picture of a pair, else 0; NaN where nothing is said."""
  luck = np.random.default_rng(seed).random(chances.shape)
  return np.where(np.isnan(chances), np.nan, luck < chances)


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def _answer(question: Question, opinion: np.ndarray, ties: bool, coin: np.random.Generator) -> str:
  """A tie, if allowed, where the oracle says nothing or the same of both; else a coin decides."""
  second = opinion[question.pair]
  if np.isnan(second):
    return TIE if ties else SIDES[coin.integers(2)]
  return SIDES[int(bool(second) != question.flipped)]
