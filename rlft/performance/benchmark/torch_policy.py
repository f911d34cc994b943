"""diffusers' PyTorch classes at the work of `work`, as one would write it by hand.

The networks are those of a pipeline, loaded from the same directory as ours; the reverse steps, the
loss and the optimizer are written here with PyTorch's operations. Random numbers are PyTorch's.
"""

from collections.abc import Callable
import contextlib
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np

from rlft.config.settings import AlgorithmSettings, OptimizerSettings
from rlft.diffusion import ddim
from rlft.performance.benchmark.contest import Side, Unavailable, seconds_of
from rlft.performance.benchmark.torch_ports import start
from rlft.performance.benchmark.work import Work

PACKAGES = ("diffusers", "transformers")  # beside torch
_CLIP_RANGE = AlgorithmSettings.clip_range
_DECODED = 4  # images at once in a GPU's decoder


def side(what: str, work: Work, *, is_compiled: bool = False) -> Side:
  """PyTorch's side of a contest; `is_compiled` is for `torch.compile` of the UNet.

  Raises:
    Unavailable: it does not run, or does not compile, here.
  """
  place = start(*PACKAGES)
  policy = Policy(work, place, trains=what != "sampling")
  if is_compiled:
    import torch

    policy.forward = torch.compile(policy.unet)
  call = {"sampling": policy.sampling, "update": policy.update, "iteration": policy.iteration}[what]
  if is_compiled:
    try:
      seconds = seconds_of(call)
    except Exception as error:  # Anything may be missing: a compiler, its headers, a backend.
      reason = str(error).strip().partition("\n")[0] or type(error).__name__
      raise Unavailable(f"torch.compile does not work: {reason}") from error
    return Side(call, compile_s=seconds, close=policy.close)
  return Side(call, close=policy.close)


def _import_quietly() -> Any:
  """diffusers without what it says about its Flax classes when it is imported."""
  from diffusers.utils import logging

  logging.set_verbosity_error()
  import diffusers

  return diffusers


def _network(kind: Any, folder: pathlib.Path, place: Any) -> Any:
  """A network with the weights in a folder, or random ones where that only describes it."""
  if list(folder.glob("*.safetensors")):
    return kind.from_pretrained(folder).to(place)
  with place:  # Where PyTorch draws them, which takes long on a CPU.
    if hasattr(kind, "load_config"):
      return kind.from_config(kind.load_config(folder)).eval()
    return kind(kind.config_class.from_pretrained(folder)).eval()


class Policy:
  """Networks and optimizer of a model, and what is done with them in a call."""

  def __init__(self, work: Work, place: Any, *, trains: bool):
    """Loads the networks.

    Args:
      work: what to do.
      place: PyTorch's device.
      trains: whether the UNet's parameters stay float32, as an optimizer wants them; networks that
        only sample are cast to the type that they compute in.
    """
    import torch
    import transformers

    diffusers = _import_quietly()
    self._work, self._place = work, place
    self._dtype = getattr(torch, work.dtype)
    self._casts = trains and self._dtype != torch.float32
    self.unet = _network(diffusers.UNet2DConditionModel, work.model / "unet", place)
    self.unet.to(torch.float32 if trains else self._dtype)
    if place.type == "cuda":
      self.unet.to(memory_format=torch.channels_last)
    self._vae = _network(diffusers.AutoencoderKL, work.model / "vae", place)
    kinds = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
    folders = ("text_encoder", "text_encoder_2")[: work.ids.shape[1]]
    self._encoders = [
      _network(kind, work.model / folder, place)
      for kind, folder in zip(kinds, folders, strict=False)
    ]
    index = json.loads((work.model / "model_index.json").read_text())
    self._zero_empty = index.get("force_zeros_for_empty_prompt", False)
    for network in (self._vae, *self._encoders):
      network.requires_grad_(False)
    self.forward: Callable[..., Any] = self.unet
    scheduler = json.loads((work.model / "scheduler" / "scheduler_config.json").read_text())
    self._schedule = ddim.make(scheduler, work.sampling_steps)
    self._ids = torch.from_numpy(np.asarray(work.ids, np.int64)).to(place)
    self._empty = torch.from_numpy(np.asarray(work.empty, np.int64)).to(place)
    self._optimizer = torch.optim.AdamW(
      self.unet.parameters(),
      lr=OptimizerSettings.learning_rate,
      betas=(OptimizerSettings.adam_b1, OptimizerSettings.adam_b2),
      eps=OptimizerSettings.adam_eps,
      weight_decay=OptimizerSettings.weight_decay,
      fused=place.type == "cuda",
    )
    self._drawn: Any = None
    self._calls = 0

  def sampling(self) -> Any:
    """Draws images, with their trajectories, from token ids."""
    import torch

    with torch.inference_mode():
      images, *path = self._sample()
      return images.mean((1, 2, 3)).cpu(), path  # Waits for an accelerator.

  def update(self) -> float:
    """Takes a step of the optimizer on one timestep of a trajectory, which is drawn once."""
    if self._drawn is None:
      self._drawn = self._draw()
    index = self._work.timesteps[self._calls % len(self._work.timesteps)]
    self._calls += 1
    loss = self._backward(index, *self._drawn)
    self._step()
    return loss.item()

  def iteration(self) -> float:
    """Samples, scores, and takes one step on the gradients of all trained timesteps."""
    drawn = self._draw()
    losses = [self._backward(index, *drawn) for index in self._work.timesteps]
    self._step()
    return losses[-1].item()

  def close(self) -> None:
    """Gives an accelerator's memory back."""
    import torch

    del self.unet, self.forward, self._vae, self._encoders, self._optimizer, self._drawn
    if self._place.type == "cuda":
      torch.cuda.empty_cache()

  def _encode(self, ids: Any) -> tuple[Any, Any]:
    """Token ids `[B, E, L]` to states `[B, L, D]`, and what SDXL is told beside them."""
    import torch

    if len(self._encoders) == 1:
      return self._encoders[0](ids[:, 0]).last_hidden_state, None
    found = [
      encoder(ids[:, i], output_hidden_states=True) for i, encoder in enumerate(self._encoders)
    ]
    text = torch.cat([output.hidden_states[-2] for output in found], -1)
    size = self.unet.config.sample_size * 2 ** (len(self._vae.config.block_out_channels) - 1)
    sizes = torch.tensor([size, size, 0, 0, size, size], device=self._place).float()
    return text, {"text_embeds": found[1].text_embeds, "time_ids": sizes.expand(len(ids), -1)}

  def _conditioning(self) -> tuple[Any, Any]:
    """Encodes the prompts of all images; with guidance, the empty prompts come first."""
    import torch

    text, more = self._encode(self._ids)
    if self._work.guidance_scale == 1.0:
      return text, more
    empty, empty_more = self._encode(self._empty[None])
    if self._zero_empty:
      empty = torch.zeros_like(empty)
      empty_more = empty_more | {"text_embeds": torch.zeros_like(empty_more["text_embeds"])}

    def both(a, b):
      return torch.cat([a.expand_as(b), b])

    more = None if more is None else jax.tree.map(both, empty_more, more)
    return both(empty, text), more

  def _mean(self, index: int, latents: Any, text: Any, more: Any) -> Any:
    """Mean of a reverse step: the network with guidance, and equation 12 of DDIM."""
    import torch

    schedule, guidance = self._schedule, self._work.guidance_scale
    inputs = latents if guidance == 1.0 else torch.cat([latents, latents])
    times = torch.full((len(inputs),), int(schedule.timesteps[index]), device=self._place)
    if not self._casts:
      inputs, text, more = jax.tree.map(lambda x: x.to(self._dtype), (inputs, text, more))
    with self._autocast():
      output = self.forward(inputs, times, text, added_cond_kwargs=more).sample
    output = output.float()
    if guidance != 1.0:
      empty, prompt = output.chunk(2)
      output = empty + guidance * (prompt - empty)
    alpha, before = float(schedule.alpha[index]), float(schedule.alpha_prev[index])
    signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
    if schedule.prediction_type == "epsilon":
      clean, epsilon = (latents - noise * output) / signal, output
    else:
      clean = signal * latents - noise * output
      epsilon = signal * output + noise * latents
    direction = math.sqrt(max(1 - before - float(schedule.std[index]) ** 2, 0.0))
    return math.sqrt(before) * clean + direction * epsilon

  def _autocast(self) -> Any:
    import torch

    if not self._casts:
      return contextlib.nullcontext()
    return torch.autocast(self._place.type, self._dtype)

  def _log_prob(self, index: int, value: Any, mean: Any) -> Any:
    std = float(self._schedule.std[index])
    constant = math.log(std) + 0.5 * math.log(2 * math.pi)
    return (-0.5 * ((value - mean) / std) ** 2 - constant).mean((1, 2, 3))

  def _sample(self) -> tuple[Any, Any, Any, Any]:
    """Images `[B, 3, H, W]`, latents `[T+1, B, ...]`, log-probabilities `[T, B]`, conditioning."""
    import torch

    text, more = self._conditioning()
    config = self.unet.config
    shape = (self._work.batch_size, config.in_channels, config.sample_size, config.sample_size)
    latents = [torch.randn(shape, device=self._place)]
    log_probs = []
    for index in range(self._work.sampling_steps):
      mean = self._mean(index, latents[-1], text, more)
      noise = torch.randn(shape, device=self._place)
      latents.append(mean + float(self._schedule.std[index]) * noise)
      log_probs.append(self._log_prob(index, latents[-1], mean))
    # In float32 the decoder's activations of a whole batch do not fit a GPU.
    size = _DECODED if self._place.type == "cuda" else len(latents[-1])
    parts = (latents[-1] / self._vae.config.scaling_factor).split(size)
    images = torch.cat([self._vae.decode(part).sample for part in parts])
    images = (images / 2 + 0.5).clamp(0, 1)
    return images, torch.stack(latents), torch.stack(log_probs), (text, more)

  def _draw(self) -> tuple[Any, Any, Any, Any]:
    """Latents, log-probabilities, conditioning and advantages, ready for gradients."""
    import torch

    with torch.no_grad():
      images, latents, log_probs, conditioning = self._sample()
      rewards = images.mean((1, 2, 3))
      advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
    return latents, log_probs, conditioning, advantages

  def _backward(
    self, index: int, latents: Any, log_probs: Any, conditioning: Any, advantages: Any
  ) -> Any:
    """Adds the gradient of the clipped loss at one timestep, in parts; returns the loss."""
    import torch

    count, total = len(advantages), 0.0
    text, more = conditioning
    for rows in torch.arange(count, device=self._place).split(self._work.microbatch or count):
      # With guidance the empty prompts come first.
      both = rows if len(text) == count else torch.cat([rows, rows + count])
      given = jax.tree.map(lambda x, rows=both: x[rows], (text, more))
      mean = self._mean(index, latents[index][rows], *given)
      before = log_probs[index][rows]
      ratio = torch.exp(self._log_prob(index, latents[index + 1][rows], mean) - before)
      clipped = ratio.clamp(1 - _CLIP_RANGE, 1 + _CLIP_RANGE)
      losses = torch.maximum(-advantages[rows] * ratio, -advantages[rows] * clipped)
      loss = losses.sum() / count
      loss.backward()
      total += loss.detach()
    return total

  def _step(self) -> None:
    import torch

    torch.nn.utils.clip_grad_norm_(self.unet.parameters(), OptimizerSettings.max_grad_norm)
    self._optimizer.step()
    self._optimizer.zero_grad()
