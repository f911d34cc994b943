"""THE file: fine-tuning a diffusion model by policy gradient (Algorithm 1 of arXiv 2401.12244).

An iteration, for each task in turn:
    sample    images with their trajectories and log-probabilities, under the current parameters
    score     them: a JAX reward, or host functions on each process's own images
    normalise the rewards to advantages, over the whole batch of the task
    update    one clipped policy-gradient step for each of K randomly drawn timesteps
then one step on the pretraining loss, which keeps the pictures good.

Everything random is a pure function of (seed, iteration, task), so a run that was stopped goes on
bit for bit from its last checkpoint, on any number of devices up to the order of float32 sums.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import logging
import os
import shlex
import sys
import time

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import optax

from rlft.algorithms import losses
from rlft.algorithms.optimizer import full_precision
from rlft.config import stored
from rlft.config.settings import Config
from rlft.data import pairs as pairs_lib
from rlft.data import shuffle as order
from rlft.diffusion import ddim, rollout
from rlft.diffusion import sampler as sampler_lib
from rlft.evaluation import results, summary
from rlft.models import lora as lora_lib
from rlft.models import stable_diffusion
from rlft.models import text as text_lib
from rlft.models.precision import cast
from rlft.models.stable_diffusion import StableDiffusion
from rlft.parallel import cpu, gradients, sharding
from rlft.parallel import microbatch as microbatch_lib
from rlft.report import iteration as iteration_metrics
from rlft.report import page as report
from rlft.report.metrics import MetricsWriter, Progress
from rlft.rewards.scoring import statistics
from rlft.rewards.scoring.scorer import RewardError
from rlft.run import checks
from rlft.run.open import Run, measure, open_run
from rlft.run.preemption import Stop, Stopped
from rlft.run.scored import check_scores
from rlft.run.state import TrainState, initial_state, optimizer_of, sampling_weights
from rlft.storage import files
from rlft.types import Denoiser, UserError

_log = logging.getLogger(__name__)

_TIMESTEP_STREAM = 2**16  # streams below are the tasks' prompts


# ---------------------------------------------------------------------------- programs


@dataclasses.dataclass(frozen=True)
class Programs:
  """The jitted programs of a run; each is compiled once for each batch shape."""

  advantages: Callable[..., jax.Array]
  update: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
  pretrain: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
  average: Callable[[TrainState], TrainState]


def make_programs(
  config: Config,
  model: StableDiffusion,
  schedule: ddim.Schedule,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
) -> Programs:
  """Builds the pure functions of an iteration and jits them over the mesh.

  `frozen` is {'vae', 'text_encoder', ...}, and 'unet' (the base model) where LoRA or the KL
  divergence needs it.
  """
  alphas = jnp.asarray(ddim.alphas_cumprod(model.scheduler), jnp.float32)
  lora_scale = lora_lib.scale(config.policy.lora_rank, config.policy.lora_alpha)

  def denoiser(weights) -> Denoiser:
    return lora_lib.denoiser(model.unet, weights, lora_scale)

  def step_errors(whole, base, rows, index):
    """Of each image's step: the policy's log-ratio, and its divergence from the base."""
    before, after, old_log_prob, text = rows

    def step(weights):
      return rollout.policy_log_prob(
        denoiser(weights),
        schedule,
        index,
        before,
        after,
        text,
        guidance_scale=config.policy.guidance_scale,
        prepare=functools.partial(lora_lib.prepare, model.unet, weights, lora_scale),
      )

    log_prob, mean = step(weights_of(whole, base))
    found = {"log_ratio": log_prob - old_log_prob}
    if config.algorithm.kl_weight:
      _, base_mean = step(lora_lib.Weights(base))
      std = jnp.asarray(schedule.std)[index]
      found["kl"] = losses.gaussian_kl(mean, base_mean, std)
    return found

  def weights_of(trained, base):
    return lora_lib.Weights(base, trained) if config.policy.lora_rank else lora_lib.Weights(trained)

  def gradient_of(loss, state, frozen, rows):
    return gradients.over_devices(
      loss,
      state.params,
      frozen.get("unet", {}),
      rows,
      mesh=mesh,
      cast=cast,
      dtype=model.unet.dtype,
      microbatch=config.devices.microbatch,
    )

  def policy_gradient(state, frozen, path, text, advantages, mask, indices):
    """Of J of the paper at `[K]` timesteps, plus the KL divergence to the base model."""
    count, images = len(indices), len(mask) // mesh.size

    def loss(whole, base, part):
      index, step, advantages, weights = part
      # One number for all images of a timestep, as in sampling: XLA rounds the same then.
      found = step_errors(whole, base, step, index if len(index) > images else index[0])
      values = losses.clipped_surrogate(
        found["log_ratio"], advantages, clip_range=config.algorithm.clip_range
      )
      if config.algorithm.kl_weight:
        values += config.algorithm.kl_weight * found["kl"]
      return losses.weighted_sum(values, weights), found

    # Whatever belongs to an image belongs to each of its timesteps: all is [K, B, ...].
    text, advantages, weights = jax.tree.map(
      lambda x: jnp.broadcast_to(x, (count, *x.shape)),
      (text, advantages, losses.mean_weights(mask) / count),
    )
    index = jnp.broadcast_to(indices[:, None], weights.shape)
    path = (path.latents[indices], path.latents[indices + 1], path.log_probs[indices])
    rows = (index, (*path, text), advantages, weights)
    gradient, found = gradient_of(loss, state, frozen, rows)
    # Images first: they are what is spread over the devices, and stay where they are.
    found, weights = jax.tree.map(lambda x: x.T.ravel(), (found, weights))
    metrics = losses.ratio_metrics(
      found["log_ratio"], weights, clip_range=config.algorithm.clip_range
    )
    if config.algorithm.kl_weight:
      metrics["kl_to_base"] = losses.weighted_sum(found["kl"], weights)
    return gradient, metrics | {"grad_norm": optax.tree.norm(gradient)}

  def step(state, gradient):
    updates, opt = optimizer.update(gradient, state.opt, state.params)
    return dataclasses.replace(state, params=optax.apply_updates(state.params, updates), opt=opt)

  def update(state, *batch):
    """One optimizer step on some timesteps."""
    change, metrics = policy_gradient(state, *batch)
    return step(state, change), metrics

  def pretrain(state, frozen, images, sources, ids, key):
    """One optimizer step on beta * L_pre."""
    count, shape = len(images), stable_diffusion.latent_shape(model)
    timesteps, noise = losses.denoising_noise(key, (count, *shape), len(alphas))

    def loss(whole, base, part):
      return weigh(
        losses.denoising_error(
          denoiser(weights_of(whole, base)), alphas, schedule.prediction_type, *part
        )
      )

    def weigh(errors):
      return config.pretraining.pretrain_weight * errors.sum() / count, errors

    latents, text = encode_pairs(frozen, images, sources, ids)
    rows = jax.tree.map(lambda x: x[None], (latents, text, timesteps, noise))
    gradient, errors = gradient_of(loss, state, frozen, rows)
    return step(state, gradient), {"loss/pretrain": errors.mean()}

  def encode_pairs(frozen, images, sources, ids):
    """What the UNet sees of the pairs: latents and captions."""
    names = [name for name in frozen if name != "unet"]
    where = sharding.specs(mesh, {name: frozen[name] for name in names})

    def local(frozen, images, sources, ids):
      frozen = sharding.gather(frozen, where)
      text = text_lib.encode(model, frozen, ids, stable_diffusion.image_size(model), sources)
      encode = functools.partial(stable_diffusion.encode, model, frozen["vae"])
      images = images.astype(jnp.float32) / 255.0
      return microbatch_lib.mapped(encode, images, config.devices.decode_chunk), text

    return sharding.on_each(
      mesh,
      local,
      in_specs=(where, sharding.ROWS, sharding.ROWS, sharding.ROWS),
      out_specs=(sharding.ROWS, sharding.ROWS),
    )({name: frozen[name] for name in names}, images, sources, ids)

  def average(state):
    def mix(e, p):
      return config.optimizer.ema_decay * e + (1 - config.optimizer.ema_decay) * p

    params = full_precision(state.params, state.opt)
    return dataclasses.replace(state, ema=jax.tree.map(mix, state.ema, params))

  return Programs(
    advantages=sharding.jit(
      lambda rewards, group: statistics.normalise(
        rewards, clip=config.algorithm.advantage_clip, group_size=group
      ),
      static_argnums=1,
      out_shardings=sharding.batch(mesh),
    ),
    update=sharding.jit(update, donate_argnums=0),
    pretrain=sharding.jit(pretrain, donate_argnums=0),
    average=sharding.jit(average, donate_argnums=0),
  )


# ---------------------------------------------------------------------------- an iteration


def run_task(
  run: Run, programs: Programs, state: TrainState, number: int, iteration: int, stop: Stop
) -> tuple[TrainState, dict[str, float]]:
  """Samples, scores and updates for one task.

  Nothing changes before the scores are there: a reward that fails, or a request to stop, leaves the
  state as it was, and the task can be done again from its start. Once the updates have begun that
  state is gone, and they are finished.

  Args:
    run: the run.
    programs: of the run.
    state: donated once the updates begin.
    number: the task's place in `run.tasks`.
    iteration: from 0.
    stop: asked before scoring, while a reward is waited for, and after it.

  Returns:
    The new state and the task's metrics.

  Raises:
    RewardError: the task's reward failed; nothing has changed.
    Stopped: the run was told to stop; nothing has changed.
  """
  config, task = run.config, run.tasks[number]
  name, group, size = task.config.name, task.config.images_per_prompt, task.config.batch_size

  # --- sample ---
  start = time.perf_counter()
  rows = order.batch_indices(
    config.seed, number, iteration, count=size // group, size=len(task.prompts)
  )
  drawn = [task.prompts[row] for row in rows.tolist()]
  prompts = [prompt for prompt in drawn for _ in range(group)]
  path, images, text = run.sampler.rollout(
    sampling_weights(config, state.params, run.frozen),
    run.model.tokenize([prompt.text for prompt in drawn])[0],
    sampler_lib.image_keys(_key(config.seed, iteration, number), 0, size),
  )
  jax.block_until_ready(images)
  sampled = time.perf_counter()

  # --- score ---
  stop.check()
  with stop.at_once():
    found = task.scorer.score(images, prompts)
  compared = group if config.algorithm.advantage == "group" else None
  metrics = iteration_metrics.of_task(name, found, sharding.fetch, group=compared)
  scores = found.scores.values
  scored = time.perf_counter()
  check_scores(config, task.config, metrics, iteration)
  stop.check()

  # --- normalise ---
  if task.history is not None:
    texts = [prompt.text for prompt in prompts]
    rewards = sharding.fetch(scores).tolist()
    values = task.history.advantages(texts, rewards, clip=config.algorithm.advantage_clip)
    advantages = sharding.put(np.asarray(values, np.float32), run.rows)
  else:
    advantages = programs.advantages(scores, compared)

  # --- update ---
  picked = run.schedule.trainable[
    order.subset(
      config.seed,
      _TIMESTEP_STREAM + number,
      iteration,
      count=config.algorithm.train_timesteps,
      size=len(run.schedule.trainable),
    )
  ].astype(np.int32)
  updates = []
  for indices in [picked] if config.algorithm.accumulate_timesteps else picked[:, None]:
    state, values = programs.update(
      state, run.frozen, path, text, advantages, jnp.isfinite(scores), indices
    )
    updates.append(values)
  metrics |= iteration_metrics.of_updates(name, jax.device_get(updates))
  metrics |= {
    f"time/sample_s/{name}": sampled - start,
    f"time/reward_s/{name}": scored - sampled,
    f"time/update_s/{name}": time.perf_counter() - scored,
  }
  where = f"task {name}, iteration {iteration}"
  deviation = metrics[f"ratio/max_abs_deviation/{name}"]
  if not deviation <= config.algorithm.ratio_tolerance:
    raise UserError(
      f"{where}: the ratio before the first update deviates from 1 by {deviation:.2e}, more than"
      f" --ratio_tolerance={config.algorithm.ratio_tolerance:g}: sampling and training disagree;"
      " use --compute_dtype=float32, or raise the tolerance knowingly"
    )
  _check_finite(where, metrics[f"grad_norm/{name}"])
  return state, metrics


def run_pretrain(
  run: Run, programs: Programs, state: TrainState, iteration: int
) -> tuple[TrainState, dict[str, float]]:
  """One step on the pretraining loss; `state` is donated."""
  config, start = run.config, time.perf_counter()
  rows = pairs_lib.pair_indices(
    config.seed, iteration, count=config.pretraining.pretrain_batch_size, size=len(run.pairs)
  )
  captions = [run.pairs.captions[row] for row in rows]
  ids, _ = run.model.tokenize(captions)
  images, sources = run.pairs.read(rows)
  state, metrics = programs.pretrain(
    state,
    run.frozen,
    sharding.put(images, run.rows),
    sharding.put(sources, run.rows),
    sharding.put(ids, run.rows),
    _key(config.seed, iteration, len(run.tasks)),
  )
  metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
  _check_finite(f"pretraining step, iteration {iteration}", metrics["loss/pretrain"])
  return state, metrics | {"time/update_s/pretrain": time.perf_counter() - start}


def _key(seed: int, iteration: int, number: int) -> jax.Array:
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), iteration), number)


def _check_finite(where: str, value: float) -> None:
  if not np.isfinite(value):
    raise UserError(
      f"{where}: the gradient or loss is not finite; lower --learning_rate and run the same"
      " command to go on from the last checkpoint"
    )


# ---------------------------------------------------------------------------- the loop


@dataclasses.dataclass
class Cursor:
  """Where a run stands between two units of work (a task, or the pretraining step).

  Attributes:
    iteration: being done, from 0.
    task: next task of the iteration; the number of tasks stands for the pretraining step.
    metrics: of this iteration so far.
    evaluated: whether the evaluation that is due before this iteration has been done.
  """

  iteration: int = 0
  task: int = 0
  metrics: dict[str, float] = dataclasses.field(default_factory=dict)
  evaluated: bool = False


def train(config: Config) -> None:
  """Runs (or resumes) a training; everything that it writes is in `config.output.workdir`.

  Raises:
    UserError: a mistake in the settings, a reward that failed, a full disk. The last consistent
      state is on disk then, and the same command goes on from it.
  """
  cpu.split_host(config.devices.cpu_devices)
  config = checks.with_rank(config)
  run = open_run(config)
  optimizer = optimizer_of(config)
  programs = make_programs(config, run.model, run.schedule, optimizer, run.mesh)
  state, cursor = _resume(run, initial_state(run, optimizer))
  if run.writes:
    files.write_atomic(run.workdir / "config.json", stored.to_json(config) + "\n")
  with Stop() as stop:  # Until nothing is left to be saved.
    try:
      _loop(run, programs, state, cursor, stop)
    finally:
      run.close()


def _loop(run: Run, programs: Programs, state: TrainState, cursor: Cursor, stop: Stop) -> None:
  """Iterations, checkpoints and evaluations, until the end or until told to stop.

  What keeps every end of the process harmless:
    - `state` and `cursor` belong together whenever RewardError or Stopped may be raised: neither
      changes before the result of a unit of work (a task, the pretraining step) is there.
    - Order between two iterations: metrics, checkpoint, evaluation. What a crash loses is done
      again, and what was written twice is dropped when the run resumes.
    - An evaluation, which takes long and calls what users wrote, begins when the state that it
      measures is on disk.
  """
  config = run.config
  images = sum(task.config.batch_size for task in run.tasks)
  writing = run.writes
  with contextlib.ExitStack() as stack:
    if writing:
      writer = stack.enter_context(MetricsWriter(run.workdir, first_iteration=cursor.iteration))
      progress = stack.enter_context(Progress(config.iterations, cursor.iteration))
    try:
      while True:
        iteration = cursor.iteration
        last = iteration >= config.iterations
        measured = _evaluation_due(run, cursor)
        due = config.output.checkpoint_every and iteration % config.output.checkpoint_every == 0
        if cursor.task == 0 and iteration > 0 and (last or due or measured):
          _save(run, state, cursor)
        if measured:
          run.checkpointer.wait()
          weights = sampling_weights(config, state.averaged, run.frozen)
          measure(run, weights, iteration, stop)
          cursor.evaluated = True
          if writing:
            for line in summary.lines(results.read_history(run.workdir)):
              progress.say(line)
        if last:
          break
        while cursor.task < len(run.tasks):
          stop.check()
          state, metrics = run_task(run, programs, state, cursor.task, iteration, stop)
          cursor.metrics |= metrics
          cursor.task += 1
        stop.check()
        if run.pairs is not None:
          state, metrics = run_pretrain(run, programs, state, iteration)
          cursor.metrics |= metrics
        if config.optimizer.ema_decay:
          state = programs.average(state)
        metrics = iteration_metrics.summarise(cursor.metrics, images)
        cursor = Cursor(iteration + 1)
        if writing:
          writer.write(iteration, metrics)
          progress.update(metrics)
    except (RewardError, Stopped) as reason:
      _save(run, state, cursor)
      run.checkpointer.wait()
      if not isinstance(reason, Stopped):
        raise
      if writing:
        where = f"stopped in iteration {cursor.iteration}"
        progress.say(f"{where}; the same command goes on from here")
      return
  if writing:
    _report(run)


def _evaluation_due(run: Run, cursor: Cursor) -> bool:
  """Before the first iteration, after the last, and every `eval_every`."""
  if not run.evals or cursor.evaluated or cursor.task > 0:
    return False
  every = run.config.evaluation.eval_every
  return cursor.iteration in (0, run.config.iterations) or bool(
    every and cursor.iteration % every == 0
  )


def _save(run: Run, state: TrainState, cursor: Cursor) -> None:
  """Starts an asynchronous save."""
  run.checkpointer.save(
    cursor.iteration,
    state,
    {
      "cursor": dataclasses.asdict(cursor),
      "config": stored.to_json(run.config),
      "base_model": run.fingerprint,
      "started_in": os.getcwd(),  # Paths of prompts may be relative.
      "histories": [task.history.state() if task.history else None for task in run.tasks],
    },
    task=cursor.task,
  )


def _resume(run: Run, state: TrainState) -> tuple[TrainState, Cursor]:
  """The newest checkpoint's state and place; the given state and the start if there is none.

  Raises:
    UserError: the checkpoint belongs to another base model or to other settings.
  """
  changes = []

  def check(meta):
    if meta["base_model"] != run.fingerprint:
      raise UserError(
        f"the checkpoint in {run.workdir} was trained from another base model than"
        f" {run.config.pretrained}: give that model, or a new --workdir"
      )
    changes[:] = stored.check_resume(stored.from_json(meta["config"]), run.config)

  restored = run.checkpointer.restore(state, check)
  if restored is None:
    return state, Cursor()
  _, state, meta = restored
  for change in changes:
    _log.warning("resuming with a changed setting: %s", change)
  for task, history in zip(run.tasks, meta["histories"], strict=True):
    if task.history is not None:
      task.history.restore(history)
  cursor = Cursor(**meta["cursor"])
  # The checkpoint may be older than the evaluation that followed it.
  cursor.evaluated = _agreed(run.writes and results.resume_history(run.workdir, cursor.iteration))
  _log.warning("resuming %s at iteration %d", run.workdir, cursor.iteration)
  return state, cursor


def _agreed(value: bool) -> bool:
  """What the process that writes says, on every process."""
  return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def _report(run: Run) -> None:
  """Writes what a user looks at when the run has ended."""
  history = results.read_history(run.workdir)
  if history:
    before, after = history[0][1], history[-1][1]
    results.write_eval_json(run.workdir, before, after, history, stored.to_dict(run.config))
    print(summary.table(before, after))
  page = report.write_report(
    run.workdir,
    command=shlex.join(["python", *sys.argv]),
    lower_is_better=[
      one.name for task in run.tasks if (one := task.scorer.judge) and one.lower_is_better
    ],
  )
  print(f"report: {page}")
