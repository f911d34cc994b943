"""What the votes say: preference rates with intervals, agreement, and who rated carefully."""

from collections.abc import Sequence
import dataclasses
import json
from typing import Any

import numpy as np
import scipy

from rlft.evaluation import statistics
from rlft.evaluation.tables import Table
from rlft.rating.study import Study
from rlft.rating.votes import Question
from rlft.storage import files
from rlft.types import UserError

ALL = "all"  # the row of all sets together


@dataclasses.dataclass(frozen=True)
class Rater:
  """What is known of a rater.

  Attributes:
    number: from 1.
    votes: pairs that were compared, repetitions not counted.
    repeats: pairs that were compared twice.
    consistent: share of those that were answered the same; NaN without any.
    left: share of answers 'left' among those that are no ties; about 0.5 of a careful rater.
    seconds: median of the time an answer took.
  """

  number: int
  votes: int
  repeats: int
  consistent: float
  left: float
  seconds: float


@dataclasses.dataclass(frozen=True)
class Rate:
  """How often one contender's pictures were preferred to another's.

  Attributes:
    liked: a contender's name.
    other: whom it is compared with.
    set: name of the prompt set, or 'all'.
    rate: share of votes for `liked`, a tie being half a vote; NaN without votes.
    low, high: its interval, which holds for other prompts and raters.
    wins, ties, losses: votes of `liked`.
    prompts, raters: how many there are of each.
    alpha: Krippendorff's, 1 where raters always agree and 0 where they do as if by chance; NaN
      where nothing was compared by two, or all votes are the same.
    agreement: share of two raters' votes on one pair that are the same; NaN without any.
  """

  liked: str
  other: str
  set: str
  rate: float
  low: float
  high: float
  wins: int
  ties: int
  losses: int
  prompts: int
  raters: int
  alpha: float
  agreement: float


@dataclasses.dataclass(frozen=True)
class Results:
  """What a comparison has found so far.

  Attributes:
    rates: of each two contenders, set by set, then of all sets.
    raters: all of them.
    left_out: numbers of those who are not in the rates.
  """

  rates: Sequence[Rate]
  raters: Sequence[Rater]
  left_out: Sequence[int]


def find(study: Study, votes: Sequence[Question], *, min_consistency: float = 0.0) -> Results:
  """Counts the votes.

  Args:
    study: what was compared.
    votes: answered questions.
    min_consistency: raters below are left out of the rates.
  """
  numbers = sorted({vote.rater for vote in votes})
  raters = [rater([vote for vote in votes if vote.rater == number]) for number in numbers]
  # NaN, of a rater who was shown nothing twice, is not below anything.
  left_out = [one.number for one in raters if one.consistent < min_consistency]
  counted = [vote for vote in votes if vote.rater not in left_out and not vote.again]
  pairs = study.pairs
  set_of = [study.items[pair.item].set for pair in pairs]
  names = [entry.name for entry in study.sets]
  rates = []
  for first, second in sorted({(pair.first, pair.second) for pair in pairs}):
    mine = [v for v in counted if (pairs[v.pair].first, pairs[v.pair].second) == (first, second)]
    groups = {name: [v for v in mine if set_of[v.pair] == k] for k, name in enumerate(names)}
    if len(names) > 1:
      groups[ALL] = mine
    liked, other = study.contenders[second].name, study.contenders[first].name
    for name, group in groups.items():
      values = np.array([vote.value for vote in group])
      places = np.array([pairs[vote.pair].item for vote in group], int)
      who = np.array([vote.rater for vote in group], int)
      rates.append(
        Rate(
          liked,
          other,
          name,
          statistics.mean(values),
          *interval(values, places, who),
          *(int(np.sum(values == value)) for value in (1, 0.5, 0)),
          len(set(places)),
          len(set(who)),
          *agreement(values, places, who),
        )
      )
  return Results(rates, raters, left_out)


def rater(votes: Sequence[Question]) -> Rater:
  """What a rater's own votes say of the rater."""
  first = {vote.pair: vote.value for vote in votes if not vote.again}
  same = [vote.value == first[vote.pair] for vote in votes if vote.again and vote.pair in first]
  sides = [vote.answer == "left" for vote in votes if vote.answer != "tie"]
  seconds = [vote.seconds for vote in votes if vote.seconds is not None]
  return Rater(
    votes[0].rater,
    len(first),
    len(same),
    statistics.mean(np.array(same)),
    statistics.mean(np.array(sides)),
    float(np.median(seconds)) if seconds else float("nan"),
  )


def interval(
  values: np.ndarray, prompts: np.ndarray, raters: np.ndarray, *, level: float = statistics.LEVEL
) -> tuple[float, float]:
  """The interval of a share of votes that share prompts and raters.

  The variance of the mean is that of clusters, added up for both ways of clustering,

      V = sum over ways of C / (C - 1) * sum over its C clusters of (sum of v - mean)^2 / N^2

  which counts what prompts and raters do together twice, and is wide rather than narrow; a way of
  one cluster adds nothing, and the interval then holds for that prompt or rater only. V says how
  many independent votes would tell as much, n = mean (1 - mean) / V, made smaller for few clusters
  by the squared ratio of the normal's quantile to Student's, and Clopper and Pearson's interval of
  n votes is taken, which stays in [0, 1]. Where V is 0, n is the number of prompts.
  Sources: A. C. Cameron, J. B. Gelbach and D. L. Miller, "Robust Inference With Multiway
  Clustering" (2011); E. L. Korn and B. I. Graubard, "Confidence Intervals for Proportions with
  Small Expected Number of Positive Counts Estimated from Survey Data" (1998).

  Args:
    values: `[N]` in [0, 1].
    prompts: `[N]` which prompt.
    raters: `[N]` who.
    level: confidence in (0, 1).

  Returns:
    (low, high); both NaN if there are not two prompts or two raters.
  """
  ways = [np.unique(way, return_inverse=True)[1] for way in (prompts, raters)]
  clusters = [int(way.max()) + 1 if len(way) else 0 for way in ways]
  if max(clusters) < 2:
    return float("nan"), float("nan")
  count, mean = len(values), float(values.mean())
  variance = sum(
    size / (size - 1) * np.sum(np.bincount(way, values - mean) ** 2) / count**2
    for way, size in zip(ways, clusters, strict=True)
    if size > 1
  )
  effective = float(clusters[0])
  tail = (1 - level) / 2
  if variance > 1e-12:
    degrees = min(size for size in clusters if size > 1) - 1
    ratio = scipy.special.ndtri(tail) / scipy.special.stdtrit(degrees, tail)
    effective = min(mean * (1 - mean) / variance * ratio**2, count)
  for_it, against = effective * mean, effective * (1 - mean)
  beta = scipy.stats.beta
  low = beta.ppf(tail, for_it, against + 1) if mean > 0 else 0.0
  high = beta.ppf(1 - tail, for_it + 1, against) if mean < 1 else 1.0
  return float(low), float(high)


def agreement(values: np.ndarray, prompts: np.ndarray, raters: np.ndarray) -> tuple[float, float]:
  """Krippendorff's alpha, and the share of two raters' votes on one pair that are the same.

  Args:
    values: `[N]` 0, 0.5 or 1.
    prompts: `[N]` which prompt.
    raters: `[N]` who; of each at most one vote a prompt.

  Returns:
    Both NaN where no prompt has two votes; alpha, too, where all votes are the same.
  """
  krippendorff = _krippendorff()
  rows, columns = (np.unique(way, return_inverse=True)[1] for way in (raters, prompts))
  counts = np.zeros((columns.max() + 1 if len(columns) else 0, 3), int)
  np.add.at(counts, (columns, (values * 2).astype(int)), 1)
  counts = counts[counts.sum(axis=1) > 1]
  if not len(counts):
    return float("nan"), float("nan")
  totals = counts.sum(axis=1)
  same = np.sum(counts * (counts - 1)) / np.sum(totals * (totals - 1))
  if np.count_nonzero(counts.sum(axis=0)) < 2:
    return float("nan"), float(same)
  # Of votes without ties this is the alpha of categories.
  alpha = krippendorff.alpha(
    value_counts=counts, value_domain=[0.0, 0.5, 1.0], level_of_measurement="interval"
  )
  return float(alpha), float(same)


def _krippendorff():
  try:
    import krippendorff
  except ImportError as error:
    raise UserError(
      "the agreement of raters needs krippendorff: pip install 'rlft[rating]'"
    ) from error
  return krippendorff


# ---------------------------------------------------------------------------- tables


def rates_table(results: Results) -> Table:
  """A row for each two contenders and each set of prompts."""
  header = ["comparison", "prompts of", "preferred", "interval", "won/tied/lost"]
  header += ["prompts", "raters", "alpha", "same answer"]
  rows = [
    [
      f"{one.liked} over {one.other}",
      one.set,
      _percent(one.rate),
      f"[{_percent(one.low)}, {_percent(one.high)}]",
      f"{one.wins}/{one.ties}/{one.losses}",
      str(one.prompts),
      str(one.raters),
      _number(one.alpha),
      _percent(one.agreement),
    ]
    for one in results.rates
  ]
  return Table(header, rows)


def _no_formula(text: str) -> str:
  """A text that a spreadsheet does not compute: there what begins like this is a formula."""
  return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def raters_table(results: Results) -> Table:
  """A row for each rater."""
  header = ["rater", "pairs", "shown twice", "answered the same", "left", "seconds", ""]
  rows = [
    [
      str(one.number),
      str(one.votes),
      str(one.repeats),
      _percent(one.consistent),
      _percent(one.left),
      _number(one.seconds, 1),
      "left out" if one.number in results.left_out else "",
    ]
    for one in results.raters
  ]
  return Table(header, rows)


def votes_table(study: Study, votes: Sequence[Question]) -> Table:
  """A row for each vote, repetitions too, with what nobody was shown: whose picture it was."""
  header = ["rater", "place", "set", "item", "prompt", "left", "right", "answer", "preferred"]
  header += ["again", "seconds"]
  rows = []
  pairs = study.pairs
  for vote in votes:
    pair = pairs[vote.pair]
    item = study.items[pair.item]
    shown = [study.contenders[k].name for k in (pair.first, pair.second)]
    left, right = reversed(shown) if vote.flipped else shown
    preferred = {"left": left, "right": right}.get(vote.answer, "")
    rows.append(
      [
        str(vote.rater),
        str(vote.place),
        study.sets[item.set].name,
        str(pair.item),
        _no_formula(item.text),
        left,
        right,
        vote.answer,
        preferred,
        str(int(vote.again)),
        _number(vote.seconds, 2),
      ]
    )
  return Table(header, rows)


def markdown(results: Results) -> str:
  """The tables, with a sentence for each two contenders at the top."""
  two = {(one.liked, one.other): one for one in results.rates}  # The last is of all sets.
  parts = [sentence(one) for one in two.values()]
  parts.append(rates_table(results).markdown())
  parts.append(
    f"A tie is half a vote for each. Intervals ({statistics.LEVEL:.0%}) hold for other prompts and"
    " other raters. alpha: Krippendorff's, 1 is full agreement and 0 that of chance; where nearly"
    " all votes go to one side it is low though raters give the same answer."
  )
  if results.raters:
    parts.append(raters_table(results).markdown())
  if results.left_out:
    numbers = ", ".join(map(str, results.left_out))
    parts.append(f"Left out because they answered repeated pairs otherwise: {numbers}.")
  return "\n\n".join(parts) + "\n"


def sentence(rate: Rate) -> str:
  """What a rate says."""
  votes = rate.wins + rate.ties + rate.losses
  if not votes:
    return f"{rate.liked} over {rate.other}: no votes yet."
  return (
    f"{rate.liked} is preferred to {rate.other} in {_percent(rate.rate)} of {votes:,} votes,"
    f" {statistics.LEVEL:.0%} interval [{_percent(rate.low)}, {_percent(rate.high)}]."
  )


def to_json(study: Study, results: Results) -> dict[str, Any]:
  """All figures; null for NaN."""

  def plain(one):
    values = dataclasses.asdict(one)
    return {k: files.finite(v) if isinstance(v, float) else v for k, v in values.items()}

  return {
    "contenders": [dataclasses.asdict(one) for one in study.contenders],
    "sets": [dataclasses.asdict(one) for one in study.sets],
    "rates": [plain(one) for one in results.rates],
    "raters": [plain(one) for one in results.raters],
    "left_out": list(results.left_out),
  }


def write(
  study: Study, votes: Sequence[Question], results: Results, *, name: str = "results"
) -> str:
  """Writes the tables as Markdown, JSON and CSV, and all votes, into the study's directory.

  Args:
    study: what was compared.
    votes: answered questions.
    results: what they say.
    name: of the files, before .md, .json, .csv and -votes.csv.

  Returns:
    The tables.

  Raises:
    UserError: they cannot be written.
  """
  text = markdown(results)
  content = json.dumps(to_json(study, results), indent=1, ensure_ascii=False) + "\n"
  directory = study.directory
  files.write_atomic(directory / f"{name}.md", text)
  files.write_atomic(directory / f"{name}.json", content)
  files.write_atomic(directory / f"{name}.csv", rates_table(results).csv())
  files.write_atomic(directory / f"{name}-votes.csv", votes_table(study, votes).csv())
  return text


def _percent(share: float) -> str:
  return "-" if np.isnan(share) else f"{100 * share:.1f} %"


def _number(value: float | None, digits: int = 2) -> str:
  return "-" if value is None or np.isnan(value) else f"{value:.{digits}f}"
