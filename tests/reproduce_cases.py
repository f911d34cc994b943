"""A scale for the tests of `rlft.performance.reproduce`, and runs whose files are literals."""

import json
import pathlib
from typing import Any

from evaluation_cases import result
import numpy as np

from rlft.evaluation import results
from rlft.evaluation.protocol import Base
from rlft.performance.reproduce import scale as scale_lib

ITERATIONS, BATCH = 4, 8
PROMPTS = np.linspace(0, 1, 24)
JITTER = 0.01 * (-1.0) ** np.arange(24)

_TASK = "name={0},prompts=emoji:pair/train,reward=emoji-objects,batch_size=8,watch=oracle-both"
_EVAL = "prompts=emoji:pair/test,metric={},images=24"
CONTENT: dict[str, Any] = {
  "base": "emoji-sd",
  "flags": ["--iterations=4", "--eval_every=2", "--pretrain_weight=0", "--guidance_scale=3"],
  "evals": [
    f"name={name},prompts=emoji:pair/test,development=emoji:pair/test,metric=oracle-both,images=24"
    for part in ("seen", "unseen")
    for name in (f"reward-{part}", f"preference-{part}", f"likeness-{part}", f"objects-{part}")
    + (f"both-{part}",)
  ]
  + [
    f"name={name},prompts=emoji:pair/test,development=emoji:pair/test,metric=oracle-both,images=24"
    for name in ("parity", "parity-gendered", "skin", "skin-gendered", "distance", "diversity")
    + ("presence",)
  ],
  "guidance_scales": "1,3",
  "rater_noise": 0.1,
  "best_of": 3,
  "cpu_devices": 0,
  "tasks": {
    name: {
      "task": _TASK.format(name),
      "trained": _EVAL.format("emoji-objects"),
      "oracle": _EVAL.format("oracle-both"),
    }
    | ({"note": "Said of skin."} if name == "skintone" else {})
    for name in ("preference", "composition", "skintone")
  },
  "methods": {
    "rl": {"title": "RL", "on": {"joint": {"flags": ["--iterations=2"]}}},
    "rl-alone": {"title": "RL alone"},
    "raft": {"title": "RAFT", "flags": ["--algorithm=raft"], "task": "images_per_prompt=4"},
    "rwr": {"title": "RWR", "flags": ["--algorithm=reward-weighted"]},
    "refl": {"title": "ReFL", "flags": ["--learning_rate=1e-3"]},
    "draft": {"title": "DRaFT-LV", "flags": ["--learning_rate=1e-2"]},
  },
}


def scale(**changes):
  return scale_lib.parse("tiny", CONTENT | changes)


# How far each method comes on the test prompts, by what it is trained on; the base is at 0.5.
GAINS = {
  "refl": 0.6,
  "rl": 0.4,
  "draft": 0.3,
  "rwr": 0.2,
  "raft": -0.1,
  "rl-alone": 0.5,
}
LOWER = ("parity", "parity-gendered", "distance")


def measured(level: float, seed: int = 0) -> dict[str, results.EvalResult]:
  """Results of the protocol, each method's seeds a little apart."""
  found = {}
  for text in CONTENT["evals"]:
    name = text.partition(",")[0].removeprefix("name=")
    lower = name in LOWER
    scores = (PROMPTS + (1 - level if lower else level) + seed * JITTER).astype(np.float32)
    mean = float(scores.mean())
    found[name] = results.EvalResult(
      name, "oracle-both", mean, mean, mean, 24, 24, scores, lower_is_better=lower
    )
  return found


def base() -> Base:
  """The base model: best at guidance 3."""
  both = {1.0: measured(0.2), 3.0: measured(0.5)}
  return Base(both, both)


class Protocol:
  """In the place of `rlft.inference.protocol.Protocol`; `log` gets the runs that are measured."""

  log: list[str] = []

  def __init__(self, settings, evals, *, base, policy, scoring, say):
    self.evals = evals

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def base(self, guidances):
    assert list(guidances) == [3.0]
    return base()

  def best_of(self, choice, guidance, names):
    assert (choice.best_of, choice.best_of_reward, guidance) == (3, "emoji-objects", 3.0)
    return {name: result for name, result in measured(0.65).items() if name in names}

  def of_run(self, run):
    name = pathlib.Path(run.path).name
    self.log.append(name)
    method, _, seed = name.rpartition("-")
    method = method.rpartition("-")[0]
    return measured(0.5 + GAINS[method], int(seed))


def write_run(workdir: pathlib.Path, *, until: int = 0) -> None:
  """What `launch/train.py` leaves of the run with `run.flags` in this directory.

  Args:
    workdir: of the run.
    until: iterations that it does before it is killed; all if 0.
  """
  lines = (workdir / "run.flags").read_text().splitlines()
  given = dict(line.removeprefix("--").partition("=")[::2] for line in lines)
  iterations = int(given["iterations"])
  done = until or iterations
  tasks = [line.partition("name=")[2].partition(",")[0] for line in lines if "--task=" in line]
  method = workdir.name.rpartition("-")[0].rpartition("-")[0]
  rows, history = [], []
  for i in range(done):
    rows.append({"iteration": i, "time/iteration_s": 30.0})
    rows[-1] |= {f"reward/{task}/mean": 0.1 * i + GAINS[method] for task in tasks}
  for i in range(0, done + 1, 2):
    # RL has learnt all when half is done; ReFL's oracle falls while its reward rises.
    up = 0.1 * (min(i, iterations / 2) if method == "rl" else i) * np.sign(GAINS[method])
    judged = -up if method == "refl" else up
    found = {f"{task}-trained": result(PROMPTS + up + i * JITTER) for task in tasks}
    found |= {f"{task}-oracle": result(PROMPTS + judged + i * JITTER) for task in tasks}
    history.append({"iteration": i, "results": {k: v.to_json() for k, v in found.items()}})
  for name, entries in (("metrics.jsonl", rows), ("eval_history.jsonl", history)):
    (workdir / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
  if done == iterations:
    (workdir / "eval.json").write_text("{}")
    (workdir / "report.html").write_text("")
