"""A reward of one's own that holds a PyTorch model, made once with options by a factory.

experiments/rewards/factory_torch.flags trains with it. It needs torch, which rlft does not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlft.types import HostReward


def sharpness(channels: int = 16, seed: int = 0, device: str = "cpu") -> HostReward:
  """How strongly the edges of a picture excite a layer of random filters.

  A stand-in for a model with weights: load yours where `model` is made.

  Args:
    channels: filters of the model.
    seed: of its random weights.
    device: on which it computes, e.g. 'cuda:0'.

  Returns:
    A reward that is called with all images at once, as the device is busy with one call.
  """
  import torch

  torch.manual_seed(seed)
  model = torch.nn.Sequential(torch.nn.Conv2d(3, channels, 3, bias=False), torch.nn.ReLU())
  with torch.no_grad():
    # Filters without a mean see edges, and not how bright the picture is.
    model[0].weight -= model[0].weight.mean(dim=(1, 2, 3), keepdim=True)
  model.to(device).eval()

  def score(
    images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
  ) -> np.ndarray:
    """`[B, H, W, 3]` float32 in [0, 1] -> `[B]`: the mean activation, 0 or more."""
    del prompts, metadata
    with torch.inference_mode():
      pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device)
      return model(pixels).mean(dim=(1, 2, 3)).cpu().numpy()

  return HostReward("sharpness", score, threads=1)
