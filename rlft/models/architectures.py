"""The published Stable Diffusion models as configs, without their weights.

For compiling ahead of time, for benchmarks with random weights, and for tests at full size. The
numbers are those of the published `config.json` files; schedulers are reduced to what DDIM uses.
"""

from collections.abc import Mapping
import dataclasses
import types
from typing import Any

from flax import traverse_util
import jax.numpy as jnp
import numpy as np

from rlft.models import clip, unet, vae
from rlft.models.shapes import param_shapes
from rlft.models.stable_diffusion import StableDiffusion
from rlft.types import UserError


@dataclasses.dataclass(frozen=True)
class Architecture:
  """What a model is, apart from its parameters.

  Attributes:
    unet, vae, texts: configs of the networks; `texts` of one or two text encoders.
    scheduler: as in `scheduler_config.json`.
    zero_empty: see `StableDiffusion`.
  """

  unet: unet.UNetConfig
  vae: vae.VAEConfig
  texts: tuple[clip.CLIPTextConfig, ...]
  scheduler: Mapping[str, Any]
  zero_empty: bool = False

  @property
  def image_size(self) -> int:
    """Height and width, in pixels, of the images that the model was made for."""
    return self.unet.sample_size * self.vae.downscale


def _scheduler(prediction_type: str) -> Mapping[str, Any]:
  return types.MappingProxyType(
    {
      "_class_name": "DDIMScheduler",
      "num_train_timesteps": 1000,
      "beta_start": 0.00085,
      "beta_end": 0.012,
      "beta_schedule": "scaled_linear",
      "clip_sample": False,
      "set_alpha_to_one": False,
      "steps_offset": 1,
      "timestep_spacing": "leading",
      "prediction_type": prediction_type,
    }
  )


_SD1_UNET = unet.UNetConfig(sample_size=64, cross_attention_dim=768)
_SD2_UNET = unet.UNetConfig(
  sample_size=64,
  cross_attention_dim=1024,
  attention_head_dim=(5, 10, 20, 20),
  use_linear_projection=True,
)
_SDXL_UNET = unet.UNetConfig(
  sample_size=128,
  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
  up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
  block_out_channels=(320, 640, 1280),
  cross_attention_dim=2048,
  attention_head_dim=(5, 10, 20),
  transformer_layers_per_block=(1, 2, 10),
  use_linear_projection=True,
  addition_embed_type="text_time",
  addition_time_embed_dim=256,
  projection_class_embeddings_input_dim=2816,
)
_VAE = vae.VAEConfig(
  down_block_types=("DownEncoderBlock2D",) * 4,
  up_block_types=("UpDecoderBlock2D",) * 4,
  block_out_channels=(128, 256, 512, 512),
  layers_per_block=2,
  sample_size=512,
)
# CLIP ViT-L of OpenAI.
_CLIP_L = clip.CLIPTextConfig(
  hidden_size=768,
  intermediate_size=3072,
  num_attention_heads=12,
  projection_dim=768,
  bos_token_id=0,
  eos_token_id=2,
)
# OpenCLIP ViT-H without the last of its 24 layers.
_CLIP_H = clip.CLIPTextConfig(
  hidden_size=1024,
  intermediate_size=4096,
  num_hidden_layers=23,
  num_attention_heads=16,
  hidden_act="gelu",
  bos_token_id=0,
  eos_token_id=2,
)
# OpenCLIP ViT-bigG.
_CLIP_BIG_G = clip.CLIPTextConfig(
  hidden_size=1280,
  intermediate_size=5120,
  num_hidden_layers=32,
  num_attention_heads=20,
  hidden_act="gelu",
  projection_dim=1280,
  bos_token_id=0,
  eos_token_id=2,
)

_STREAM = 1_048_573  # prime: the rows of no matrix repeat themselves

ARCHITECTURES: Mapping[str, Architecture] = types.MappingProxyType(
  {
    "sd1.5": Architecture(_SD1_UNET, _VAE, (_CLIP_L,), _scheduler("epsilon")),
    "sd2-base": Architecture(
      _SD2_UNET, dataclasses.replace(_VAE, sample_size=768), (_CLIP_H,), _scheduler("epsilon")
    ),
    "sd2.1": Architecture(
      dataclasses.replace(_SD2_UNET, sample_size=96, upcast_attention=True),
      dataclasses.replace(_VAE, sample_size=768),
      (_CLIP_H,),
      _scheduler("v_prediction"),
    ),
    "sdxl-base": Architecture(
      _SDXL_UNET,
      dataclasses.replace(_VAE, sample_size=1024, scaling_factor=0.13025),
      (_CLIP_L, _CLIP_BIG_G),
      _scheduler("epsilon"),
      zero_empty=True,
    ),
  }
)


def get(name: str) -> Architecture:
  """The architecture of that name; raises `UserError` if there is none."""
  if name not in ARCHITECTURES:
    raise UserError(f"architecture {name!r} is unknown; choose from {', '.join(ARCHITECTURES)}")
  return ARCHITECTURES[name]


def build(
  architecture: Architecture, *, dtype: Any = jnp.float32, remat: bool = False
) -> StableDiffusion:
  """The model without weights: its parameters are `jax.ShapeDtypeStruct`s; computes nothing.

  Args:
    architecture: configs.
    dtype: type that the UNet computes in; VAE and text encoders compute in float32.
    remat: see `unet.UNet2DCondition`.

  Returns:
    the model; float32 parameters, no tokenizers.
  """
  first, *others = architecture.texts
  modules = {
    "unet": unet.UNet2DCondition(architecture.unet, dtype=dtype, remat=remat),
    "vae": vae.AutoencoderKL(architecture.vae),
    "text_encoder": clip.CLIPTextEncoder(first),
    **{
      f"text_encoder_{i}": clip.CLIPTextEncoderWithProjection(config)
      for i, config in enumerate(others, start=2)
    },
  }
  return StableDiffusion(
    unet=modules["unet"],
    vae=modules["vae"],
    text_encoders=tuple(v for k, v in modules.items() if k.startswith("text_encoder")),
    tokenizers=(),
    scheduler=architecture.scheduler,
    # Neither `dtype` nor `remat` changes the shapes: traced once for all of them.
    params={name: param_shapes(type(module)(module.config)) for name, module in modules.items()},
    zero_empty=architecture.zero_empty,
  )


def abstract(name: str, *, dtype: Any = jnp.float32, remat: bool = False) -> StableDiffusion:
  """`build` of the architecture of that name; raises `UserError` if there is none."""
  return build(get(name), dtype=dtype, remat=remat)


def random_params(shapes: Any, seed: int) -> Any:
  """Float32 numpy parameters of a sensible scale, fast at any size.

  Kernels have a variance of 1 / inputs and norms are the identity, so that activations keep their
  size; biases are 0 and embeddings small, as CLIP's are. The numbers of all arrays are windows of
  one stream, over and over, since drawing 3 billion takes minutes.

  Args:
    shapes: a tree of arrays or `jax.ShapeDtypeStruct`s, as in `StableDiffusion.params`.
    seed: the same one gives the same numbers.
  """
  stream = np.random.default_rng(seed).standard_normal(_STREAM, np.float32)
  start = 0

  def draw(path: tuple[str, ...], leaf: Any) -> np.ndarray:
    nonlocal start
    if path[-1] in ("bias", "scale"):
      return np.full(leaf.shape, path[-1] == "scale", np.float32)
    # Every array starts elsewhere: else all layers would share their first numbers.
    start = (start + 7919) % stream.size
    numbers = np.resize(np.roll(stream, -start), leaf.shape)
    fan_in = np.prod(leaf.shape[:-1]) if path[-1] == "kernel" else 50**2
    numbers *= np.float32(fan_in**-0.5)
    return numbers

  flat = traverse_util.flatten_dict(shapes)
  return traverse_util.unflatten_dict({path: draw(path, leaf) for path, leaf in flat.items()})
