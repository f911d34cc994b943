"""Small models, their inputs, and how to run them in Flax and in PyTorch.

Shared by the tests and by `fixtures/make_fixtures.py`. Weights are not stored: they follow from a
seed through numpy's `RandomState`, whose stream never changes.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import pathlib
import types
from typing import Any
import zlib

from flax import traverse_util
import jax
from jax._src.cudnn import fused_attention_stablehlo  # To put something in the kernel's place.
import numpy as np
import pytest

from rlft.models import architectures, attention, clip, unet, vae
from rlft.models import tokens as tokens_lib
from rlft.models.files import streaming, torch_layout
from rlft.models.shapes import param_shapes
from rlft.models.stable_diffusion import StableDiffusion
from rlft.types import Conditioning

FIXTURES = pathlib.Path(__file__).parent / "fixtures"

_UNET_SD1 = unet.UNetConfig(
  sample_size=8,
  down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
  block_out_channels=(32, 64),
  layers_per_block=2,
  norm_num_groups=8,
  cross_attention_dim=24,
  attention_head_dim=4,
)
_UNET_SD2 = unet.UNetConfig(
  sample_size=8,
  down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
  block_out_channels=(32, 64),
  layers_per_block=1,
  norm_num_groups=8,
  cross_attention_dim=40,
  attention_head_dim=(2, 8),
  use_linear_projection=True,
  upcast_attention=True,
)
# Every other option that may vary, away from its default.
_UNET_ODD = dataclasses.replace(
  _UNET_SD2,
  flip_sin_to_cos=False,
  freq_shift=1,
  norm_eps=1e-3,
  only_cross_attention=(True, False),
  in_channels=5,
)
_VAE = vae.VAEConfig(
  down_block_types=("DownEncoderBlock2D",) * 3,
  up_block_types=("UpDecoderBlock2D",) * 3,
  block_out_channels=(16, 16, 32),
  norm_num_groups=8,
  scaling_factor=0.5,
)
_CLIP = clip.CLIPTextConfig(
  vocab_size=60,
  hidden_size=32,
  intermediate_size=64,
  num_hidden_layers=2,
  num_attention_heads=4,
  max_position_embeddings=16,
  hidden_act="quick_gelu",
)

# SDXL: no transformers at the top, several blocks below, pooled text and sizes beside the timestep.
_UNET_SDXL = unet.UNetConfig(
  sample_size=8,
  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
  up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
  block_out_channels=(32, 64, 96),
  layers_per_block=1,
  norm_num_groups=8,
  cross_attention_dim=56,
  attention_head_dim=(2, 4, 8),
  transformer_layers_per_block=(3, 1, 2),
  use_linear_projection=True,
  upcast_attention=None,
  addition_embed_type="text_time",
  addition_time_embed_dim=8,
  projection_class_embeddings_input_dim=12 + 6 * 8,
)
_CLIP_2 = dataclasses.replace(
  _CLIP, hidden_act="gelu", hidden_size=24, num_hidden_layers=3, projection_dim=12
)

MODULES = {
  "unet_sd1": unet.UNet2DCondition(_UNET_SD1),
  "unet_sd2": unet.UNet2DCondition(_UNET_SD2),
  "unet_sdxl": unet.UNet2DCondition(_UNET_SDXL),
  "unet_odd": unet.UNet2DCondition(_UNET_ODD),
  "vae": vae.AutoencoderKL(_VAE),
  "clip_quick_gelu": clip.CLIPTextEncoder(_CLIP),
  "clip_gelu": clip.CLIPTextEncoder(dataclasses.replace(_CLIP, hidden_act="gelu")),
  "clip_projection": clip.CLIPTextEncoderWithProjection(
    dataclasses.replace(_CLIP_2, eos_token_id=57)
  ),
  # The end token that older configs state, whatever the tokenizer's is.
  "clip_projection_2": clip.CLIPTextEncoderWithProjection(
    dataclasses.replace(_CLIP_2, eos_token_id=2)
  ),
}


def _full_size() -> dict[str, tuple[Any, int]]:
  published = architectures.ARCHITECTURES
  sd1, sd2, sdxl = (published[name] for name in ("sd1.5", "sd2.1", "sdxl-base"))
  return {
    "sd1_unet": (unet.UNet2DCondition(sd1.unet), 859_520_964),
    "sd2_unet": (unet.UNet2DCondition(sd2.unet), 865_910_724),
    "sdxl_unet": (unet.UNet2DCondition(sdxl.unet), 2_567_463_684),
    "sd_vae": (vae.AutoencoderKL(sd1.vae), 83_653_863),
    "sd1_clip": (clip.CLIPTextEncoder(sd1.texts[0]), 123_060_480),
    "sd2_clip": (clip.CLIPTextEncoder(sd2.texts[0]), 340_387_840),
    "sdxl_clip": (clip.CLIPTextEncoder(sdxl.texts[0]), 123_060_480),
    "sdxl_clip_2": (clip.CLIPTextEncoderWithProjection(sdxl.texts[1]), 694_659_840),
  }


# The networks of the published models, each with its number of parameters as PyTorch counts them.
FULL_SIZE = _full_size()


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """`{'down_blocks_0/resnets_0/norm1/scale': (16,), ...}`, sorted."""
  return {"/".join(k): v.shape for k, v in sorted(traverse_util.flatten_dict(tree).items())}


def random_params(module: Any, seed: int) -> dict[str, Any]:
  """Float32 parameters for `module` that keep the size of activations and leave nothing at 0 or 1.

  Each array has a stream of its own, named by its path, so that one changed module leaves the
  others as they are.
  """
  params = {}
  for path, leaf in traverse_util.flatten_dict(param_shapes(module)).items():
    rng = np.random.RandomState(zlib.crc32("/".join(path).encode()) + seed)
    array = rng.standard_normal(leaf.shape)
    if path[-1] == "kernel":
      array *= np.prod(leaf.shape[:-1]) ** -0.5
    elif path[-1] == "scale":
      array = 1 + 0.2 * array
    elif path[-1] == "bias":
      array *= 0.2
    params[path] = array.astype(np.float32)
  return traverse_util.unflatten_dict(params)


def inputs(name: str) -> dict[str, np.ndarray]:
  """The inputs of `MODULES[name]`; images and latents are channels last."""
  rng = np.random.RandomState(7)
  module = MODULES[name]
  if isinstance(module, unet.UNet2DCondition):
    c = module.config
    arrays = {
      "latents": rng.standard_normal((2, 8, 8, c.in_channels)).astype(np.float32),
      "timesteps": np.array([981, 21], np.int32),
      "text": rng.standard_normal((2, 7, c.cross_attention_dim)).astype(np.float32),
    }
    if c.addition_embed_type is not None:
      arrays["pooled"] = rng.standard_normal((2, c.pooled_features)).astype(np.float32)
      arrays["sizes"] = np.array([[64, 48, 0, 0, 64, 48], [900, 700, 16, 8, 512, 512]], np.float32)
    return arrays
  if isinstance(module, vae.AutoencoderKL):
    return {
      "images": rng.uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32),
      "latents": rng.standard_normal((2, 8, 8, 4)).astype(np.float32),
    }
  ids = rng.randint(0, 56, (2, 16)).astype(np.int32)
  # The end token of one config, twice, and the highest of all.
  ids[:, 5], ids[:, 8], ids[:, 11] = 57, 57, 59
  return {"ids": ids}


def unet_inputs(name: str) -> tuple[np.ndarray, np.ndarray, Conditioning]:
  """`inputs(name)` as `UNet2DCondition` takes them."""
  given = inputs(name)
  latents, timesteps = given.pop("latents"), given.pop("timesteps")
  return latents, timesteps, Conditioning(**given)


def flax_outputs(name: str, **replacements: Any) -> dict[str, np.ndarray]:
  """What the Flax module makes of `inputs(name)`; `replacements` are attributes of the module."""
  module, given = MODULES[name].clone(**replacements), inputs(name)
  variables = {"params": random_params(module, seed=1)}
  apply = jax.jit(module.apply, static_argnames="method")
  if isinstance(module, unet.UNet2DCondition):
    outputs = {"sample": apply(variables, *unet_inputs(name))}
  elif isinstance(module, vae.AutoencoderKL):
    mean, logvar = apply(variables, given["images"], method="encode")
    image = apply(variables, given["latents"], method="decode")
    outputs = {"mean": mean, "logvar": logvar, "image": image}
  elif isinstance(module, clip.CLIPTextEncoderWithProjection):
    before_last, pooled = apply(variables, given["ids"])
    outputs = {"before_last": before_last, "pooled": pooled}
  else:
    before_last = apply(variables, given["ids"], method="before_last")
    outputs = {"states": apply(variables, given["ids"]), "before_last": before_last}
  return jax.tree.map(np.asarray, outputs)


flax_outputs_once = functools.cache(flax_outputs)


def torch_class(module: Any) -> Any:
  """The PyTorch model that corresponds to `module`, with some weights."""
  import diffusers

  config = dataclasses.asdict(module.config)
  if isinstance(module, unet.UNet2DCondition):
    return diffusers.UNet2DConditionModel(**config)
  if isinstance(module, vae.AutoencoderKL):
    return diffusers.AutoencoderKL(**config)
  import transformers

  config = transformers.CLIPTextConfig(**config)
  if isinstance(module, clip.CLIPTextEncoderWithProjection):
    return transformers.CLIPTextModelWithProjection(config)
  return transformers.CLIPTextModel(config)


def torch_tree(module: Any) -> dict[str, tuple[int, ...]]:
  """Name and shape of each of its parameters; it is made without memory for them."""
  import torch

  with torch.device("meta"):
    return {name: tuple(v.shape) for name, v in torch_class(module).named_parameters()}


def torch_model(module: Any, params: Any) -> Any:
  """The PyTorch model that is `module` with `params`; strict about names and shapes."""
  import torch

  torch.set_num_threads(1)  # on networks as small as these, threads wait for each other
  model = torch_class(module)
  state = {name: torch.from_numpy(array) for name, array in torch_layout.to_torch(params).items()}
  model.load_state_dict(state, strict=True)
  return model.eval()


def torch_outputs(name: str) -> dict[str, np.ndarray]:
  """What the PyTorch model makes of `inputs(name)`, channels last."""
  import torch

  module = MODULES[name]
  model = torch_model(module, random_params(module, seed=1))
  given = {key: torch.from_numpy(value) for key, value in inputs(name).items()}

  def first(x):
    return x.permute(0, 3, 1, 2)

  def last(x):
    return np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy())

  with torch.no_grad():
    if isinstance(module, unet.UNet2DCondition):
      added = None
      if "pooled" in given:
        added = {"text_embeds": given["pooled"], "time_ids": given["sizes"]}
      y = model(first(given["latents"]), given["timesteps"], given["text"], added_cond_kwargs=added)
      return {"sample": last(y.sample)}
    if isinstance(module, vae.AutoencoderKL):
      moments = model.encode(first(given["images"])).latent_dist
      image = model.decode(first(given["latents"])).sample
      return {"mean": last(moments.mean), "logvar": last(moments.logvar), "image": last(image)}
    y = model(given["ids"], output_hidden_states=True)
    before_last = {"before_last": y.hidden_states[-2].numpy()}
    if isinstance(module, clip.CLIPTextEncoderWithProjection):
      return before_last | {"pooled": y.text_embeds.numpy()}
    return before_last | {"states": y.last_hidden_state.numpy()}


PROMPTS = ("a photo of a dog", "two cats")
GUIDANCE = 5.0
STEPS = 10
SCHEDULER = {
  "_class_name": "DDIMScheduler",
  "num_train_timesteps": 1000,
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "clip_sample": False,
  "set_alpha_to_one": False,
  "steps_offset": 1,
}
# Schedules that differ from `SCHEDULER` in what is given here.
SCHEDULES = {
  "linspace": {"timestep_spacing": "linspace"},
  "linspace_to_one": {"timestep_spacing": "linspace", "set_alpha_to_one": True},
  "trailing": {"timestep_spacing": "trailing"},
  "trained_betas": {"trained_betas": [0.01 + 1e-5 * (i % 7) for i in range(1000)]},
  "zero_snr": {
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
  },
}


def tokenizer(**options: Any) -> tokens_lib.Tokenizer:
  """A CLIP tokenizer of 16 tokens a prompt that knows the words of `PROMPTS`."""
  letters = [chr(c) for c in range(33, 127)]
  tokens = [*letters, *(letter + "</w>" for letter in letters)]
  merges = []
  for word in sorted({word for prompt in PROMPTS for word in prompt.split()}):
    left, *rest = [*word[:-1], word[-1] + "</w>"]
    for right in rest:
      if (left, right) not in merges:
        merges.append((left, right))
        tokens.append(left + right)
      left += right
  tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
  vocabulary = {token: i for i, token in enumerate(tokens)}
  return tokens_lib.clip(vocabulary, merges, length=16, **options)


def tiny_pipeline(kind: str = "epsilon") -> StableDiffusion:
  """A whole Stable Diffusion with random weights: 32x32 images, 8x8x4 latents, 16 tokens.

  `kind` is 'epsilon' (in the manner of SD 1.x), 'v_prediction' (SD 2.x) or 'sdxl'.
  """
  words = (tokenizer(),)
  encoder = dataclasses.replace(
    _CLIP,
    vocab_size=len(words[0]),
    bos_token_id=words[0].begin_id,
    eos_token_id=words[0].end_id,
    pad_token_id=words[0].pad_id,
  )
  denoiser = dataclasses.replace(_UNET_SD2, cross_attention_dim=32)
  if kind == "epsilon":
    denoiser = dataclasses.replace(denoiser, attention_head_dim=4, use_linear_projection=False)
  else:
    encoder = dataclasses.replace(encoder, hidden_act="gelu")
  modules = {
    "unet": unet.UNet2DCondition(_UNET_SDXL if kind == "sdxl" else denoiser),
    "vae": MODULES["vae"],
    "text_encoder": clip.CLIPTextEncoder(encoder),
  }
  if kind == "sdxl":
    words = (*words, tokenizer(pad="!"))
    modules["text_encoder_2"] = clip.CLIPTextEncoderWithProjection(
      dataclasses.replace(_CLIP_2, vocab_size=len(words[1]), eos_token_id=2)
    )
  params = {name: random_params(module, seed=2) for name, module in modules.items()}
  # Guidance multiplies what a random network predicts: smaller, so that values stay moderate.
  params["unet"]["conv_out"] = {k: 0.2 * v for k, v in params["unet"]["conv_out"].items()}
  prediction_type = "v_prediction" if kind == "v_prediction" else "epsilon"
  return StableDiffusion(
    unet=modules["unet"],
    vae=modules["vae"],
    text_encoders=tuple(v for k, v in modules.items() if k.startswith("text_encoder")),
    tokenizers=words,
    scheduler={**SCHEDULER, "prediction_type": prediction_type},
    params=params,
    zero_empty=kind == "sdxl",
  )


def fingerprint(params: Any) -> str:
  """What `pretrained.load` says of a model with these parameters, if asked to identify it."""
  found = streaming.Fingerprint()
  for path, array in sorted(traverse_util.flatten_dict(params).items()):
    found.add(path, np.asarray(array))
  return found.bytes().hex()


@contextlib.contextmanager
def cudnn() -> Iterator[None]:
  """A machine with cuDNN, as far as lowering looks."""
  versions = types.SimpleNamespace(cudnn_get_version=lambda: 91200)
  attention._cudnn_traces.cache_clear()
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", versions)
    yield
  attention._cudnn_traces.cache_clear()
