"""Trains with TRL's DDPOTrainer, an epoch for each question on stdin; started by process.py.

Runs in TRL's environment, which has none of this library: imports nothing of it. Both sides send
messages: a line of JSON that says how many bytes follow, and these bytes.
"""

from collections.abc import Callable, Mapping
import json
import os
import sys
from typing import Any, BinaryIO, Protocol


def send(stream: BinaryIO, content: Mapping[str, Any], data: bytes = b"") -> None:
  """Sends a message."""
  stream.write(json.dumps({**content, "bytes": len(data)}).encode() + b"\n" + data)
  stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
  """The next message; None if the other side has ended."""
  line = stream.readline()
  if not line.endswith(b"\n"):
    return None
  content = json.loads(line)
  data = stream.read(count := content.pop("bytes"))
  return (content, data) if len(data) == count else None


class Trainer(Protocol):
  """What `serve` drives."""

  def epoch(self, prompts: list[str], score: Callable[[Any], bytes]) -> None:
    """Draws an image for each prompt, has them scored, learns.

    `score` takes images `[B, H, W, 3]`, a float32 array, and returns B float32 as bytes.
    """

  def save(self, folder: str) -> None:
    """Saves all that is needed to go on; the network in `unet/`, in the layout of diffusers."""


def serve(questions: BinaryIO, answers: BinaryIO, trainer: Trainer) -> None:
  """Does what is asked, until the other side has ended.

  Questions: {"epoch": prompts}, in which {"images": shape} with their numbers asks back for
  rewards; {"save": folder}. Each is answered by {}.
  """

  def score(images):
    send(answers, {"images": list(images.shape)}, images.tobytes())
    found = receive(questions)
    if found is None:
      sys.exit()
    return found[1]

  while (found := receive(questions)) is not None:
    question, _ = found
    if "epoch" in question:
      trainer.epoch(question["epoch"], score)
    else:
      trainer.save(question["save"])
    send(answers, {})


class _DDPO:
  """TRL's trainer and pipeline, on the whole network."""

  def __init__(self, work: Mapping[str, Any]):
    os.environ["HF_HUB_OFFLINE"] = "1"
    import accelerate
    import torch
    import trl

    self._torch = torch
    accelerate.PartialState()  # TRL's pipeline logs before its trainer would make it.
    torch.set_num_threads(work["cores"])
    config = trl.DDPOConfig(
      seed=work["seed"],
      mixed_precision="no",
      project_kwargs={"project_dir": work["scratch"]},
      sample_num_steps=work["sampling_steps"],
      sample_eta=work["eta"],
      sample_guidance_scale=work["guidance_scale"],
      sample_batch_size=work["batch_size"],
      sample_num_batches_per_epoch=1,
      train_cfg=True,
      **work["options"],
    )
    pipeline = trl.DefaultDDPOStableDiffusionPipeline(work["model"], use_lora=False)
    self._trainer = trl.DDPOTrainer(config, self._reward, self._prompt, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    self._step = 0
    if work["resume"]:
      self._trainer.accelerator.load_state(work["resume"])

  def _prompt(self):
    return next(self._prompts), {}

  def _reward(self, images, prompts, metadata):
    images = images.float().cpu().permute(0, 2, 3, 1).contiguous().numpy()
    return self._torch.frombuffer(bytearray(self._score(images)), dtype=self._torch.float32), {}

  def epoch(self, prompts, score):
    self._prompts, self._score = iter(prompts), score
    self._step = self._trainer.step(0, self._step)  # Epoch 0 is the one after which it saves none.

  def save(self, folder):
    self._trainer.accelerator.save_state(folder)


def main() -> None:
  """Reads the work as JSON from the first argument."""
  answers = os.fdopen(os.dup(1), "wb")
  os.dup2(2, 1)  # What the libraries print is no answer.
  trainer = _DDPO(json.loads(sys.argv[1]))
  send(answers, {})
  serve(sys.stdin.buffer, answers, trainer)


if __name__ == "__main__":
  main()
