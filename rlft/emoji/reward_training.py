"""Trains a reward model: the loop; what is particular to each model is a `Recipe`.

The batch of step n depends on (seed, n) alone, so a resumed run equals an uninterrupted one.
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
import importlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tqdm

from rlft.config.fields import option, suggestion
from rlft.parallel import cpu, sharding
from rlft.storage import files
from rlft.storage.checkpoint import Checkpointer
from rlft.types import UserError

Params = Mapping[str, Any]
Figures = Mapping[str, Mapping[str, float]]  # of a measurement: {group: {name: value}}

# module:function, `function(config) -> Recipe`; imported when asked for.
RECIPES = {
  "emoji-tone": "rlft.emoji.tone:recipe",
  "emoji-detector": "rlft.emoji.detector:recipe",
  "emoji-preference": "rlft.emoji.preference:recipe",
}
LOG_EVERY = 50  # steps


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """What `launch/train_reward.py` takes; each field is a flag of the same name."""

  reward: str = option(f"what to train: {', '.join(RECIPES)}")
  workdir: str = option("directory for checkpoints, metrics.jsonl and the model", path=True)
  seed: int = option("seed of data and weights", 0, least=0)
  steps: int = option("training steps", 3_000, least=1)
  batch_size: int = option("pictures a step, over all devices", 64, least=4)
  learning_rate: float = option(
    "peak learning rate of AdamW: warm-up, then a cosine decay to 0", 1e-3, least=0.0
  )
  weight_decay: float = option("decoupled weight decay", 1e-2, least=0.0)
  held_out: int = option("held-out pictures measured at the end", 2_000, least=16)
  checkpoint_every: int = option("steps between checkpoints", 500, least=1)
  cpu_devices: int = option("on CPUs: split the machine into this many devices; 0: one", 0, least=0)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A reward model and how it learns.

  Attributes:
    init: `seed -> params`, untrained.
    batch: `step -> tree of numpy arrays [B, ...]`; a pure function.
    loss: `(params, batch) -> scalar`; pure, jitted over all devices.
    measure: `params -> Figures` on held-out data.
    save: `(directory, params)`; writes what the reward loads.
    load: `directory -> params`, as stored.
  """

  init: Callable[[int], Params]
  batch: Callable[[int], Any]
  loss: Callable[[Params, Any], jax.Array]
  measure: Callable[[Params], Figures]
  save: Callable[[Path, Params], None]
  load: Callable[[Path], Params]


def initialise(shapes: Params, rng: np.random.Generator) -> Params:
  """Kernels of variance 1 / fan-in, scales of 1, biases of 0, everything else of deviation 0.02.

  By NumPy, since compiling Flax's initialisers takes as long as hundreds of steps.

  Args:
    shapes: tree of `jax.ShapeDtypeStruct`s.
    rng: consumed.
  """

  def draw(path, leaf):
    name = path[-1].key
    if name in ("scale", "bias"):
      return np.full(leaf.shape, name == "scale", np.float32)
    deviation = np.prod(leaf.shape[:-1]) ** -0.5 if name == "kernel" else 0.02
    return rng.normal(size=leaf.shape, scale=deviation).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def _optimizer(rate: float, steps: int, weight_decay: float) -> optax.GradientTransformation:
  """AdamW with warm-up and cosine decay; cached, so that it is one and the same jit argument."""
  warm_up = min(max(1, steps // 10), 200)
  schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warm_up, max(steps, warm_up + 1))
  adam = optax.adamw(schedule, b2=0.99, weight_decay=weight_decay)
  # One long vector: many small arrays take longer to compile and to update.
  return optax.flatten(optax.chain(optax.clip_by_global_norm(1.0), adam))


def fit(config: RewardConfig, recipe: Recipe) -> Params:
  """Trains, or goes on from the newest checkpoint in the working directory.

  Raises:
    UserError: the loss is not finite, or the directory holds more steps than asked for.
  """
  mesh = sharding.make_mesh()
  if config.batch_size % mesh.size:
    raise UserError(
      f"--batch_size={config.batch_size} cannot be spread over {mesh.size} devices: choose a"
      " multiple"
    )
  rows, everywhere = sharding.batch(mesh), sharding.replicated(mesh)
  optimizer = _optimizer(config.learning_rate, config.steps, config.weight_decay)

  @functools.partial(sharding.jit, donate_argnums=0)
  def update(state, batch):
    value, gradient = jax.value_and_grad(recipe.loss)(state["params"], batch)
    updates, opt = optimizer.update(gradient, state["opt"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, value

  metrics = Path(config.workdir, "metrics.jsonl")
  with contextlib.closing(Checkpointer(Path(config.workdir, "checkpoints"))) as checkpointer:
    params, first = recipe.init(config.seed), 0
    state = sharding.put({"params": params, "opt": optimizer.init(params)}, everywhere)
    restored = checkpointer.restore(state)
    if restored is not None:
      first, state, meta = restored
      if meta != _identity(config):
        raise UserError(
          f"{config.workdir} was begun with other settings ({meta}): give those, or another"
          " --workdir"
        )
    files.keep_before(metrics, first + 1)
    losses = []
    bar = tqdm.tqdm(
      range(first, config.steps), config.reward, initial=first, total=config.steps, mininterval=1.0
    )
    for step in bar:
      state, value = update(state, sharding.put(recipe.batch(step), rows))
      losses.append(value)
      done = step + 1
      if done % LOG_EVERY == 0 or done == config.steps:
        mean = float(np.mean(jax.device_get(losses)))
        losses = []
        if not np.isfinite(mean):
          raise UserError(f"the loss is {mean} at step {done}: lower --learning_rate")
        bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
        with files.writing(metrics), metrics.open("a") as file:
          file.write(json.dumps({"iteration": done, "loss": mean}) + "\n")
      if done % config.checkpoint_every == 0 or done == config.steps:
        checkpointer.save(done, state, _identity(config))
  return jax.device_get(state["params"])


def _identity(config: RewardConfig) -> dict[str, Any]:
  """Settings that a resumed run must share."""
  free = ("workdir", "held_out", "checkpoint_every", "cpu_devices")
  return {name: value for name, value in dataclasses.asdict(config).items() if name not in free}


def make_recipe(config: RewardConfig) -> Recipe:
  """The recipe that `config.reward` names.

  Raises:
    UserError: there is none of this name.
  """
  if config.reward not in RECIPES:
    raise UserError(f"--reward={config.reward} is not known: {suggestion(config.reward, RECIPES)}")
  module, _, function = RECIPES[config.reward].partition(":")
  return getattr(importlib.import_module(module), function)(config)


def run(config: RewardConfig) -> None:
  """Trains (or what is left of it), writes the model below the workdir and measures what it wrote.

  The model is `<workdir>/<reward>/`, the figures are printed and kept in `<workdir>/held_out.json`.
  """
  cpu.split_host(config.cpu_devices)
  recipe = make_recipe(config)
  params = fit(config, recipe)
  path = Path(config.workdir, config.reward)
  recipe.save(path, params)
  report = recipe.measure(recipe.load(path))
  files.write_atomic(Path(config.workdir, "held_out.json"), json.dumps(report, indent=2) + "\n")
  for group, figures in report.items():
    print(f"{group}: " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items()))
  print(f"wrote {path}")
