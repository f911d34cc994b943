"""An iteration of TRL's DDPOTrainer, in a Python of its own: its packages exclude ours.

The process loads the model and waits; each call is one epoch of its `step`: sampling, reward,
gradients at all trained timesteps, one step of the optimizer. Models, compilers and trackers are
left out of what is timed.
"""

import json
import pathlib
import subprocess
import tempfile

from rlft.config.settings import AlgorithmSettings, OptimizerSettings
from rlft.performance.benchmark.contest import Side, Unavailable, cores
from rlft.performance.benchmark.work import Work
from rlft.types import UserError

_WORKER = pathlib.Path(__file__).with_name("trl_worker.py")


def side(work: Work, python: str) -> Side:
  """Starts the process.

  Args:
    work: what to do in a call.
    python: of the environment that has TRL; '' if there is none.

  Raises:
    UserError: `python` is no program, or the process ends.
    Unavailable: no environment was named, or TRL cannot train this model.
  """
  if not python:
    raise Unavailable("no --trl_python: experiments/trl_venv.sh makes one")
  if work.ids.shape[1] > 1:
    raise Unavailable("TRL trains models with one text encoder only")
  if work.guidance_scale == 1.0:
    # Its pipeline then still gives the network the empty prompts, for twice as many images.
    raise Unavailable("TRL samples with guidance only: try --guidance_scale=5")
  log = tempfile.TemporaryFile("w+")
  what = {
    "model": str(work.model),
    "scratch": str(work.scratch),
    "prompts": work.prompts,
    "batch_size": work.batch_size,
    "sampling_steps": work.sampling_steps,
    "guidance_scale": work.guidance_scale,
    "train_timesteps": work.train_timesteps,
    "mixed_precision": {"float32": "no", "bfloat16": "bf16"}[work.dtype],
    "learning_rate": OptimizerSettings.learning_rate,
    "clip_range": AlgorithmSettings.clip_range,
    "cores": cores(),
  }
  try:
    # -I: else the modules beside the worker would hide Python's own.
    process = subprocess.Popen(
      [python, "-I", str(_WORKER), json.dumps(what)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=log,
      text=True,
      bufsize=1,
    )
  except OSError as error:
    log.close()
    raise UserError(
      f"--trl_python={python} cannot be run ({error.strerror}): give the Python of the environment"
      " that experiments/trl_venv.sh makes"
    ) from error

  def wait() -> None:
    if not process.stdout.readline():
      process.wait()
      log.seek(0)
      last = (log.read().strip() or "it said nothing").splitlines()[-1]
      raise UserError(f"--trl_python={python}: TRL's process has ended: {last}")

  def run() -> None:
    process.stdin.write("\n")
    wait()

  def close() -> None:
    process.stdin.close()
    process.kill()
    process.wait()
    process.stdout.close()
    log.close()

  try:
    wait()
  except UserError:
    close()
    raise
  return Side(run, close=close)
