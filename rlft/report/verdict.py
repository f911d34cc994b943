"""What a run comes to, in one sentence, and what to do next: functions of what was measured."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import shlex
from typing import Literal

from rlft.config.settings import EMOJI_SD
from rlft.report.hacking import Call

# Clipping takes the gradient of those images alone that have already gone the way they should; an
# iteration's first update has none, so that a half is nearly all that there can be.
CLIPPED = 0.5
# A ratio's usual deviation from 1, as a share of the clip range, below which updates have changed
# next to nothing: clipping then never acts.
STILL = 0.1
_NAMED = 3  # evaluations that the sentence names
_FOUND = 0.05  # loss in the share of images that show what is measured, from which it is said
_FASTER = 10  # times the learning rate, where nothing moves

Change = Literal["better", "worse", "no effect", "unclear"]
Kind = Literal["improved", "mixed", "hacked", "worse", "unmoved", "clipped", "early"]


@dataclasses.dataclass(frozen=True)
class Measure:
  """An evaluation at its start, or of the base model at its best guidance, and now.

  Attributes:
    name: of the evaluation.
    before, after: means as text.
    change: what it is called.
    trained_on: the metric is also a reward of the run.
    guard: it was not to be improved, but not to become worse.
    found: shares before and after of the images that show what is measured; None where unknown.
  """

  name: str
  before: str
  after: str
  change: Change
  trained_on: bool = False
  guard: bool = False
  found: tuple[float, float] | None = None

  def __str__(self) -> str:
    return f"{self.name} {self.before} → {self.after}"


@dataclasses.dataclass(frozen=True)
class Training:
  """How training went; means over the last fifth of its iterations.

  Attributes:
    done, total: iterations; `total` is 0 where it is not known.
    rewards: what each reward's curve did, by the task's name.
    clip_fraction, approx_kl, constant: NaN where they are not measured.
    clip_range: of the policy's ratios; NaN where there is none.
  """

  done: int
  total: int = 0
  rewards: Mapping[str, Change] = dataclasses.field(default_factory=dict)
  clip_fraction: float = float("nan")
  approx_kl: float = float("nan")
  constant: float = float("nan")
  clip_range: float = float("nan")

  @property
  def moved(self) -> float:
    """Root mean square of log w in clip ranges: near w = 1, w - 1 - log w is (log w)^2 / 2."""
    return math.sqrt(2 * max(self.approx_kl, 0.0)) / self.clip_range

  @property
  def is_over(self) -> bool:
    """Whether all iterations are done."""
    return self.done >= self.total


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What is said first.

  Attributes:
    kind: for the page's colour and for what to do next.
    sentence: one line without a full stop.
    notes: what else should be known, each a sentence without a full stop.
  """

  kind: Kind
  sentence: str
  notes: tuple[str, ...] = ()


def verdict(measures: Sequence[Measure], calls: Sequence[Call], training: Training) -> Verdict:
  """Judges a run.

  Held-out evaluations count; where there are none, the curves of training do.

  Args:
    measures: all evaluations, if there are two of each.
    calls: what is said of rewards that have a judge.
    training: how training went.
  """
  better = [one for one in measures if one.change == "better"]
  worse = [one for one in measures if one.change == "worse"]
  gained = [one for one in better if not one.trained_on]
  hacked = [call for call in calls if call.found.hacked]
  notes = _notes(measures, training)
  if hacked:
    return Verdict("hacked", _so_far(_hacked(hacked), training), notes)
  if not training.done:
    return Verdict("early", "nothing is known yet: no iteration is done", notes)
  rose = [one.name for one in better if one.trained_on]
  rose = rose or [name for name, change in training.rewards.items() if change == "better"]
  lost = [one for one in worse if not one.trained_on]
  if lost and not gained and rose:
    text = (
      f"{_names(rose)} rose, which was trained on, and {_listed(lost)} became worse: look at the"
      " pictures, the reward may be hacked"
    )
    return Verdict("hacked", _so_far(text, training), notes)
  if better and worse:
    text = f"improved {_listed(better)}, but {_listed(worse)} became worse"
    return Verdict("mixed", _so_far(text, training), notes)
  if gained:
    text = f"improved {_listed(better)}, and nothing that was measured became worse"
    return Verdict("improved", _so_far(text, training), notes)
  if better:
    rest = "seen to move" if len(measures) > len(better) else "measured"
    text = f"improved {_listed(better)}, which was trained on; nothing else was {rest}"
    return Verdict("improved", _so_far(text, training), notes)
  if worse:
    return Verdict("worse", _so_far(f"became worse: {_listed(worse)}", training), notes)
  kind, text = _unmoved(bool(measures), rose, training)
  return Verdict(kind, _so_far(text, training), notes)


def _so_far(text: str, training: Training) -> str:
  return text if training.is_over else f"after {training.done} of {training.total}: {text}"


def _hacked(calls: Sequence[Call]) -> str:
  """The worst that can be said, of the first of them; the page has all."""
  first, others = calls[0], len(calls) - 1
  found = first.found
  text = (
    f"hacked: the reward of {first.name} rose by {abs(found.trained.mean):.3g} and its judge,"
    f" {first.judge}, fell by {abs(found.oracle.mean):.3g} since iteration {found.since}"
  )
  if found.oracle.mean > 0:  # Lower is better.
    text = text.replace(" fell by ", " became worse by ")
  return f"{text}; so were {others} more" if others else text


def _unmoved(measured: bool, rose: Sequence[str], training: Training) -> tuple[Kind, str]:
  """Why nothing that counts has moved."""
  if training.constant >= 1:
    return "unmoved", "nothing moved: the reward gives all images the same score"
  if training.clip_fraction >= CLIPPED:
    return "clipped", (
      f"clipped nearly everywhere: {training.clip_fraction:.0%} of the ratios lie beyond the clip"
      " range, where they teach nothing"
    )
  if rose and measured:
    return "unmoved", f"{_names(rose)} rose in training, and nothing held out was seen to move"
  if rose:
    return "improved", f"the reward of {_names(rose)} rose in training; nothing was held out"
  if training.moved < STILL:
    return "unmoved", "nothing moved: the rate is low"
  if "worse" in training.rewards.values():
    fell = [name for name, change in training.rewards.items() if change == "worse"]
    return "worse", f"the reward of {_names(fell)} fell in training"
  where = "is measured on few images, or trained for few iterations"
  return "unmoved", f"nothing was seen to move: the run {where}"


def _notes(measures: Sequence[Measure], training: Training) -> tuple[str, ...]:
  notes = []
  for one in measures:
    if one.guard and one.change == "worse":
      notes.append(f"{one} is a guard: it was not to become worse")
    if one.found and one.found[1] < one.found[0] - _FOUND:
      notes.append(
        f"{one.name} is measured on fewer images than before: found in {one.found[1]:.0%}, before"
        f" in {one.found[0]:.0%}"
      )
  if training.clip_fraction >= CLIPPED:
    notes.append(
      f"{training.clip_fraction:.0%} of the ratios are clipped: a lower rate may learn more"
    )
  if 0 < training.constant < 1:
    notes.append(
      f"{training.constant:.0%} of the images that are compared had the same score, and taught"
      " nothing"
    )
  return tuple(notes)


def _listed(measures: Sequence[Measure]) -> str:
  shown = [str(one) for one in measures[:_NAMED]]
  more = len(measures) - len(shown)
  return ", ".join(shown) + (f" and {more} more" if more else "")


def _names(names: Sequence[str]) -> str:
  return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"


@dataclasses.dataclass(frozen=True)
class Step:
  """Something to do next: why, and the command for it; '' if there is none.

  What begins with a flag stands for the run's own command with these flags after it.
  """

  text: str
  command: str = ""


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a run is, for commands.

  Attributes:
    workdir: its directory.
    base: the model that it started from.
    command: the command line that made it; '' where that is not known.
    learning_rate: its own; 0 where that is not known.
    prompts: of the first evaluation or task; '' where that is not known.
    pretrain_weight: of its pretraining loss; 0 where it has none.
    pretrain_bounded: the pretraining step is as long as the bound on gradients lets it be.
  """

  workdir: str
  base: str = ""
  command: str = ""
  learning_rate: float = 0.0
  prompts: str = ""
  pretrain_weight: float = 0.0
  pretrain_bounded: bool = False


def next_steps(found: Verdict, place: Place, training: Training) -> list[Step]:
  """What to do after a verdict, most useful first.

  Args:
    found: the verdict.
    place: where the run is.
    training: how training went.
  """

  def inside(name: str) -> str:
    return shlex.quote(f"{place.workdir}{name}")

  run, steps = shlex.quote(place.workdir), []
  if not training.is_over:
    go_on = "Go on: the same command continues from the last checkpoint."
    steps.append(Step(go_on, place.command))
  look = Step(
    "Draw more pictures with it than this page has.",
    f"python launch/sample.py --model={run} {_prompts(place)} --output={inside('/grid.png')}",
  )

  def again(flags: str) -> str:
    return f"--workdir={inside('-2')} {flags}"

  if found.kind in ("improved", "mixed"):
    base = shlex.quote(place.base or "MODEL")
    steps += [
      look,
      Step(
        "Ask people, with sides hidden: the only judge that nothing was trained on.",
        f"python launch/rate.py --models={base} --models={run}{_set(place)}"
        f" --output={inside('/rating')}",
      ),
      Step(
        "Export it for diffusers, with a model card.",
        f"python launch/export.py --workdir={run} --output={inside('/exported')}",
      ),
    ]
  if found.kind == "mixed":
    steps.insert(0, Step("See below since when it became worse: fewer iterations may keep both."))
  if found.kind == "hacked":
    closer = Step(
      "Hold it closer to the base model: a pretraining loss (--pretrain_data=... and"
      " --pretrain_weight=1)."
    )
    if place.pretrain_bounded:
      slower = again(f"--learning_rate={place.learning_rate / 3:g}") if place.learning_rate else ""
      why = "Go in smaller steps: --max_grad_norm leaves --pretrain_weight without effect."
      closer = Step(why, slower)
    elif place.pretrain_weight:
      heavier = again(f"--pretrain_weight={3 * place.pretrain_weight:g}")
      closer = Step("Hold it closer to the base model: a heavier pretraining loss.", heavier)
    steps += [
      Step(
        "Look at the pictures below: move the slider to where they are still as wanted, and train"
        " no longer than that.",
        again("--iterations=N"),
      ),
      closer,
      Step(
        "Change the reward: add a term for what was lost (--task=...,reward='0.5*A + 0.5*B'), or"
        " veto what nobody wants (veto=)."
      ),
    ]
  if found.kind == "unmoved":
    if place.learning_rate and not training.moved >= STILL:
      rate = f"--learning_rate={place.learning_rate * _FASTER:g}"
      why = "Learn faster: try ten times the rate; adapters (LoRA) take more than whole networks."
      steps.append(Step(why, again(rate)))
    steps += [
      Step("Train for longer, and measure on more images (--eval=...,images=1024)."),
      Step("See whether the reward tells good pictures from bad: draw some and rank them."),
    ]
  if found.kind in ("clipped", "worse") and place.learning_rate:
    rate = f"--learning_rate={place.learning_rate / 3:.2g}"
    steps.append(Step("Learn more slowly: try a third of the rate.", again(rate)))
  if found.kind == "clipped":
    steps.append(
      Step("Or widen the clip range: it fits pictures of one size (see --help of --clip_range).")
    )
  return steps


def _set(place: Place) -> str:
  """What is rated: the emoji world has sets of its own."""
  if not place.prompts or place.base == EMOJI_SD:
    return ""
  return " " + shlex.quote(f"--set=name=held-out,prompts={place.prompts}")


def _prompts(place: Place) -> str:
  return f"--prompts={shlex.quote(place.prompts)}" if place.prompts else '--prompt="..."'
