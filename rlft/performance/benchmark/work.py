"""Sampling and training of a whole model: the work, which is the same for all sides.

    sampling   from token ids to images, with the trajectory and its log-probabilities
    update     one clipped policy-gradient step of AdamW on one timestep of every image
    iteration  sampling, a trivial reward, gradients at K timesteps, one step on their sum

Every side reads the same model from a directory in the diffusers layout: the shipped miniature, or
another size with random weights.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlft.catalog import load_prompts
from rlft.config.settings import EMOJI_SD
from rlft.models import architectures, clip, dispatch, stable_diffusion, unet, vae
from rlft.models import text as text_lib
from rlft.models.files import pretrained
from rlft.models.stable_diffusion import StableDiffusion
from rlft.performance.compile import hlo

PROMPTS = "emoji:pair/train"
VOCABULARY = 942  # tokens of the tokenizer of emoji-sd, which models with random weights have, too


@dataclasses.dataclass(frozen=True)
class Size:
  """A model and the work that is usual for it.

  Attributes:
    architecture: makes the description of the model; None is the shipped miniature.
    batch_size: images in a call.
    sampling_steps: T.
    guidance_scale: 1 is none.
    train_timesteps: K of an iteration.
    cpu_devices: into which our side splits a CPU.
  """

  architecture: Callable[[], architectures.Architecture] | None
  batch_size: int
  sampling_steps: int
  guidance_scale: float
  train_timesteps: int
  cpu_devices: int = 2


@dataclasses.dataclass(frozen=True)
class Work:
  """What each side does in a call.

  Attributes:
    model: directory in the diffusers layout.
    scratch: a directory to write to.
    devices: of our side.
    batch_size, sampling_steps, guidance_scale, train_timesteps: see `Size`.
    dtype: type that the UNet computes in.
    ids: `[B, E, L]` int32 tokens of the prompts.
    empty: `[E, L]` int32 tokens of the empty prompt.
    timesteps: positions in the schedule, each trained in a call of `update` in turn, and all of
      them in an iteration (but by ours and TRL, which draw as many).
    prompts: the texts.
    microbatch: images at once in the gradient of a side that cannot take all; 0 takes all.
  """

  model: pathlib.Path
  scratch: pathlib.Path
  devices: int
  batch_size: int
  sampling_steps: int
  guidance_scale: float
  train_timesteps: int
  dtype: str
  ids: np.ndarray
  empty: np.ndarray
  timesteps: tuple[int, ...]
  prompts: tuple[str, ...]
  microbatch: int = 0


def random_architecture(
  channels: tuple[int, ...],
  attend: tuple[bool, ...],
  heads: int,
  features: int,
  sample_size: int,
) -> architectures.Architecture:
  """A UNet with a resnet at each level, and a small VAE and text encoder; 77 tokens."""
  return architectures.Architecture(
    unet=unet.UNetConfig(
      sample_size=sample_size,
      block_out_channels=channels,
      down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attend),
      up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attend)),
      layers_per_block=1,
      attention_head_dim=heads,
      cross_attention_dim=features,
      use_linear_projection=True,
    ),
    vae=vae.VAEConfig(
      down_block_types=("DownEncoderBlock2D",) * 3,
      up_block_types=("UpDecoderBlock2D",) * 3,
      block_out_channels=(24, 48, 64),
      layers_per_block=1,
      norm_num_groups=8,
      sample_size=4 * sample_size,
    ),
    texts=(
      clip.CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=features,
        intermediate_size=2 * features,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
      ),
    ),
    scheduler=architectures.get("sd2.1").scheduler,
  )


def _small() -> architectures.Architecture:
  return random_architecture((64, 128), (True, False), heads=4, features=128, sample_size=8)


def _medium() -> architectures.Architecture:
  channels, attend = (128, 256, 512), (True, True, False)
  return random_architecture(channels, attend, heads=8, features=256, sample_size=16)


def _published(name: str) -> Size:
  return Size(functools.partial(architectures.get, name), 8, 10, 7.0, 2, cpu_devices=1)


SIZES: Mapping[str, Size] = types.MappingProxyType(
  {
    "miniature": Size(None, 64, 10, 1.0, 5),
    "small": Size(_small, 128, 20, 5.0, 5),
    # Of two devices each would read all weights, and take the whole step of the optimizer.
    "medium": Size(_medium, 8, 10, 5.0, 3, cpu_devices=1),
    **{name: _published(name) for name in ("sd1.5", "sd2-base", "sdxl-base")},
  }
)


def make_model(size: Size, root: pathlib.Path) -> StableDiffusion:
  """The model of a size; writes it below `root` if it is not the shipped one."""
  if size.architecture is None:
    return pretrained.load(EMOJI_SD)
  model = architectures.build(size.architecture())
  (tokenizer,) = pretrained.load(EMOJI_SD).tokenizers
  tokenizer = dataclasses.replace(
    tokenizer, length=model.text_encoders[0].config.max_position_embeddings
  )
  tokenizers = (tokenizer,) * len(model.text_encoders)
  params = {
    name: architectures.random_params(shapes, seed)
    for seed, (name, shapes) in enumerate(model.params.items())
  }
  model = dataclasses.replace(model, tokenizers=tokenizers, params=params)
  pretrained.save(root / "model", model)
  return model


def make_work(
  model: StableDiffusion,
  root: pathlib.Path,
  numbers: Mapping[str, Any],
  dtype: str,
  devices: int,
) -> Work:
  texts = [prompt.text for prompt in load_prompts(PROMPTS)[: numbers["batch_size"]]]
  texts = [texts[i % len(texts)] for i in range(numbers["batch_size"])]
  steps, count = numbers["sampling_steps"], numbers["train_timesteps"]
  written = root / "model"
  return Work(
    model=written if written.exists() else pretrained.EMOJI_SD_PATH,
    scratch=root,
    devices=devices,
    dtype=dtype,
    ids=model.tokenize(texts)[0],
    empty=model.tokenize([""])[0][0],
    timesteps=tuple(np.linspace(0, steps - 1, count).round().astype(int).tolist()),
    prompts=tuple(texts),
    **numbers,
  )


def brightness(images: jax.Array) -> jax.Array:
  """The trivial reward, `[B]`: the mean of an image's pixels."""
  return images.mean(axis=(1, 2, 3))


def count_flops(model: StableDiffusion, work: Work) -> dict[str, float]:
  """Counts the FLOPs of a call of each suite; a gradient takes three forward passes.

  They are those that the networks define, as accelerators have them: what a side computes twice, or
  spares itself (as forms for CPUs do), plays no part.
  """
  params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), dict(model.params))
  size, shape = stable_diffusion.image_size(model), (1, *stable_diffusion.latent_shape(model))
  ids = jax.ShapeDtypeStruct((1, *work.ids.shape[1:]), jnp.int32)
  latents = jax.ShapeDtypeStruct(shape, jnp.float32)

  def encode(params, ids):
    return text_lib.encode(model, params, ids, size)

  def denoise(params, latents, text):
    return model.unet.apply({"params": params}, latents, jnp.zeros(1, jnp.int32), text)

  def decode(params, latents):
    return stable_diffusion.decode(model, params, latents)

  def count(function, *args):
    with dispatch.for_platform("tpu"):
      return hlo.flops(jax.make_jaxpr(function)(*args))

  text = jax.eval_shape(encode, params, ids)
  forward = count(denoise, params["unet"], latents, text)
  forward *= work.batch_size * (1 if work.guidance_scale == 1.0 else 2)
  others = count(encode, params, ids) + count(decode, params["vae"], latents)
  sampling = work.sampling_steps * forward + work.batch_size * others
  update = 3 * forward
  return {
    "sampling": sampling,
    "update": update,
    "iteration": sampling + work.train_timesteps * update,
  }
