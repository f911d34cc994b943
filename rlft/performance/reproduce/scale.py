"""What is trained at a scale: a file of tasks and methods, and the experiments made of them."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import pathlib
import tomllib
from typing import Any

from absl import flags

from rlft.config import fields, tasks
from rlft.config import flags as cli
from rlft.config.settings import Config, EvalConfig
from rlft.types import UserError

_ROOT = pathlib.Path(__file__).parents[3]
EXPERIMENTS = _ROOT / "experiments"


@dataclasses.dataclass(frozen=True)
class TaskPlan:
  """A task at this scale.

  Attributes:
    task: as after `--task=`.
    trained: evaluation of its reward on the way, as after `--eval=`, on development prompts.
    oracle: that of its judge, on the same prompts.
    note: what a reader of its tables should know.
  """

  task: str
  trained: str
  oracle: str
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Variation:
  """What a method has of its own.

  Attributes:
    flags: of `launch/train.py`.
    task: keys that it changes in its tasks, e.g. 'images_per_prompt=24'.
  """

  flags: Sequence[str] = ()
  task: str = ""


@dataclasses.dataclass(frozen=True)
class MethodPlan:
  """A method at this scale.

  Attributes:
    title: in the tables.
    flags, task: see `Variation`.
    on: more of both, by what it is trained on: a task's name or 'joint'.
    tables: parts of the results that it joins though the paper has it not.
  """

  title: str
  flags: Sequence[str] = ()
  task: str = ""
  on: Mapping[str, Variation] = dataclasses.field(default_factory=dict)
  tables: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Scale:
  """All that an experiment needs to know.

  Attributes:
    name: of the file, without its suffix.
    base: the model that all are trained from.
    flags: of all runs.
    evals: of the protocol, as after `--eval=`.
    guidance_scales: for the base model, as after `--guidance_scales=`.
    rater_noise: of the simulated raters, see `raters.chance`.
    best_of: how many of the base model's images the best is taken of, by the reward of the task
      'preference', for a row of T1; 1 for no such row.
    cpu_devices: into which the host is split for measuring.
    tasks: by name.
    methods: by name.
    note: what a reader of all results should know.
  """

  name: str
  base: str
  flags: Sequence[str]
  evals: Sequence[str]
  guidance_scales: str
  rater_noise: float
  best_of: int
  cpu_devices: int
  tasks: Mapping[str, TaskPlan]
  methods: Mapping[str, MethodPlan]
  note: str = ""

  def added(self, part: str) -> dict[str, MethodPlan]:
    """The methods that join a part of the results though the paper has them not there."""
    return {name: method for name, method in self.methods.items() if part in method.tables}

  def protocol(self) -> list[EvalConfig]:
    """The evaluations of the protocol."""
    return [entry for text in self.evals for entry in tasks.parse_eval(text)]

  def varied(self, method: str, task: str, more: Variation) -> "Scale":
    """With more of its own for a method on a task, above what it has there already."""
    plan = _of(self.methods, method, f"{self.name}.toml: methods")
    here = plan.on.get(task, Variation())
    keys = ",".join(filter(None, (here.task, more.task)))
    plan = dataclasses.replace(
      plan, on={**plan.on, task: Variation((*here.flags, *more.flags), keys)}
    )
    return dataclasses.replace(self, methods={**self.methods, method: plan})

  def reward(self, task: str) -> str:
    """The name of a task's reward."""
    return tasks.parse_task(_of(self.tasks, task, f"{self.name}.toml: tasks").task)[0].reward


def load(name: str) -> Scale:
  """Reads `experiments/NAME.toml`.

  Raises:
    UserError: there is no such file, or something in it is missing, unknown or of another kind.
  """
  path = EXPERIMENTS / f"{name}.toml"
  if not path.exists():
    known = ", ".join(sorted(path.stem for path in EXPERIMENTS.glob("*.toml")))
    raise UserError(f"--scale={name}: there is no {path.name} in {EXPERIMENTS}: use {known}")
  try:
    content = tomllib.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read ({error}): correct it") from error
  return parse(name, content)


def parse(name: str, content: Mapping[str, Any]) -> Scale:
  """The content of such a file.

  Raises:
    UserError: something in it is missing, unknown or of another kind.
  """
  return _made(Scale, {**content, "name": name}, f"{name}.toml")


# Keys that hold several tables of a kind.
_TABLES = {"tasks": TaskPlan, "methods": MethodPlan, "on": Variation}


def _made(kind: type, values: Any, where: str) -> Any:
  if not isinstance(values, Mapping):
    raise UserError(f"{where} is no table: write its keys below a [title] of its own")
  known = {field.name: field for field in dataclasses.fields(kind)}
  if unknown := values.keys() - known.keys():
    word = sorted(unknown)[0]
    raise UserError(f"{where} has an unknown key {word}: {fields.suggestion(word, known)}")
  missing = [
    key
    for key, field in known.items()
    if field.default is field.default_factory is dataclasses.MISSING and key not in values
  ]
  if missing:
    raise UserError(f"{where}: add {', '.join(missing)}")
  made = dict(values)
  for key in values.keys() & _TABLES.keys():
    parts = values[key].items()
    made[key] = {name: _made(_TABLES[key], part, f"{where}: {key}.{name}") for name, part in parts}
  return kind(**made)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """One training.

  Attributes:
    method: its name in the scale.
    tasks: their names; several are trained jointly.
    seed: of the training.
  """

  method: str
  tasks: tuple[str, ...]
  seed: int

  @property
  def on(self) -> str:
    """What it is trained on: the task, or 'joint'."""
    return self.tasks[0] if len(self.tasks) == 1 else "joint"

  @property
  def name(self) -> str:
    """Name of its directory."""
    return f"{self.method}-{self.on}-{self.seed}"

  def flags(self, scale: Scale, workdir: pathlib.Path) -> list[str]:
    """The command line of `launch/train.py`.

    Raises:
      UserError: the scale has not the method or the task.
    """
    method = _of(scale.methods, self.method, f"{scale.name}.toml: methods")
    here = method.on.get(self.on, Variation())
    line = [*scale.flags, *method.flags, *here.flags]
    for name in self.tasks:
      task = _of(scale.tasks, name, f"{scale.name}.toml: tasks")
      line.append(f"--task={_changed(task.task, method.task, here.task)}")
      for role in ("trained", "oracle"):
        line.append(f"--eval=name={evaluation(name, role)},{getattr(task, role)}")
    line += [f"--pretrained={scale.base}", f"--seed={self.seed}"]
    return [*line, f"--workdir={workdir / self.name}"]

  def config(self, scale: Scale, workdir: pathlib.Path) -> Config:
    """What the trainer will make of that.

    Raises:
      UserError: it cannot be made anything of.
    """
    return config_of(
      self.flags(scale, workdir), where=f"{scale.name}.toml: {self.method} on {self.on}"
    )


def config_of(line: Sequence[str], *, where: str) -> Config:
  """What the trainer makes of a command line.

  Args:
    line: flags.
    where: they stand, for an error.

  Raises:
    UserError: it cannot make anything of them.
  """
  values = flags.FlagValues()
  cli.define(Config, flag_values=values)
  try:
    values(["train", *line])
  except flags.Error as error:
    raise UserError(f"{where}: {error}") from error
  return cli.read(Config, flag_values=values)


def _changed(task: str, *changes: str) -> str:
  """A task's value with keys changed, as after `--task=`; the last change of a key counts."""
  items: dict[str, str] = {}
  for text in filter(None, (task, *changes)):
    items |= {item.partition("=")[0]: item for item in text.split(",")}
  return ",".join(items.values())


def evaluation(task: str, role: str) -> str:
  """The name of a run's evaluation of a task's reward ('trained') or of its judge ('oracle')."""
  return f"{task}-{role}"


def _of(known: Mapping[str, Any], name: str, where: str) -> Any:
  if name not in known:
    raise UserError(f"{where} has no {name}: add it, or leave its tables out with --only")
  return known[name]


def experiments(
  trained: Iterable[tuple[str, tuple[str, ...]]], seeds: Sequence[int]
) -> list[Experiment]:
  """Each (method, tasks) with each seed, once; a seed is done before the next begins."""
  pairs = list(dict.fromkeys(trained))
  return [Experiment(method, tasks, seed) for seed in seeds for method, tasks in pairs]
