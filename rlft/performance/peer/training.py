"""Trains the peer as a run of ours is trained, and goes on after any stop.

Its directory holds the files that ours does: `eval_history.jsonl`, and in `metrics.jsonl` the
seconds of each epoch. The newest state is in `state-N/` after N epochs, complete once it has that
name; lines of epochs that it does not know are dropped, and done again.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import pathlib
import shutil
import time
from typing import Any

import jax
import numpy as np

from rlft import catalog
from rlft.config.settings import Config
from rlft.data import sources
from rlft.evaluation import results
from rlft.evaluation.results import EvalResult
from rlft.models.files import pretrained
from rlft.parallel import sharding
from rlft.performance.peer.process import Peer
from rlft.report.metrics import METRICS_FILE, Progress
from rlft.rewards.scoring.scorer import Scorer
from rlft.storage import files
from rlft.types import Prompt, UserError

FAILED = "failed.txt"  # why a training cannot go on

# (what the worker is told) -> the process.
Start = Callable[[Mapping[str, Any]], Peer]
# (directory with `unet/`) -> the evaluations of the run.
Measure = Callable[[pathlib.Path], Mapping[str, EvalResult]]
# (images [B, H, W, 3] float32, their prompts) -> rewards [B].
Score = Callable[[np.ndarray, list[Prompt]], np.ndarray]


class Diverged(Exception):
  """What the peer has learnt draws no images, or none that can be scored."""


def train(
  config: Config,
  options: Mapping[str, Any],
  workdir: pathlib.Path,
  *,
  start: Start,
  measure: Measure,
  score: Score,
  cores: int,
  say: Callable[[str], None],
) -> str:
  """Trains until the end, unless that is done.

  Args:
    config: of a run of ours with one task, whose model, prompts, noise of evaluations and numbers
      of images it takes.
    options: of TRL's DDPOConfig.
    workdir: its own directory.
    start: starts the process.
    measure: evaluates what it saves.
    score: the reward.
    cores: that it may use.
    say: takes a line about where it begins.

  Returns:
    '' if the training is done, else why it failed: it diverged.
  """
  if (workdir / FAILED).exists():
    return (workdir / FAILED).read_text()
  done = _newest(workdir)
  if done == config.iterations and results.resume_history(workdir, done):
    return ""
  evaluated = results.resume_history(workdir, done)
  files.keep_before(workdir / METRICS_FILE, done)
  workdir.mkdir(parents=True, exist_ok=True)
  if done:
    say(f"{workdir}: TRL goes on after epoch {done} of {config.iterations}")
  else:
    say(f"{workdir}: TRL begins, {config.iterations} epochs")
  prompts = catalog.load_prompts(config.task[0].prompts)
  lines = files.Lines(workdir / METRICS_FILE)
  with start(_work(config, options, workdir, done, cores)) as peer:
    if not done:
      _save(peer, workdir, 0)
    with Progress(config.iterations, done) as progress:
      try:
        for epoch in range(done, config.iterations + 1):
          every = config.evaluation.eval_every
          if not evaluated and (epoch == config.iterations or not (every and epoch % every)):
            results.append_history(workdir, epoch, measure(_state(workdir, epoch)))
          evaluated = False
          if epoch == config.iterations:
            break
          metrics = _epoch(peer, config, drawn(config, prompts, epoch), score)
          lines.add(json.dumps({"iteration": epoch, **metrics}))
          _save(peer, workdir, epoch + 1)
          progress.update(metrics)
      except Diverged as error:
        why = f"epoch {epoch}: {error}"
        files.write_atomic(workdir / FAILED, why)
        return why
      finally:
        lines.close()
  return ""


def drawn(config: Config, prompts: Sequence[Prompt], iteration: int) -> list[Prompt]:
  """The prompts of the B images that a run of ours draws in an iteration."""
  task = config.task[0]
  group = task.images_per_prompt
  chosen = sources.drawn(prompts, config.seed, 0, iteration, count=task.batch_size // group)
  return [prompt for prompt in chosen for _ in range(group)]


def scorer(config: Config) -> Score:
  """Applies the task's reward, as a run of ours does.

  Raises:
    UserError: there is no such reward.
  """
  task, rows = config.task[0], sharding.batch(sharding.make_mesh())
  apply = Scorer(
    catalog.make_reward(task.reward),
    batch_size=task.batch_size,
    images_per_prompt=task.images_per_prompt,
    batch_sharding=rows,
    timeout_s=config.scoring.reward_timeout_s,
    threads=config.scoring.reward_threads,
  )

  def score(images: np.ndarray, prompts: list[Prompt]) -> np.ndarray:
    return np.asarray(jax.device_get(apply.score(sharding.put(images, rows), prompts).values))

  return score


def _epoch(
  peer: Peer, config: Config, prompts: list[Prompt], score: Score
) -> dict[str, float | None]:
  """One epoch and its seconds, those of the reward and of sending images among them."""
  name = config.task[0].name
  rewards = np.zeros(0, np.float32)

  def checked(images: np.ndarray) -> np.ndarray:
    nonlocal rewards
    if not np.isfinite(images).all():
      raise Diverged("the images are not finite")
    rewards = score(images, prompts)
    if not np.isfinite(rewards).all():
      # Its statistics leave no image out.
      raise Diverged("an image could not be scored")
    return rewards

  begin = time.perf_counter()
  peer.epoch([prompt.text for prompt in prompts], checked)
  seconds = time.perf_counter() - begin
  return {
    f"reward/{name}/mean": float(rewards.mean()),
    "time/iteration_s": seconds,
    "images_per_second": len(prompts) / seconds,
  }


def _work(
  config: Config, options: Mapping[str, Any], workdir: pathlib.Path, done: int, cores: int
) -> dict[str, Any]:
  """What the worker is told.

  Raises:
    UserError: TRL cannot train in this way.
  """
  policy = config.policy
  if len(config.task) != 1 or policy.lora_rank:
    raise UserError("TRL is compared on one task and the whole network: give one --task, no LoRA")
  if policy.guidance_scale <= 1:
    # Its pipeline then still gives the network the empty prompts, for twice as many images.
    raise UserError("TRL samples with guidance only: give --guidance_scale above 1")
  return {
    "model": str(pretrained.find(config.pretrained)),
    "scratch": str(workdir.absolute() / "scratch"),
    "resume": str(_state(workdir, done).absolute()) if done else "",
    "seed": config.seed,
    "batch_size": config.task[0].batch_size,
    "sampling_steps": policy.sampling_steps,
    "guidance_scale": policy.guidance_scale,
    "eta": policy.eta,
    "cores": cores,
    "options": dict(options),
  }


def _state(workdir: pathlib.Path, epochs: int) -> pathlib.Path:
  return workdir / f"state-{epochs:05}"


def _newest(workdir: pathlib.Path) -> int:
  """After how many epochs the newest state was saved; 0 if there is none."""
  found = [path.name.removeprefix("state-") for path in workdir.glob("state-*")]
  return max((int(name) for name in found if name.isdigit()), default=0)


def newest_state(workdir: pathlib.Path) -> pathlib.Path:
  """The directory with the newest `unet/`."""
  return _state(workdir, _newest(workdir))


def _save(peer: Peer, workdir: pathlib.Path, epochs: int) -> None:
  """Saves a state, and removes older ones once it is there."""
  place = _state(workdir, epochs)
  part = place.with_name(f"{place.name}.part")
  for leftover in (part, place):  # of a process that was killed
    shutil.rmtree(leftover, ignore_errors=True)
  peer.save(part.absolute())
  part.rename(place)
  for path in workdir.glob("state-*"):
    if path != place:
      shutil.rmtree(path)
