"""The work of a call, counted."""

import dataclasses

import jax
import numpy as np
import pytest

from rlft.models import architectures
from rlft.performance.benchmark import work


def test_the_work_is_counted_in_flops():
  parameters, forward = 3_193_604, 182_575_104  # By PyTorch's FlopCounterMode, diffusers' class.
  model = architectures.build(work.SIZES["small"].architecture())
  assert sum(leaf.size for leaf in jax.tree.leaves(model.params["unet"])) == parameters
  ids = np.zeros((1, 1, 77), np.int32)
  numbers = {"batch_size": 3, "sampling_steps": 4, "guidance_scale": 2.0, "train_timesteps": 5}
  done = work.Work(
    model="",
    scratch="",
    devices=1,
    dtype="",
    ids=ids,
    empty=ids,
    timesteps=(),
    prompts=(),
    **numbers,
  )
  found = work.count_flops(model, done)
  # Norms whose sums are written as products add a little.
  assert found["update"] == pytest.approx(3 * 2 * 3 * forward, rel=5e-3)
  others = found["sampling"] - 4 * found["update"] / 3
  assert 0 < others < found["sampling"]
  assert found["iteration"] == found["sampling"] + 5 * found["update"]
  unguided = dataclasses.replace(done, guidance_scale=1.0)
  assert work.count_flops(model, unguided)["update"] == found["update"] / 2
