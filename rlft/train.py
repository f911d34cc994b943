"""Fine-tunes a diffusion model on rewards (Algorithm 1 of arXiv 2401.12244). Read this file first.

An iteration, for each task in turn:
    draw      images of prompts, with what the algorithm learns from
    score     them: JAX rewards, or host functions on each process's own images
    learn     from the scores: by default one clipped policy-gradient step for each of K randomly
              drawn timesteps (rlft/algorithms/policy_gradient.py)
then one step on the pretraining loss, which keeps the pictures good.

Everything random is a pure function of (seed, iteration, task), so a run that was stopped goes on
bit for bit from its last checkpoint, on any number of devices up to the order of float32 sums.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import time

import jax
import numpy as np

from rlft.algorithms.base import Batch, Numbers
from rlft.config import stored
from rlft.config.settings import Config
from rlft.data import sources
from rlft.data.pairs import ImageError, pair_indices
from rlft.diffusion.sampler import image_keys
from rlft.evaluation import results, summary
from rlft.parallel import compiled, cpu, processes, sharding
from rlft.parallel.join import announced
from rlft.report import iteration as iteration_metrics
from rlft.report.metrics import Progress
from rlft.report.run_files import CONFIG_FILE
from rlft.report.usage import Usage
from rlft.rewards.scoring.errors import RewardError
from rlft.run import checks, output
from rlft.run.evaluation import evaluate_run, is_due
from rlft.run.open import Run, Task, open_run
from rlft.run.preemption import Stop, Stopped
from rlft.run.resume import Cursor, resume, save
from rlft.run.scored import check_scores
from rlft.run.unsettled import Unsettled
from rlft.storage import files
from rlft.types import Drawn, Moment, Prompt, Slope, TrainState, UserError


def train(config: Config) -> None:
  """Runs (or resumes) a training; everything that it writes is in `config.output.workdir`.

  Raises:
    UserError: a mistake in the settings, a reward that failed, a full disk. The last consistent
      state is on disk then, and the same command goes on from it.
  """
  start = time.monotonic()
  cpu.split_host(config.devices.cpu_devices)
  compiled.keep(config.devices.compilation_cache)
  config = checks.with_rank(config)
  run = open_run(config)
  with Stop() as stop, contextlib.closing(run), announced():  # Until nothing is left to be saved.
    state, cursor = resume(run, run.initial_state())
    with processes.together():
      if run.writes:
        files.write_atomic(run.workdir / CONFIG_FILE, stored.to_json(config) + "\n")
    _loop(run, state, cursor, stop, start)


# ---------------------------------------------------------------------------- the loop


def _loop(run: Run, state: TrainState, cursor: Cursor, stop: Stop, start: float) -> None:
  """Iterations, checkpoints and evaluations, until the end or until told to stop.

  What keeps every end of the process harmless:
    - `state` and `cursor` belong together where Stopped, RewardError or ImageError may be raised:
      neither changes before the result of a unit of work (a task, the pretraining step) is there.
    - Order between two iterations: metrics, checkpoint, evaluation. What a crash loses is done
      again, and what was written twice is dropped when the run resumes.
    - The numbers of a unit, and what they are checked for, are waited for while the devices do the
      next one, also of the next iteration, but before anything of that is used and before the state
      is saved.
    - An evaluation, which takes long and calls what users wrote, begins when the state that it
      measures is on disk.
  """
  config, programs = run.config, run.programs
  images, unsettled = sum(task.config.batch_size for task in run.tasks), Unsettled()
  with contextlib.ExitStack() as stack:
    with processes.together():
      if run.writes:
        stack.enter_context(Usage(run.workdir, since=start))
        writer = stack.enter_context(output.open_writer(run, cursor.iteration))
        progress = stack.enter_context(Progress(config.iterations, cursor.iteration))

    def record(iteration, found):
      metrics = iteration_metrics.summarise(found, images)
      metrics |= {
        "learning_rate": config.optimizer.learning_rate,
        "images_seen": images * (iteration + 1),
      }
      checks.warn(config, metrics, iteration)
      with processes.together():
        if run.writes:
          writer.write(iteration, metrics)
          progress.update(metrics)

    try:
      while True:
        iteration, between = cursor.iteration, cursor.task == 0
        last = iteration >= config.iterations
        measured = between and not cursor.evaluated and is_due(config, iteration)
        every = config.output.checkpoint_every
        if between and iteration and (last or measured or (every and iteration % every == 0)):
          unsettled.settle()
          save(run, state, cursor)
        if measured:
          run.checkpointer.wait()
          evaluate_run(run, programs.averaged_weights(state, run.frozen), iteration, stop)
          cursor.evaluated = True
          with processes.together():
            if run.writes:
              writer.write_evaluation(iteration)
          if run.writes:
            for line in summary.lines(results.read_history(run.workdir)):
              progress.say(line)
        if last:
          break
        while cursor.task < len(run.tasks):
          stop.check()
          state, numbers = run_task(run, state, cursor.task, iteration, stop, unsettled.settle)
          unsettled.put(numbers, cursor.metrics)
          cursor.task += 1
        stop.check()
        if run.pairs is not None:
          state, numbers = run_pretrain(run, state, iteration, unsettled.settle)
          unsettled.put(numbers, cursor.metrics)
        if config.optimizer.ema_decay:
          state = programs.average(state)
        unsettled.then(functools.partial(record, iteration, cursor.metrics))
        cursor = Cursor(iteration + 1)
    except (RewardError, ImageError, Stopped) as reason:
      unsettled.settle()
      save(run, state, cursor)
      run.checkpointer.wait()
      if not isinstance(reason, Stopped):
        raise
      if run.writes:
        where = f"stopped in iteration {cursor.iteration}"
        progress.say(f"{where}; the same command goes on from here")
      return
  if run.writes:
    output.write_report(run)


# ---------------------------------------------------------------------------- units of work


def run_task(
  run: Run,
  state: TrainState,
  number: int,
  iteration: int,
  stop: Stop,
  settle: Callable[[], bool] = lambda: False,
) -> tuple[TrainState, Numbers]:
  """Draws, scores and learns for one task.

  Nothing changes before the scores are there: a reward that fails, or a request to stop, leaves the
  state as it was, and the task can be done again from its start. Once learning has begun that state
  is gone, and it is finished.

  Args:
    run: the run.
    state: donated once learning begins.
    number: the task's place in `run.tasks`.
    iteration: from 0.
    stop: asked while images and rewards are waited for, and after each of both.
    settle: called when the devices have been given the images to draw; says whether it waited for
      something that they did before.

  Returns:
    The new state, and what waits for the task's metrics and checks them.

  Raises:
    RewardError: the task's reward failed, also while learning; nothing has changed.
    Stopped: the run was told to stop; nothing has changed.
  """
  task, moment = run.tasks[number], Moment(run.config.seed, iteration, number)
  name, where = task.config.name, f"task {task.config.name}, iteration {iteration}"
  start = time.perf_counter()
  prompts, drawn = draw(run, state, task, moment)
  start = time.perf_counter() if settle() else start
  stop.wait_for(drawn.images)
  seen = time.perf_counter()
  stop.check()
  with stop.at_once(), _named(where):
    scored = task.scorer.score(drawn.images, prompts)
  compared = run.programs.algorithm.compared(task.config.images_per_prompt)
  metrics = iteration_metrics.of_task(name, scored, sharding.fetch, group=compared)
  judged = time.perf_counter()
  check_scores(run.config, task.config, metrics, iteration)
  stop.check()
  batch = Batch(
    prompts,
    task.config.images_per_prompt,
    drawn,
    scored.scores.values,
    moment,
    slope=functools.partial(slope, run, task, prompts),
  )

  def numbers():
    with _named(where):
      learnt = fetch()
    _check_finite(where, learnt["grad_norm"])
    return (
      metrics
      | {f"{key}/{name}": value for key, value in learnt.items()}
      | {
        f"time/sample_s/{name}": seen - start,
        f"time/reward_s/{name}": judged - seen,
        f"time/update_s/{name}": time.perf_counter() - judged,
      }
    )

  with _named(where):
    state, fetch = run.programs.learning.learn(state, run.frozen, batch, task.memory)
  return state, numbers


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
  """Puts the place before the message of a UserError."""
  try:
    yield
  except UserError as error:
    raise type(error)(f"{where}: {error}") from error


def draw(run: Run, state: TrainState, task: Task, moment: Moment) -> tuple[list[Prompt], Drawn]:
  """Draws a task's images of an iteration: the prompts of the B images, and the images."""
  group, size = task.config.images_per_prompt, task.config.batch_size
  prompts = sources.drawn(
    task.prompts, moment.seed, moment.task, moment.iteration, count=size // group
  )
  drawn = run.programs.sampler.draw(
    run.programs.drawing_weights(state, run.frozen),
    run.model.tokenize([prompt.text for prompt in prompts])[0],
    image_keys(moment.key(), 0, size),
  )
  return [prompt for prompt in prompts for _ in range(group)], drawn


def slope(run: Run, task: Task, prompts: Sequence[Prompt], latents: jax.Array) -> Slope:
  """Scores final latents `[B, h, w, C]` of a task's prompts, with their gradient.

  Raises:
    RewardError: the task's reward failed.
  """
  decoder, vae = run.programs.decoder, run.frozen["vae"]
  found = task.scorer.slope(decoder.decode(vae, latents), prompts)
  return dataclasses.replace(found, gradient=decoder.pull(vae, latents, found.gradient))


def run_pretrain(
  run: Run, state: TrainState, iteration: int, settle: Callable[[], bool]
) -> tuple[TrainState, Numbers]:
  """One step on the pretraining loss; `state` is donated once the images are read.

  `settle` is called before the step, when the images are read; else as of `run_task`.

  Raises:
    ImageError: one cannot be read; nothing has changed.
  """
  start, moment = time.perf_counter(), Moment(run.config.seed, iteration, len(run.tasks))
  count = run.config.pretraining.pretrain_batch_size
  rows = pair_indices(moment.seed, iteration, count=count, size=len(run.pairs))
  own = sharding.own_rows(run.rows, count)
  with processes.together(ImageError):
    read = run.pairs.read(rows[own])
  ids, _ = run.model.tokenize([run.pairs.captions[row] for row in rows[own]])
  batch = [sharding.put_own(x, own, count, run.rows) for x in (*read, ids)]
  start = time.perf_counter() if settle() else start
  state, metrics = run.programs.pretrain(state, run.frozen, *batch, moment.key())

  def numbers():
    found = {name: float(value) for name, value in jax.device_get(metrics).items()}
    _check_finite(f"pretraining step, iteration {iteration}", found["loss/pretrain"])
    return found | {"time/update_s/pretrain": time.perf_counter() - start}

  return state, numbers


def _check_finite(where: str, value: float) -> None:
  if not np.isfinite(value):
    raise UserError(
      f"{where}: the gradient or loss is not finite; lower --learning_rate and run the same"
      " command to go on from the last checkpoint"
    )
