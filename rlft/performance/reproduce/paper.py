"""The paper's tables (arXiv 2401.12244): rows, columns and figures, beside our measures."""

from collections.abc import Mapping, Sequence
import dataclasses

BASE = "base"  # the row of the model that all are trained from
METHOD = "rl"  # the row of the paper's own method
BEST_OF = "best-of"  # that of the best of several of its images, which the paper has not


@dataclasses.dataclass(frozen=True)
class Column:
  """What is measured here, and what the paper has in its place.

  Attributes:
    title: of the column.
    measure: an evaluation of the protocol.
    rated: the measure is an oracle, by which simulated raters compare each picture with the base's.
    paper: what the paper measured.
    values: its figures by row, where it gives them.
    above: pairs of rows (better, worse) of which it only gives the order.
  """

  title: str
  measure: str
  rated: bool = False
  paper: str = ""
  values: Mapping[str, float] = dataclasses.field(default_factory=dict)
  above: Sequence[tuple[str, str]] = ()


@dataclasses.dataclass(frozen=True)
class Row:
  """A method, and what it is trained on.

  Attributes:
    title: of the row.
    method: its name in the scale; '' for the base model.
    tasks: their names; several are trained jointly.
    chosen: the best of several of the base model's images.
  """

  title: str
  method: str = ""
  tasks: tuple[str, ...] = ()
  chosen: bool = False


@dataclasses.dataclass(frozen=True)
class PaperTable:
  """A table.

  Attributes:
    name: as `--only` takes it.
    title: what it shows.
    rows: by the names under which columns have figures.
    columns: of measures; of a table of convergence there are none.
    guards: further columns, of what must not be lost.
    on: the task of methods that a scale adds.
  """

  name: str
  title: str
  rows: Mapping[str, Row]
  columns: Sequence[Column] = ()
  guards: Sequence[Column] = ()
  on: tuple[str, ...] = ()

  @property
  def trained(self) -> list[tuple[str, tuple[str, ...]]]:
    """The methods of its rows with their tasks."""
    return [(row.method, row.tasks) for row in self.rows.values() if row.method]


_PREFERENCE, _COMPOSITION, _SKINTONE = ("preference",), ("composition",), ("skintone",)
_JOINT = (*_SKINTONE, *_COMPOSITION, *_PREFERENCE)
_TITLES = {"refl": "ReFL", "raft": "RAFT", "draft": "DRaFT-LV", "rwr": "RWR", "rl": "RL"}


def _rows(methods: Sequence[str], tasks: tuple[str, ...]) -> dict[str, Row]:
  rows = {BASE: Row("base")}
  return rows | {name: Row(_TITLES[name], name, tasks) for name in methods}


_GUARDS = (
  Column("a single object is there", "presence"),
  Column("skin found", "skin"),
  Column("diversity", "diversity"),
  Column("distance to renderings", "distance"),
)
_ALL = ("refl", "raft", "draft", "rwr", "rl")
_ANY_REWARD = ("raft", "rwr", "rl")
# RL beat the base and every baseline in the paper's human evaluation, on both sets of prompts, and
# has the best aesthetic score on both.
_RL_FIRST = tuple(("rl", other) for other in (BASE, "refl", "raft", "draft", "rwr"))

T1 = PaperTable(
  name="T1",
  title="Preference, by the trained reward and by what was not trained on",
  rows=_rows(_ALL, _PREFERENCE),
  columns=(
    Column(
      "trained reward, in-domain",
      "reward-seen",
      paper="ImageReward, DiffusionDB",
      values={
        BASE: 0.170,
        "refl": 1.290,
        "raft": 0.338,
        "draft": 0.818,
        "rwr": 0.438,
        "rl": 0.845,
      },
    ),
    Column(
      "trained reward, out-of-domain",
      "reward-unseen",
      paper="ImageReward, PartiPrompts",
      values={
        BASE: 0.414,
        "refl": 0.832,
        "raft": 0.504,
        "draft": 0.632,
        "rwr": 0.624,
        "rl": 0.731,
      },
    ),
    Column("oracle, in-domain", "preference-seen"),
    Column("oracle, out-of-domain", "preference-unseen"),
    Column(
      "held-out scorer, in-domain",
      "likeness-seen",
      paper="LAION aesthetic, DiffusionDB",
      above=_RL_FIRST,
    ),
    Column(
      "held-out scorer, out-of-domain",
      "likeness-unseen",
      paper="LAION aesthetic, PartiPrompts",
      above=_RL_FIRST,
    ),
    Column(
      "raters prefer it to the base, in-domain",
      "preference-seen",
      rated=True,
      paper="people, DiffusionDB",
      above=_RL_FIRST,
    ),
    Column(
      "raters prefer it to the base, out-of-domain",
      "preference-unseen",
      rated=True,
      paper="people, PartiPrompts",
      above=_RL_FIRST,
    ),
  ),
  guards=_GUARDS,
  on=_PREFERENCE,
)

T2 = PaperTable(
  name="T2",
  title="Images and time to converge, trained on preference",
  rows={name: row for name, row in T1.rows.items() if name != BASE},
  on=_PREFERENCE,
)
# RAFT diverged.
HOURS = {"refl": 6.9, "draft": 8.4, "rl": 12.1, "rwr": 33.8}
# As are the policy gradients of others, which a scale may add.
ANY_REWARD = frozenset((*_ANY_REWARD, "ddpo", "dpok"))

T3 = PaperTable(
  name="T3",
  title="Skin tones: how uneven they are, lower is better",
  rows=_rows(_ANY_REWARD, _SKINTONE),
  columns=(
    Column(
      "parity, occupations held out",
      "parity",
      paper="parity, occupations",
      values={BASE: 0.556, "raft": 0.464, "rwr": 0.562, "rl": 0.453},
    ),
    Column(
      "parity, a second kind of prompt",
      "parity-gendered",
      paper="parity, HRS-Bench",
      values={BASE: 0.576, "raft": 0.527, "rwr": 0.527, "rl": 0.498},
    ),
    Column("skin found, occupations", "skin"),
    Column("skin found, second kind", "skin-gendered"),
  ),
  guards=tuple(guard for guard in _GUARDS if guard.measure != "skin"),
  on=_SKINTONE,
)

T4 = PaperTable(
  name="T4",
  title="Composition: both of two objects",
  rows=_rows(_ANY_REWARD, _COMPOSITION),
  columns=(
    Column(
      "detection score, unseen objects",
      "objects-unseen",
      paper="detection score, unseen",
      values={BASE: 0.102, "raft": 0.094, "rwr": 0.136, "rl": 0.231},
    ),
    Column(
      "detection score, seen objects",
      "objects-seen",
      paper="detection score, seen",
      values={BASE: 0.094, "raft": 0.092, "rwr": 0.152, "rl": 0.221},
    ),
    Column("both by the oracle, unseen", "both-unseen"),
    Column("both by the oracle, seen", "both-seen"),
  ),
  guards=_GUARDS,
  on=_COMPOSITION,
)

T5 = PaperTable(
  name="T5",
  title="Specialists and joint training: the alignment tax",
  rows={
    BASE: Row("base"),
    "preference": Row("preference only", "rl", _PREFERENCE),
    "composition": Row("composition only", "rl", _COMPOSITION),
    "skintone": Row("skin tone only", "rl", _SKINTONE),
    "joint": Row("joint", "rl", _JOINT),
  },
  columns=(
    Column(
      "preference (trained reward)",
      "reward-seen",
      paper="ImageReward",
      values={
        BASE: 0.273,
        "preference": 0.783,
        "composition": 0.304,
        "skintone": 0.093,
        "joint": 0.701,
      },
    ),
    Column(
      "composition (detection score)",
      "objects-seen",
      paper="detection score",
      values={
        BASE: 0.098,
        "preference": 0.114,
        "composition": 0.226,
        "skintone": 0.076,
        "joint": 0.182,
      },
    ),
    Column(
      "skin tone (parity)",
      "parity",
      paper="parity",
      values={
        BASE: 0.567,
        "preference": 0.659,
        "composition": 0.575,
        "skintone": 0.479,
        "joint": 0.499,
      },
    ),
    Column("preference by the oracle", "preference-seen"),
    Column("both by the oracle", "both-seen"),
  ),
  guards=_GUARDS,
)
# The row of T5 that is trained on a column's task alone, by the column's measure.
SPECIALISTS = {
  "reward-seen": "preference",
  "preference-seen": "preference",
  "objects-seen": "composition",
  "both-seen": "composition",
  "parity": "skintone",
}

ABLATION = PaperTable(
  name="ablation",
  title="The pretraining loss: with it and without, trained on preference",
  rows={
    BASE: Row("base"),
    "rl": Row("RL", "rl", _PREFERENCE),
    "rl-alone": Row("RL without the pretraining loss", "rl-alone", _PREFERENCE),
  },
  columns=(
    Column("trained reward", "reward-seen"),
    Column("oracle", "preference-seen"),
    Column("held-out scorer", "likeness-seen"),
    # Without the loss the paper's pictures had grainy artefacts and were less real (its figure 29).
    Column(
      "distance to renderings", "distance", paper="pictures, figure 29", above=[("rl", "rl-alone")]
    ),
    Column("diversity", "diversity"),
  ),
)

TABLES: Mapping[str, PaperTable] = {table.name: table for table in (T1, T2, T3, T4, T5, ABLATION)}
