"""Trains with TRL's DDPOTrainer, an epoch for each line on stdin; started by trl.py.

Runs in TRL's environment, which has none of this library: imports nothing of it. Says a line on
stdout when the model is loaded, and after each epoch.
"""

import itertools
import json
import os
import sys


def main() -> None:
  """Reads the work as JSON from the first argument."""
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)  # What the libraries print is no answer.
  os.environ["HF_HUB_OFFLINE"] = "1"
  import accelerate
  import torch
  import trl

  accelerate.PartialState()  # TRL's pipeline logs before its trainer would make it.
  work = json.loads(sys.argv[1])
  torch.set_num_threads(work["cores"])
  prompts = itertools.cycle(work["prompts"])
  guided = work["guidance_scale"] != 1.0
  config = trl.DDPOConfig(
    mixed_precision=work["mixed_precision"],
    project_kwargs={"project_dir": work["scratch"]},
    sample_num_steps=work["sampling_steps"],
    sample_eta=1.0,
    sample_guidance_scale=work["guidance_scale"],
    sample_batch_size=work["batch_size"],
    sample_num_batches_per_epoch=1,
    train_batch_size=work["batch_size"],
    train_cfg=guided,
    train_learning_rate=work["learning_rate"],
    train_clip_range=work["clip_range"],
    # It rounds the product with the number of steps down.
    train_timestep_fraction=(work["train_timesteps"] + 0.5) / work["sampling_steps"],
  )
  pipeline = trl.DefaultDDPOStableDiffusionPipeline(work["model"], use_lora=False)

  def reward(images, prompts, metadata):
    return images.mean((1, 2, 3)), {}

  trainer = trl.DDPOTrainer(config, reward, lambda: (next(prompts), {}), pipeline)
  pipeline.set_progress_bar_config(disable=True)
  print("ready", file=answers)
  step = 0
  for _ in sys.stdin:
    step = trainer.step(0, step)  # Epoch 0 is the one after which it saves nothing.
    print("done", file=answers)


if __name__ == "__main__":
  main()
