"""What the paper leaves open, measured: each choice by itself, at equal images.

    python experiments/open_questions.py --seeds=3

Trains the policy gradient of experiments/miniature.toml with each answer to each question below,
with several seeds, for as long as the tables train it, and compares how much the judge (the oracle)
gains on development prompts. Runs of one seed draw the same prompts in the same order.

If killed, the same command goes on. Result: experiments/results/open_questions.md, .csv (all
measurements) and a figure for each question.
"""

from collections.abc import Mapping, Sequence
import csv
import io
import pathlib
import sys

from absl import flags
import numpy as np

from rlft.config import flags as cli
from rlft.evaluation import results
from rlft.evaluation.tables import Table
from rlft.performance.reproduce import runner
from rlft.performance.reproduce import scale as scale_lib
from rlft.performance.reproduce.scale import Experiment, Scale, Variation
from rlft.report import figures
from rlft.report.charts import Series
from rlft.storage import files
from rlft.types import UserError

_SCALE = flags.DEFINE_string("scale", "miniature", "the name of a file experiments/NAME.toml")
_ONLY = flags.DEFINE_string("only", "", "comma-separated names of questions; all if empty")
_SEEDS = flags.DEFINE_integer("seeds", 3, "trainings of each answer", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", "runs/open_questions", "directory of the trainings")
_OUTPUT = flags.DEFINE_string("output", "experiments/results", "directory of the result")

_METHOD = "rl"
_GROUPS = "images_per_prompt=8"
# The miniature's bound cuts nearly all gradients to one length, and a weight would change nothing.
_UNBOUND = "--max_grad_norm=1"
# {name: (the question, the task, {answer: how})}
QUESTIONS: Mapping[str, tuple[str, str, Mapping[str, Variation]]] = {
  "credit": (
    "What is an image's reward, where sets of 16 are scored?",
    "skintone",
    {
      "the set's score (the paper)": Variation(task="reward=emoji-tone-parity"),
      "leave-one-out": Variation(task="reward=emoji-tone-parity?credit=leave-one-out"),
    },
  ),
  "statistics": (
    "By whose mean and deviation are rewards normalised?",
    "preference",
    {
      "the batch's (the paper)": Variation(task=_GROUPS),
      "the prompt's history (DDPO)": Variation(
        ("--advantage=prompt", "--prompt_history_min=8"), _GROUPS
      ),
      "the prompt's images now (group)": Variation(("--advantage=group",), _GROUPS),
      "the batch's, a prompt for each image": Variation(),
    },
  ),
  "timesteps": (
    "Which timesteps are trained?",
    "composition",
    {
      "5 of all 10 (the paper: some of all)": Variation(("--algorithm=policy-gradient", _UNBOUND)),
      "5 of the first 6": Variation(("--algorithm=policy-gradient?first=6", _UNBOUND)),
      "5 of all 10, weighted": Variation(
        ("--algorithm=policy-gradient?timestep_weights=prediction", _UNBOUND)
      ),
    },
  ),
}

# [(iteration, the judge's result)] of each seed.
Histories = Sequence[Sequence[tuple[int, results.EvalResult]]]


def main() -> None:
  scale, output = scale_lib.load(_SCALE.value), pathlib.Path(_OUTPUT.value)
  names = [name for name in _ONLY.value.split(",") if name] or list(QUESTIONS)
  if unknown := [name for name in names if name not in QUESTIONS]:
    raise UserError(f"--only={_ONLY.value}: {unknown[0]}: use some of {', '.join(QUESTIONS)}")
  parts, rows = [], []
  for name in names:
    question, task, answers = QUESTIONS[name]
    found = {answer: _histories(scale, name, task, answers, answer) for answer in answers}
    parts.append(section(name, question, task, found))
    rows += [(name, *row) for row in measurements(found)]
    figure = figures.svg([(f"{task}: the judge", curves(found))], x_label="iterations")
    files.write_atomic(output / f"open_questions_{name}.svg", figure)
  text = (
    f"# Open questions\n\nMade by `python experiments/open_questions.py --seeds={_SEEDS.value}`:"
    " the judge's gains on development prompts.\n\n"
  ) + "\n".join(parts)
  files.write_atomic(output / "open_questions.md", text)
  written = io.StringIO()
  writer = csv.writer(written, lineterminator="\n")
  writer.writerows([("question", "answer", "seed", "iteration", "judge"), *rows])
  files.write_atomic(output / "open_questions.csv", written.getvalue())
  print(text)


def _histories(
  scale: Scale, name: str, task: str, answers: Mapping[str, Variation], answer: str
) -> Histories:
  """Trains one answer with every seed."""
  scale = scale.varied(_METHOD, task, answers[answer])
  place = pathlib.Path(_WORKDIR.value) / name / str(list(answers).index(answer))
  judge = scale_lib.evaluation(task, "oracle")
  found = []
  for seed in range(_SEEDS.value):
    experiment = Experiment(_METHOD, (task,), seed)
    _say(f"{name}: {answer}, seed {seed}")
    config = experiment.config(scale, place)
    if why := runner.train(config, experiment.flags(scale, place), say=_say):
      raise UserError(f"{why}; mend it, then the same command goes on")
    history = results.read_history(config.output.workdir)
    found.append([(iteration, measured[judge]) for iteration, measured in history])
  return found


def section(name: str, question: str, task: str, found: Mapping[str, Histories]) -> str:
  """A question with its answers' gains, as Markdown."""
  rows = []
  for answer, histories in found.items():
    gains = [history[-1][1].gain_over(history[0][1]) for history in histories]
    each = ", ".join(f"{gain:+.3f}" for gain in gains)
    rows.append((answer, f"{np.mean(gains):+.3f}", each))
  table = Table((f"{task}: {question}", "judge's gain, mean", "of each seed"), rows)
  figure = f"![The judge over iterations](open_questions_{name}.svg)"
  return f"## {question}\n\n{table.markdown()}\n\n{figure}\n"


def measurements(found: Mapping[str, Histories]) -> list[tuple[str, int, int, str]]:
  """Every measurement as (answer, seed, iteration, value)."""
  return [
    (answer, seed, iteration, f"{result.mean:.5f}")
    for answer, histories in found.items()
    for seed, history in enumerate(histories)
    for iteration, result in history
  ]


def curves(found: Mapping[str, Histories]) -> list[Series]:
  """Mean and range over seeds for each answer."""
  drawn = []
  for answer, histories in found.items():
    iterations = np.array([iteration for iteration, _ in histories[0]])
    means = np.array([[result.mean for _, result in history] for history in histories])
    drawn.append(Series(answer, iterations, means.mean(0), means.min(0), means.max(0)))
  return drawn


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
  cli.main(main)
