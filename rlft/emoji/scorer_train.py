"""Trains the scorer on freshly rendered scenes and measures it on scenes it has never seen."""

import contextlib
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from rlft import files
from rlft.checkpoint import Checkpointer
from rlft.emoji import scorer, scorer_data
from rlft.types import UserError

WEIGHTS_NAME = "scorer.safetensors"
# No label is quite 0 or 1, so that logits stay finite and confidences graded.
LABEL_SMOOTHING = 0.02
VIVIDNESS_WEIGHT = 20.0  # squared errors are small beside cross-entropies
LOG_EVERY = 50  # steps
_TRAINING, _HELD_OUT, _WEIGHTS = range(3)  # second word of each seed: the streams never meet


def _option(help_text: str, default: Any, **rules: Any) -> Any:
  return dataclasses.field(default=default, metadata={"help": help_text, **rules})


@dataclasses.dataclass(frozen=True)
class ScorerConfig:
  """What `launch/train_scorer.py` takes; each field is a flag of the same name."""

  workdir: str = _option("directory for checkpoints, metrics.jsonl and the weights", "")
  seed: int = _option("seed of scenes, weights and noise", 0, least=0)
  steps: int = _option("training steps", 3_000, least=1)
  batch_size: int = _option("scenes a step", 64, least=2)
  learning_rate: float = _option("peak rate of AdamW; warmed up, then a cosine to 0", 3e-3, least=0)
  weight_decay: float = _option("decoupled weight decay", 1e-3, least=0)
  test_scenes: int = _option("held-out scenes measured at the end", 2_000, least=8)
  checkpoint_every: int = _option("steps between checkpoints", 500, least=1)


def loss(params: scorer.Params, images: jax.Array, targets: scorer_data.Targets) -> jax.Array:
  """Mean over B of cross-entropies (objects summed over classes) and the vividness error."""
  logits = scorer.Scorer().apply({"params": params}, images)
  kept = 1 - LABEL_SMOOTHING
  objects = optax.sigmoid_binary_cross_entropy(
    # The floor is per class: 60 of them may not add up to an object.
    logits.objects,
    LABEL_SMOOTHING / 10 + kept * targets.objects,
  ).sum(1)
  skin = optax.sigmoid_binary_cross_entropy(logits.skin, LABEL_SMOOTHING / 2 + kept * targets.skin)
  tones = optax.smooth_labels(jax.nn.one_hot(targets.tones, 4), 2 * LABEL_SMOOTHING)
  tone = targets.tone_weights * optax.softmax_cross_entropy(logits.tones, tones)
  error = targets.vividness_weights * (jax.nn.sigmoid(logits.vividness) - targets.vividness) ** 2
  return jnp.mean(objects + skin + tone + VIVIDNESS_WEIGHT * error)


def init(seed: int) -> scorer.Params:
  """Untrained weights: kernels of variance 1 / fan-in, scales of 1, biases of 0.

  By NumPy, since compiling Flax's initialisers takes as long as hundreds of steps.
  """
  rng = np.random.default_rng((seed, _WEIGHTS))

  def draw(path, leaf):
    if path[-1].key == "kernel":
      array = rng.normal(size=leaf.shape, scale=np.prod(leaf.shape[:-1]) ** -0.5)
    else:
      array = np.full(leaf.shape, path[-1].key == "scale")
    return jnp.asarray(array, jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, scorer.param_shapes())


@functools.cache
def _optimizer(rate: float, steps: int, weight_decay: float) -> optax.GradientTransformation:
  """AdamW with warm-up and cosine decay; cached, so that it is one and the same jit argument."""
  schedule = optax.warmup_cosine_decay_schedule(0.0, rate, min(100, steps // 10), steps)
  adam = optax.adamw(schedule, b2=0.99, weight_decay=weight_decay)
  # One long vector: forty small arrays take longer to compile and to update.
  return optax.flatten(optax.chain(optax.clip_by_global_norm(5.0), adam))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _update(
  optimizer: optax.GradientTransformation,
  state: dict[str, Any],
  batch: scorer_data.Scenes,
  damage: scorer_data.Damage,
) -> tuple[dict[str, Any], jax.Array]:
  """One step on spoiled scenes; returns the new state and the loss before it."""
  images, targets = scorer_data.degrade(batch, damage)
  value, gradient = jax.value_and_grad(loss)(state["params"], images, targets)
  updates, opt = optimizer.update(gradient, state["opt"], state["params"])
  return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, value


def _check(config: ScorerConfig) -> None:
  if not config.workdir:
    raise UserError("--workdir is missing: give a directory for the run's files")
  for field in dataclasses.fields(config):
    value, least = getattr(config, field.name), field.metadata.get("least")
    if least is not None and not value >= least:
      raise UserError(f"--{field.name}={value} is too small: give {least} or more")


def fit(config: ScorerConfig) -> scorer.Params:
  """Trains, or goes on from the newest checkpoint in the working directory.

  Scenes and noise of step n depend on (seed, n) alone: a resumed run equals an uninterrupted one.
  """
  optimizer = _optimizer(config.learning_rate, config.steps, config.weight_decay)
  metrics = Path(config.workdir, "metrics.jsonl")
  with contextlib.closing(Checkpointer(Path(config.workdir, "checkpoints"))) as checkpointer:
    params, first = init(config.seed), 0
    state = {"params": params, "opt": optimizer.init(params)}
    # Placed as a restored state is, or the step would be compiled again after resuming.
    state = jax.device_put(state, jax.local_devices()[0])
    restored = checkpointer.restore(state)
    if restored is not None:
      first, state, _ = restored
      if first > config.steps:
        raise UserError(
          f"{config.workdir} has {first} steps already: give --steps={first} or another --workdir"
        )
    files.keep_before(metrics, first + 1)
    losses = []
    bar = tqdm.tqdm(range(first, config.steps), initial=first, total=config.steps, mininterval=1.0)
    for step in bar:
      rng = np.random.default_rng((config.seed, _TRAINING, step))
      batch = scorer_data.scenes(rng, config.batch_size, wide=True)
      state, value = _update(optimizer, state, batch, scorer_data.damage(rng, config.batch_size))
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
        checkpointer.save(done, state, {})
  return state["params"]


def measure(
  params: scorer.Params, seed: int, n: int, *, degraded: bool = False
) -> dict[str, float]:
  """Accuracy on `n` fresh scenes with the world's own washing and uniform tones.

  Args:
    params: the network's weights.
    seed: of the scenes; they are never those of training.
    n: how many.
    degraded: spoil them as in training; an object counts as there if its label is above 0.5.

  Returns:
    'f1' of objects at confidence 0.5 over all scenes, 'f1_single' and 'f1_pair' over those with one
    object and with two, 'absent' the share of objects not there that are nevertheless found,
    'tone' and 'skin' accuracies, 'vividness_mae', and 'confidence_mae', the mean distance of
    confidence and label where the label is not 0; all in [0, 1].
  """
  rng = np.random.default_rng((seed, _HELD_OUT))
  batch = scorer_data.scenes(rng, n, wide=False)
  if degraded:
    images, targets = jax.jit(scorer_data.degrade)(batch, scorer_data.damage(rng, n))
  else:
    images, targets = scorer_data.clean(batch)
  scores = jax.tree.map(np.asarray, jax.jit(scorer.predict)(params, images))
  labels = np.asarray(targets.objects)
  there, found = labels > 0.5, scores.object_probs > 0.5
  drawn = (batch.objects >= 0).sum(1)

  def f1(rows):
    return float(2 * (there & found)[rows].sum() / (there[rows].sum() + found[rows].sum()))

  def mean(values, weights):
    return float(np.average(values, weights=np.asarray(weights, np.float64)))

  is_tone = np.argmax(scores.tone_probs, 1) == targets.tones
  return {
    "f1": f1(drawn >= 0),
    "f1_single": f1(drawn == 1),
    "f1_pair": f1(drawn == 2),
    "absent": mean(found, labels == 0),
    "tone": mean(is_tone, targets.tone_weights),
    "skin": mean((scores.skin_prob > 0.5) == (targets.skin > 0.5), np.ones(n)),
    "vividness_mae": mean(np.abs(scores.vividness - targets.vividness), targets.vividness_weights),
    "confidence_mae": mean(np.abs(scores.object_probs - labels), labels > 0),
  }


def run(config: ScorerConfig) -> None:
  """Trains (or what is left of it), writes `<workdir>/scorer.safetensors`, prints the accuracy."""
  _check(config)
  params = fit(config)
  path = Path(config.workdir, WEIGHTS_NAME)
  scorer.save(path, params)
  params = scorer.load(path)[1]  # what is measured is what is stored
  report = {
    "clean": measure(params, config.seed, config.test_scenes),
    "degraded": measure(params, config.seed, config.test_scenes, degraded=True),
  }
  files.write_atomic(Path(config.workdir, "accuracy.json"), json.dumps(report, indent=2) + "\n")
  for name, numbers in report.items():
    print(f"held-out, {name}: " + "  ".join(f"{k} {v:.4f}" for k, v in numbers.items()))
  print(f"wrote {path}; the package ships it as {scorer.WEIGHTS_FILE.name}")
