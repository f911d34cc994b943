"""How large the work is: published models for one accelerator of 80 GB, or tiny ones for a test."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import pathlib
import types
from typing import Any

from rlft.models import architectures, blip, clip, image_reward, unet, vae
from rlft.models.architectures import Architecture
from rlft.performance.benchmark import work
from rlft.performance.benchmark.ports import PORTS

_ROOT = pathlib.Path(__file__).parents[3]
_REWARD = "jax:rlft.performance.benchmark.work:brightness"


@dataclasses.dataclass(frozen=True)
class Model:
  """A model, and a training of it.

  Attributes:
    name: in the table.
    architecture: makes its description.
    images: in a batch.
    microbatch: of them, at once in the UNet.
    steps: T.
    lora_rank: 0 trains the whole UNet.
    decode_chunk: images at once in the VAE.
  """

  name: str
  architecture: Callable[[], Architecture]
  images: int
  microbatch: int
  steps: int
  lora_rank: int = 0
  decode_chunk: int = 4


@dataclasses.dataclass(frozen=True)
class Scale:
  """The work of all parts.

  Attributes:
    large: the model that is fine-tuned whole.
    wide: the one with an adapter.
    checked: the one whose numbers are compared with a CPU's.
    timesteps: trained in an iteration of `large`.
    levers: settings that are tried in the place of `large`'s own.
    attention: (images, queries, keys, heads, features) of attention.
    product: rows of the matrices whose products are the device's rate.
    repeats: timed calls.
    rewards: configs of ports by name.
    reward_images, reward_size: images that are scored at once, and their height and width.
    run: the lines of a flagfile for a whole run; is given a directory to write a model to.
    run_note: what it is.
  """

  large: Model
  wide: Model
  checked: Model
  timesteps: int
  levers: tuple[Mapping[str, Any], ...]
  attention: tuple[tuple[int, int, int, int, int], ...]
  product: int
  repeats: int
  rewards: Mapping[str, Any]
  reward_images: int
  reward_size: int
  run: Callable[[pathlib.Path], list[str]]
  run_note: str


def _published(name: str) -> Callable[[], Architecture]:
  return functools.partial(architectures.get, name)


def _checked() -> Architecture:
  """32 x 32 latents: as many tokens as TPUs have a kernel for."""
  return work.random_architecture((32, 64), (True, False), heads=4, features=32, sample_size=32)


def _tiny() -> Architecture:
  """What compiles in seconds: one level, with a transformer in the middle alone."""
  text = clip.CLIPTextConfig(
    vocab_size=work.VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    projection_dim=32,
    bos_token_id=work.VOCABULARY - 2,
    eos_token_id=work.VOCABULARY - 1,
  )
  return Architecture(
    unet=unet.UNetConfig(
      sample_size=8,
      down_block_types=("DownBlock2D",),
      up_block_types=("UpBlock2D",),
      block_out_channels=(32,),
      layers_per_block=1,
      norm_num_groups=8,
      cross_attention_dim=32,
      attention_head_dim=2,
    ),
    vae=vae.VAEConfig(
      block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, sample_size=8
    ),
    texts=(text,),
    scheduler=architectures.get("sd2-base").scheduler,
  )


def _tiny_wide() -> Architecture:
  """SDXL's kind: two text encoders, pooled text, sizes of images."""
  tiny = _tiny()
  network = dataclasses.replace(
    tiny.unet,
    cross_attention_dim=64,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=32 + 6 * 8,
  )
  return dataclasses.replace(tiny, unet=network, texts=2 * tiny.texts, zero_empty=True)


def _default_run(folder: pathlib.Path) -> list[str]:
  del folder
  lines = (_ROOT / "experiments" / "emoji_joint.flags").read_text().splitlines()
  return [line for line in lines if line.startswith("--") and not line.startswith("--workdir=")]


def _tiny_run(folder: pathlib.Path) -> list[str]:
  work.make_model(work.Size(_tiny, 8, 2, 1.0, 1), folder)
  task = f"name=a,prompts={work.PROMPTS},reward={_REWARD},batch_size=8"
  return [
    f"--pretrained={folder / 'model'}",
    f"--task={task}",
    "--sampling_steps=2",
    "--guidance_scale=1",
    "--train_timesteps=1",
    "--pretrain_weight=0",
    "--iterations=2",
    "--compute_dtype=float32",
  ]


FULL = Scale(
  large=Model("SD 2, 512 x 512, all weights", _published("sd2-base"), 32, 8, 50),
  wide=Model(
    "SDXL, 1024 x 1024, LoRA", _published("sdxl-base"), 4, 2, 20, lora_rank=16, decode_chunk=1
  ),
  checked=Model("32 x 32 latents", _checked, 16, 8, 10),
  timesteps=5,
  levers=(
    {"microbatch": 16},
    {"microbatch": 4},
    {"microbatch": 4, "remat": False},
    {"microbatch": 32},
  ),
  attention=(
    (8, 4096, 4096, 5, 64),  # SD 2
    (8, 4096, 77, 5, 64),
    (8, 1024, 1024, 10, 64),
    (8, 64, 64, 20, 64),
    (8, 4096, 4096, 8, 40),  # SD 1.5
    (8, 256, 256, 8, 160),
    (8, 4096, 4096, 10, 64),  # SDXL
    (8, 1024, 77, 20, 64),
  ),
  product=8192,
  repeats=3,
  rewards=types.MappingProxyType(
    {name: PORTS[name].config for name in ("image-reward", "pickscore")}
  ),
  reward_images=64,
  reward_size=512,
  run=_default_run,
  run_note="experiments/emoji_joint.flags",
)

TINY = Scale(
  large=Model("tiny", _tiny, 4, 2, 2, decode_chunk=2),
  wide=Model("tiny, two encoders, LoRA", _tiny_wide, 2, 1, 2, lora_rank=2, decode_chunk=1),
  checked=Model("8 x 8 latents", _tiny, 4, 2, 2, decode_chunk=2),  # `large`, compiled once
  timesteps=2,
  levers=({"microbatch": 4},),
  attention=((2, 64, 64, 2, 16), (2, 64, 7, 2, 16)),
  product=256,
  repeats=1,
  rewards=types.MappingProxyType(
    {
      "image-reward": image_reward.ImageRewardConfig(
        vision=blip.VisionConfig(32, 16, 32, 64, 1, 4),
        text=blip.TextConfig(64, 16, 24, 40, 1, 3),
        text_length=10,
        head_widths=(8, 4),
      ),
      "pickscore": clip.CLIPConfig(
        clip.CLIPTextConfig(
          vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, eos_token_id=63
        ),
        clip.CLIPVisionConfig(
          hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
        ),
        projection_dim=16,
      ),
    }
  ),
  reward_images=2,
  reward_size=32,
  run=_tiny_run,
  run_note="a tiny model, two iterations",
)

SCALES: Mapping[str, Scale] = types.MappingProxyType({"full": FULL, "tiny": TINY})
