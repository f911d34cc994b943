"""LoRA (Hu et al., arXiv 2106.09685): low-rank updates of the UNet's attention projections.

The adapter is a tree of its own, {module path: {'a': [in, r], 'b': [r, out]}}. The modules know
nothing of it, and "adapter off" is the base tree.
"""

import contextlib
import dataclasses
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp

from rlft.types import Conditioning, Denoiser

_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out_0")

Adapter = dict[str, dict[str, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
  """A UNet's weights: its parameters, and an adapter or None."""

  unet: Any
  adapter: Adapter | None = None


def scale(rank: int, alpha: float) -> float:
  """alpha / rank, where an alpha of 0 stands for the rank; 0 without LoRA (rank 0)."""
  return (alpha or rank) / rank if rank else 0.0


def targets(params: Any) -> dict[str, tuple[int, int]]:
  """Adapted modules of a UNet tree, 'a/b/c' -> (in, out): all attention projections."""
  flat = traverse_util.flatten_dict(params)
  return {
    "/".join(path[:-1]): leaf.shape
    for path, leaf in flat.items()
    if path[-1] == "kernel" and path[-2] in _PROJECTIONS
  }


def init(key: jax.Array, params: Any, rank: int) -> Adapter:
  """A new adapter: `a` normal with deviation 1 / rank, `b` zero, so that it changes nothing yet."""
  shapes = targets(params)
  keys = jax.random.split(key, len(shapes))
  return {
    path: {
      "a": jax.random.normal(k, (fan_in, rank), jnp.float32) / rank,
      "b": jnp.zeros((rank, fan_out), jnp.float32),
    }
    for k, (path, (fan_in, fan_out)) in zip(keys, sorted(shapes.items()), strict=True)
  }


def adapted(adapter: Adapter | None, scale: float) -> contextlib.AbstractContextManager[None]:
  """Inside, the modules that the adapter names return W x + scale * b (a x).

  The sum W + scale * a b would be rounded to the type that the network computes in: in bfloat16, a
  small adapter would be lost. And neither it nor its gradient, which are as large as W, exist.

  Args:
    adapter: None changes nothing.
    scale: alpha / rank.
  """
  if adapter is None:
    return contextlib.nullcontext()

  def add(call, args, kwargs, context):
    output = call(*args, **kwargs)
    factors = adapter.get("/".join(context.module.path))
    if factors is None or context.method_name != "__call__":
      return output
    x, a, b = (v.astype(output.dtype) for v in (args[0], factors["a"], factors["b"]))
    return output + scale * ((x @ a) @ b)

  return nn.intercept_methods(add)


def denoiser(unet: nn.Module, weights: Weights, scale: float) -> Denoiser:
  """The network with its weights bound; `scale` of the adapter is alpha / rank."""

  def denoise(latents, timesteps, conditioning):
    with adapted(weights.adapter, scale):
      return unet.apply({"params": weights.unet}, latents, timesteps, conditioning)

  return denoise


def prepare(
  unet: nn.Module, weights: Weights, scale: float, conditioning: Conditioning
) -> Conditioning:
  """What the network makes of the conditioning before the first step, see `UNet2DCondition`."""
  if not hasattr(unet, "prepare"):
    return conditioning
  with adapted(weights.adapter, scale):
    return unet.apply({"params": weights.unet}, conditioning, method="prepare")


def merge(params: Any, adapter: Adapter, scale: float) -> Any:
  """The tree with W + scale * a b in the place of each adapted W; scale is alpha / rank."""
  flat = traverse_util.flatten_dict(params)
  for path, factors in adapter.items():
    leaf = (*path.split("/"), "kernel")
    flat[leaf] = flat[leaf] + scale * (factors["a"] @ factors["b"])
  return traverse_util.unflatten_dict(flat)
