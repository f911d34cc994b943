"""The network in bfloat16: do runs come as far as in float32, and how far do samples drift?

python experiments/bf16.py

Trains the preference task of experiments/emoji_bf16.flags in each type with several seeds, one run
after another, and then draws the same images in both types from the base model. Runs of the same
seed draw the same prompts with the same noise. If interrupted, the same command goes on where it
stopped.

Result, in runs/bf16: the rewards of all runs (bf16.csv), curves (bf16.html), the drift
(bf16_drift.csv), and two tables (printed). Duration: 15 minutes on 2 cores. What was found
is in experiments/bf16.md.
"""

from collections.abc import Mapping, Sequence
import csv
import dataclasses
import io
import os
import pathlib
import subprocess
import sys

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from rlft import catalog
from rlft.config import flags as cli
from rlft.config import tasks
from rlft.config.settings import ScoringSettings
from rlft.diffusion import ddim, rollout, sampler
from rlft.diffusion.policy import Policy
from rlft.evaluation import evaluate, results
from rlft.evaluation.metric import MetricScorer
from rlft.models import lora, stable_diffusion, text
from rlft.models.files import pretrained
from rlft.parallel import sharding
from rlft.report import charts
from rlft.report.metrics import METRICS_FILE
from rlft.storage import files
from rlft.types import Guidance, UserError

_ROOT = pathlib.Path(__file__).parents[1]
_NAME = "bf16"
_BLOCK = 10  # iterations in a row of the table: single batches are noise
_ENDS = 20  # iterations whose mean is a run's reward at its start and at its end
_IMAGES = 32  # drawn at once, and compared for each setting

# What is compared, and the flags that make it.
VARIANTS = {
  "float32": {"compute_dtype": "float32"},
  "bfloat16": {"compute_dtype": "bfloat16"},
  "bfloat16-state": {
    "compute_dtype": "bfloat16",
    "param_dtype": "bfloat16",
    "moments_dtype": "bfloat16",
  },
}

_WORKDIR = flags.DEFINE_string("workdir", f"runs/{_NAME}", "directory of all runs")
_FLAGFILE = flags.DEFINE_string(
  "base", str(_ROOT / "experiments" / "emoji_bf16.flags"), "flagfile with one task"
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each variant", lower_bound=1)
_ITERATIONS = flags.DEFINE_integer("iterations", 200, "of each run", lower_bound=_ENDS)
_VARIANTS = flags.DEFINE_multi_enum(
  "variant", list(VARIANTS), list(VARIANTS), "what to compare; the first is the reference"
)
_DRIFT = flags.DEFINE_boolean("drift", True, "measure the drift of samples, too")


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a run came to.

  Attributes:
    rewards: `[iterations]`, means of the batches that were trained on.
    deviations: `[iterations]`, max |ratio - 1| before the iteration's update.
    before, after: held-out evaluation of the base model and of the trained one.
  """

  rewards: np.ndarray
  deviations: np.ndarray
  before: results.EvalResult
  after: results.EvalResult


def main() -> None:
  workdir = pathlib.Path(_WORKDIR.value)
  base = pathlib.Path(_FLAGFILE.value).read_text().splitlines()
  runs = {}
  for seed in range(_SEEDS.value):
    for variant in _VARIANTS.value:
      folder = workdir / f"{variant}-{seed}"
      print(f"{variant}, seed {seed} ({folder})", flush=True)
      run(folder, run_flags(base, variant, folder, seed=seed, iterations=_ITERATIONS.value))
      runs[variant, seed] = read(folder)
  print(write(workdir, runs))
  if _DRIFT.value:
    path = workdir / f"{_NAME}_drift.csv"
    if not path.exists():
      files.write_atomic(path, drift())
    print(path.read_text())


# ---------------------------------------------------------------------------- training


def run_flags(
  base: Sequence[str], variant: str, workdir: pathlib.Path, **settings: int
) -> list[str]:
  """The lines of a flagfile with those of a variant, and other settings, in their place."""
  ours = {"workdir": workdir, **VARIANTS[variant], **settings}
  kept = [line for line in base if line.startswith("--") and line[2:].partition("=")[0] not in ours]
  return [*kept, *(f"--{key}={value}" for key, value in ours.items())]


def run(folder: pathlib.Path, lines: Sequence[str]) -> None:
  """Trains, unless that was done; programs that were compiled for one seed serve the others."""
  if _is_done(folder):
    return
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "run.flags").write_text("\n".join(lines) + "\n")
  environment = {
    "JAX_ENABLE_COMPILATION_CACHE": "true",
    "JAX_COMPILATION_CACHE_DIR": str(folder.parent.absolute() / "cache"),
  }
  status = subprocess.run(
    [sys.executable, _ROOT / "launch" / "train.py", f"--flagfile={folder}/run.flags"],
    stdout=subprocess.DEVNULL,
    env=os.environ | environment,
  ).returncode
  if status or not _is_done(folder):
    raise UserError(
      f"the run in {folder} ended early (status {status}): run the same command again"
    )


def _is_done(folder: pathlib.Path) -> bool:
  history = results.read_history(folder)
  return bool(history) and history[-1][0] >= _ITERATIONS.value


def read(folder: pathlib.Path) -> Outcome:
  """What a run left in its folder."""
  lines = files.read_jsonl(folder / METRICS_FILE)
  (rewards,) = ([k for k in lines[0] if k.startswith("reward/") and k.endswith("/mean")],)
  (_, (before,)), *_, (_, (after,)) = (
    (iteration, found.values()) for iteration, found in results.read_history(folder)
  )
  return Outcome(
    rewards=np.array([line[rewards[0]] for line in lines]),
    deviations=np.array([line["ratio/max_abs_deviation"] for line in lines]),
    before=before,
    after=after,
  )


def write(workdir: pathlib.Path, runs: Mapping[tuple[str, int], Outcome]) -> str:
  """Writes rewards and curves.

  Args:
    workdir: where to.
    runs: by variant and seed, all of the same number of iterations; the first variant is what the
      others are compared with.

  Returns:
    The table: of each variant the mean over seeds (and each seed), and how far it is from the
    reference, in units of the standard deviation between the reference's seeds.
  """
  rows = io.StringIO()
  writer = csv.writer(rows, lineterminator="\n")
  writer.writerow(["variant", "seed", "iterations", "reward", "max_ratio_deviation"])
  for (variant, seed), outcome in runs.items():
    for end in range(_BLOCK, len(outcome.rewards) + 1, _BLOCK):
      block = slice(end - _BLOCK, end)
      mean, worst = outcome.rewards[block].mean(), outcome.deviations[block].max()
      writer.writerow([variant, seed, end, f"{mean:.5f}", f"{worst:.2e}"])
  files.write_atomic(workdir / f"{_NAME}.csv", rows.getvalue())

  variants = list(dict.fromkeys(variant for variant, _ in runs))
  of = {v: [outcome for (name, _), outcome in runs.items() if name == v] for v in variants}
  series = []
  for variant in variants:
    count = min(len(o.rewards) for o in of[variant]) // _BLOCK
    curves = np.array(
      [o.rewards[: count * _BLOCK].reshape(count, _BLOCK).mean(1) for o in of[variant]]
    )
    x = _BLOCK * np.arange(1, count + 1)
    series.append(charts.Series(variant, x, curves.mean(0), curves.min(0), curves.max(0)))
  title = f"Reward over iterations, mean and range of {len(of[variants[0]])} seeds"
  page = _PAGE.format(chart=charts.line_chart(title, series))
  files.write_atomic(workdir / f"{_NAME}.html", page)

  header = ["variant", "what", "mean", "each seed", "from the reference", "max abs(ratio - 1)"]
  table = [header, ["---"] * len(header)]
  for variant in variants:
    worst = max(outcome.deviations.max() for outcome in of[variant])
    for what, number in (
      (f"reward, first {_ENDS}", lambda o: o.rewards[:_ENDS].mean()),
      (f"reward, last {_ENDS}", lambda o: o.rewards[-_ENDS:].mean()),
      ("held out, before", lambda o: o.before.mean),
      ("held out, after", lambda o: o.after.mean),
    ):
      values, reference = ([number(o) for o in of[v]] for v in (variant, variants[0]))
      gap = np.mean(values) - np.mean(reference)
      spread = np.std(reference, ddof=1) if len(reference) > 1 else 0.0
      away = "" if variant == variants[0] else f"{gap:+.4f}"
      if away and spread:  # The base model's evaluation is the same with every seed.
        away += f" ({gap / spread:+.2f} deviations)"
      each = " ".join(f"{value:.4f}" for value in values)
      table.append([variant, what, f"{np.mean(values):.4f}", each, away, f"{worst:.1e}"])
  return "\n".join(f"| {' | '.join(row)} |" for row in table)


# ---------------------------------------------------------------------------- drift


class Pen:
  """Draws with the base model, a step at a time, so that all numbers of steps share a program."""

  def __init__(self, dtype: str):
    self.model = pretrained.load("emoji-sd", dtype=jnp.dtype(dtype))
    params, size = self.model.params, stable_diffusion.image_size(self.model)
    self._encode = jax.jit(lambda ids: text.encode(self.model, params, ids, size))
    self._decode = jax.jit(lambda x: stable_diffusion.decode(self.model, params["vae"], x))
    self._step = jax.jit(self._one_step, static_argnames="guidance_scale")

  def _one_step(self, params, step, latents, guidance, keys, *, guidance_scale):
    policy = Policy(self.model.unet, step, guidance_scale)
    path = rollout.sample(policy, lora.Weights(params), latents, guidance, keys)
    return path.latents[-1]

  def __call__(
    self, texts: Sequence[str], *, seed: int, first: int, steps: int, guidance_scale: float
  ) -> tuple[np.ndarray, np.ndarray]:
    """Latents `[N, h, w, C]` and images `[N, H, W, 3]` of numbers `first`, ... of a seed."""
    process = ddim.make(self.model.scheduler, steps)
    keys = sampler.image_keys(jax.random.key(seed), first, len(texts))
    prompt = self._encode(self.model.tokenize(list(texts))[0])
    guidance = Guidance(prompt, self._encode(self.model.tokenize([""] * len(texts))[0]))
    latents = rollout.normal(keys, steps, stable_diffusion.latent_shape(self.model))
    for i in range(steps):
      row = jax.tree.map(lambda x, i=i: x[i : i + 1], process)
      noise = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
      latents = self._step(
        self.model.params["unet"], row, latents, guidance, noise, guidance_scale=guidance_scale
      )
    return np.asarray(latents), np.asarray(self._decode(latents))


def drift() -> str:
  """How far the samples of the base model are from float32's, as CSV.

  Each row is a setting: mean and largest difference of the final latents (of deviation 1, about)
  and of the images (in [0, 1]). Then the base model's evaluations in both types.
  """
  pens = {dtype: Pen(dtype) for dtype in ("float32", "bfloat16")}
  rows = io.StringIO()
  writer = csv.writer(rows, lineterminator="\n")
  writer.writerow(["steps", "guidance", "latents_mean", "latents_max", "images_mean", "images_max"])
  presets = tasks.EVAL_PRESETS["emoji"]
  (entry,) = (entry for entry in presets if entry.name == "preference")
  texts = [prompt.text for prompt in catalog.load_prompts(entry.prompts)[:_IMAGES]]
  for steps, scale in ((10, 1.0), (10, 7.0), (50, 1.0), (50, 7.0)):
    exact, rounded = (
      pen(texts, seed=0, first=0, steps=steps, guidance_scale=scale) for pen in pens.values()
    )
    gaps = [np.abs(a - b) for a, b in zip(exact, rounded, strict=True)]
    numbers = (f"{value:.5f}" for gap in gaps for value in (gap.mean(), gap.max()))
    writer.writerow([steps, scale, *numbers])
  rows.write("\n")
  writer.writerow(["evaluation", *pens, "difference", "low", "high"])
  measured = [_measure(pen, presets) for pen in pens.values()]
  for name in measured[0]:
    exact, rounded = (found[name] for found in measured)
    gap = results.paired_difference(exact, rounded)
    numbers = (exact.mean, rounded.mean, gap.mean, gap.low, gap.high)
    writer.writerow([name, *(f"{value:.5f}" for value in numbers)])
  return rows.getvalue()


def _measure(pen: Pen, presets: Sequence) -> dict[str, results.EvalResult]:
  """The evaluations of a model that draws in 10 steps without guidance."""

  def sample(prompts, seed):
    texts = [prompt.text for prompt in prompts]
    for first in range(0, len(texts), _IMAGES):
      batch = texts[first : first + _IMAGES]
      yield pen(batch, seed=seed, first=first, steps=10, guidance_scale=1.0)[1]

  rows = sharding.batch(sharding.make_mesh())
  scoring = ScoringSettings(reward_timeout_s=300.0, reward_threads=1)
  with MetricScorer(rows=rows, scoring=scoring) as score:
    return evaluate.evaluate(catalog.make_specs(presets), sample=sample, score=score, seed=1000)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>bfloat16 and float32</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 720px; margin: 0 auto; padding: 12px; }}
figure {{ margin: 0; }} svg text {{ font-size: 11px; fill: #555; }} svg .g {{ stroke: #e4e4e4; }}
.legend span {{ margin-right: 12px; }}
.legend i {{ display: inline-block; width: 10px; height: 10px; margin-right: 4px; }}
</style></head><body>{chart}</body></html>
"""

if __name__ == "__main__":
  cli.main(main)
