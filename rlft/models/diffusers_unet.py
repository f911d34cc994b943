"""The Flax UNet of diffusers in the place of ours, on the same parameters, for cross-checking.

Its numbers differ a little: the transformers' group norms have an epsilon of 1e-5 (PyTorch and ours
1e-6), the GELU is the approximation with tanh, and attention weights are not computed in float32.
diffusers 0.39 is the last release that has it.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
from importlib import metadata
from typing import Any

from flax import linen as nn
import jax.numpy as jnp

from rlft.models import layers
from rlft.models.unet import UNet2DCondition, UNetConfig
from rlft.types import UserError

# What the class does not take, and the values it has.
_FIXED = {"norm_num_groups": 32, "norm_eps": 1e-5}
_IGNORED = ("upcast_attention",)
_INSTALL = "pip install 'rlft[diffusers-flax]', or leave --backend out"


@dataclasses.dataclass(frozen=True)
class DiffusersUNet:
  """Is called as `UNet2DCondition` is.

  Attributes:
    config: of ours.
    network: diffusers' module.
  """

  config: UNetConfig
  network: nn.Module

  @property
  def dtype(self) -> Any:
    """Type that the network computes in."""
    return self.network.dtype

  def apply(self, variables: Mapping[str, Any], *args: Any, method: str = "__call__") -> Any:
    """Calls one of the methods of `UNet2DCondition`: `__call__` or `prepare`."""
    if method == "prepare":
      return args[0]  # keys and values are computed at every step
    latents, timesteps, conditioning = args
    latents, timesteps = (layers.alike(x, conditioning.text)[0] for x in (latents, timesteps))
    more = None
    if conditioning.pooled is not None:
      more = {"text_embeds": conditioning.pooled, "time_ids": conditioning.sizes}
    with _quiet():
      output = self.network.apply(
        variables, latents.transpose(0, 3, 1, 2), timesteps, conditioning.text, more
      )
    return output.sample.transpose(0, 2, 3, 1).astype(jnp.float32)


def make(ours: UNet2DCondition) -> DiffusersUNet:
  """diffusers' module for our configuration and type.

  Raises:
    UserError: there is no diffusers that has it, or it cannot do what ours is set to.
  """
  try:
    version = metadata.version("diffusers")
  except metadata.PackageNotFoundError as error:
    raise UserError(f"--backend=diffusers: diffusers is not installed: {_INSTALL}") from error
  if tuple(map(int, version.split(".")[:2])) >= (0, 40):
    raise UserError(
      f"--backend=diffusers: diffusers {version} has no Flax classes, 0.39 was the last: {_INSTALL}"
    )
  if ours.remat:
    raise UserError(
      "--backend=diffusers keeps all activations: give --noremat, or leave --backend out"
    )
  if ours.attention not in ("auto", "xla"):
    raise UserError(
      f"--backend=diffusers has its own attention: leave --attention={ours.attention} out"
    )
  config = dataclasses.asdict(ours.config)
  for name, value in _FIXED.items():
    if (found := config.pop(name)) != value:
      raise UserError(
        f"--backend=diffusers: its UNet has {name}={value}, but this model {found}: leave --backend"
        " out"
      )
  for name in _IGNORED:
    del config[name]
  with _quiet():
    import diffusers

    network = diffusers.FlaxUNet2DConditionModel(**config, dtype=ours.dtype)
  return DiffusersUNet(ours.config, network)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Every module of the class warns that it is deprecated whenever it is traced."""
  from diffusers.utils import logging

  before = logging.get_verbosity()
  logging.set_verbosity_error()
  try:
    yield
  finally:
    logging.set_verbosity(before)
