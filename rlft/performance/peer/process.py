"""TRL's trainer in a process of its own, whose Python has other packages."""

from collections.abc import Callable, Mapping, Sequence
import json
import os
import pathlib
import subprocess
import tempfile
from typing import Any

import numpy as np

from rlft.performance.peer.trl_worker import receive, send
from rlft.types import UserError

WORKER = pathlib.Path(__file__).with_name("trl_worker.py")


class Peer:
  """A process that trains when it is asked to."""

  def __init__(self, python: str, work: Mapping[str, Any], *, worker: pathlib.Path = WORKER):
    """Starts the process and waits until its model is loaded.

    Args:
      python: of the environment that has TRL.
      work: what the worker is told.
      worker: the script.

    Raises:
      UserError: `python` is no program, or the process ends.
    """
    self._python = python
    self._log = tempfile.TemporaryFile("w+")
    # -I: else the modules beside the worker would hide Python's own.
    command = [python, "-I", str(worker), json.dumps(work)]
    pipe = subprocess.PIPE
    try:
      self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log)
    except OSError as error:
      self._log.close()
      raise UserError(
        f"--trl_python={python} cannot be run ({error.strerror}): give the Python of the"
        " environment that experiments/trl_venv.sh makes"
      ) from error
    try:
      self._receive()
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> "Peer":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def epoch(self, prompts: Sequence[str], score: Callable[[np.ndarray], np.ndarray]) -> None:
    """Draws an image for each prompt, has them scored, learns.

    Args:
      prompts: B texts.
      score: takes images `[B, H, W, 3]` float32 in [0, 1] and returns `[B]` float32.

    Raises:
      UserError: the process has ended.
    """
    self._send({"epoch": list(prompts)})
    answer, data = self._receive()
    images = np.frombuffer(data, np.float32).reshape(answer["images"])
    self._send({}, np.asarray(score(images), np.float32).tobytes())
    self._receive()

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Has everything saved that is needed to go on, the network in `unet/`.

    Raises:
      UserError: the process has ended.
    """
    self._send({"save": str(folder)})
    self._receive()

  def close(self) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.communicate()
    self._log.close()

  def _send(self, content: Mapping[str, Any], data: bytes = b"") -> None:
    try:
      send(self._process.stdin, content, data)
    except BrokenPipeError:
      self._fail()

  def _receive(self) -> tuple[dict[str, Any], bytes]:
    found = receive(self._process.stdout)
    return self._fail() if found is None else found

  def _fail(self) -> Any:
    self._process.wait()
    self._log.seek(0)
    last = (self._log.read().strip() or "it said nothing").splitlines()[-1]
    raise UserError(f"--trl_python={self._python}: TRL's process has ended: {last}")
