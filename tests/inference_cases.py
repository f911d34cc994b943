"""A sampler that need not be compiled, and drawings with it."""

import models_cases
import numpy as np

from rlft.inference import draw

PROMPTS = list(models_cases.PROMPTS)
STEPS, GUIDANCE = 2, 2.0
SETTINGS = {"seed": 5, "sampling_steps": STEPS, "guidance_scale": GUIDANCE, "eta": 0.5}


def replace_sampler(monkeypatch):
  """Replaces the sampler of `draw`; returns (policy, batch size) of those that are made."""
  made = []

  class Sampler:
    def __init__(self, model, policy, *, batch_size):
      made.append((policy, batch_size))

    def batches(self, prompts, seed, *, weights, progress):
      return [drawn(prompts, seed)]

  monkeypatch.setattr(draw, "Sampler", Sampler)
  return made


def drawn(prompts, seed):
  """An image for each prompt, by (seed, place, prompt)."""
  states = (
    np.random.RandomState([seed, place, *prompt.encode()]) for place, prompt in enumerate(prompts)
  )
  return np.stack([state.uniform(size=(32, 32, 3)).astype(np.float32) for state in states])


def drawing(model, **changes):
  """How the model in the directory `model` draws in the tests."""
  return draw.Drawing(model=model, **SETTINGS | changes)
