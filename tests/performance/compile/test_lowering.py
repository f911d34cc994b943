"""Every program of an iteration can be lowered for TPUs and GPUs on a machine that has neither.

What fails here would fail on the first accelerator: a host callback, a kernel that does not take
its shapes, an operation without a rule for the platform.
"""

import dataclasses

import jax
import jax.numpy as jnp
import models_cases
import pytest
import train_cases

from rlft import catalog
from rlft.config import fields
from rlft.config.settings import Config, TaskConfig
from rlft.models import dispatch, unet
from rlft.models.shapes import param_shapes
from rlft.performance.compile import targets
from rlft.performance.compile.abstract_run import AbstractRun
from rlft.rewards.scoring import scorer, trial
from rlft.types import Prompt

CONFIG = fields.make(
  Config,
  task=(TaskConfig(name="a", prompts="-", reward="-", batch_size=16, images_per_prompt=2),),
  sampling_steps=3,
  train_timesteps=2,
  guidance_scale=3.0,
  pretrain_batch_size=8,
  ema_decay=0.9,
  fsdp=4,
)
_RL_ONLY = {"pretrain_weight": 0.0, "ema_decay": 0.0}  # `full` has the other programs
VARIANTS = {
  "full": {},
  "lora": {"lora_rank": 2, "kl_weight": 0.1, "moments_dtype": "bfloat16"} | _RL_ONLY,
  "accumulated": {
    "accumulate_timesteps": True,
    "microbatch": 1,
    "decode_chunk": 1,
    "param_dtype": "bfloat16",
    "guidance_scale": 1.0,
    "remat": False,
  }
  | _RL_ONLY,
  "reward-weighted": {"algorithm": "reward-weighted", "train_timesteps": 5} | _RL_ONLY,
  "raft": {"algorithm": "raft?one_in=2", "train_timesteps": 5} | _RL_ONLY,
  "refl": {"algorithm": "refl?last=3", "train_timesteps": 5, "decode_chunk": 1} | _RL_ONLY,
  "draft": {"algorithm": "draft", "train_timesteps": 5, "lora_rank": 2} | _RL_ONLY,
}


@pytest.fixture(scope="module")
def mesh():
  return targets.open_target("cpu:8", 4).mesh


def model(config):
  """32 x 32 latents: as many tokens as TPUs have a kernel for."""
  tiny = train_cases.tiny_model(channels=16)
  network = unet.UNet2DCondition(
    dataclasses.replace(tiny.unet.config, sample_size=32),
    dtype=jnp.dtype(config.devices.compute_dtype),
    remat=config.devices.remat,
  )
  params = tiny.params | {"unet": param_shapes(network)}
  return dataclasses.replace(tiny, unet=network, params=params)


@pytest.fixture(scope="module", autouse=True)
def cudnn():
  """The kernels of a GPU's machine are chosen here, too."""
  with models_cases.cudnn():
    yield


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_program_lowers_for_every_platform(mesh, variant):
  config = fields.replace(CONFIG, **VARIANTS[variant])
  run = AbstractRun.of(config, mesh, model(config))
  with dispatch.for_platform("tpu"):
    calls = run.calls()
  others = ["pretrain", "average"] if config.pretraining.pretrain_weight else []
  graded = ["decode", "pull", "predict"] if variant in ("refl", "draft") else []
  assert [call.name for call in calls] == ["encode", "sample", *graded, "update", *others]
  for call in calls:
    with dispatch.for_platform("tpu"):  # The same trace serves both.
      traced = call.program.trace(*call.args)
    for platform in ("tpu", "cuda"):
      text = traced.lower(lowering_platforms=(platform,)).as_text()
      assert "callback" not in text
      attends = call.name not in ("encode", "average")  # To as many places as the kernel takes.
      assert ("tpu_custom_call" in text) == (platform == "tpu" and attends), call.name
      # cuDNN's is for half precision: the UNet's, not the VAE's.
      halves = platform == "cuda" and attends and call.name not in ("decode", "pull")
      assert ("cudnn$fmha" in text) == halves, call.name
      learns = call.name in ("update", "pretrain")
      assert ("fmhaSoftmaxBackward" in text) == (halves and learns), call.name


def test_every_program_of_xl_lowers_for_every_platform(mesh):
  config = fields.replace(CONFIG, lora_rank=2)
  large = models_cases.tiny_pipeline("sdxl")
  # What is XL's own: transformers of several blocks below, pooled text and sizes. The way up has
  # nothing that the way down has not.
  smaller = dataclasses.replace(
    large.unet.config,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    block_out_channels=(32, 64),
    attention_head_dim=(2, 4),
    transformer_layers_per_block=(1, 2),
  )
  network = unet.UNet2DCondition(smaller, dtype=jnp.bfloat16)
  params = large.params | {"unet": param_shapes(network)}
  small = dataclasses.replace(large, unet=network, params=params)
  run = AbstractRun.of(config, mesh, small)
  with dispatch.for_platform("tpu"):
    calls = run.calls()
  assert [call.name for call in calls] == ["encode", "sample", "update", "pretrain", "average"]
  for call in calls:
    with dispatch.for_platform("tpu"):  # The same trace serves both.
      traced = call.program.trace(*call.args)
    for platform in ("tpu", "cuda"):
      assert "callback" not in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
  "name",
  [
    "emoji-objects",  # OWL-ViT
    "emoji-preference",  # ImageReward
    "emoji-tone-parity",
    "skin-tone-parity",
    "oracle-both",
    "oracle-parity",
    "oracle-preference",
    "oracle-diversity",
  ],
)
def test_every_kind_of_reward_lowers_for_every_platform(name):
  reward = catalog.make_reward(name)
  prompts = [Prompt("a judge", {"objects": ["dog"], "occupation": "judge"})] * 2
  group = 4 if reward.is_set else 1
  images, features = trial.example(reward, prompts, group, (32, 32, 3))
  program = jax.jit(lambda *given: scorer.apply(reward, group, *given))
  with dispatch.for_platform("tpu"):
    traced = program.trace(reward.params, images, features)
  assert "callback" not in traced.lower(lowering_platforms=("tpu", "cuda")).as_text()
