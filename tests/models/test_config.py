import dataclasses
import json

import pytest

from rlft.models import architectures, clip, unet, vae
from rlft.types import UserError

# The configuration of the UNet of Stable Diffusion 1.5, as published.
SD1_UNET = {
  "_class_name": "UNet2DConditionModel",
  "_diffusers_version": "0.6.0",
  "act_fn": "silu",
  "attention_head_dim": 8,
  "block_out_channels": [320, 640, 1280, 1280],
  "center_input_sample": False,
  "cross_attention_dim": 768,
  "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
  "downsample_padding": 1,
  "flip_sin_to_cos": True,
  "freq_shift": 0,
  "in_channels": 4,
  "layers_per_block": 2,
  "mid_block_scale_factor": 1,
  "norm_eps": 1e-05,
  "norm_num_groups": 32,
  "out_channels": 4,
  "sample_size": 64,
  "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}


# The same of SDXL base; options that are as in SD 1.5 left out.
SDXL_UNET = SD1_UNET | {
  "_diffusers_version": "0.19.0.dev0",
  "addition_embed_type": "text_time",
  "addition_embed_type_num_heads": 64,
  "addition_time_embed_dim": 256,
  "attention_head_dim": [5, 10, 20],
  "block_out_channels": [320, 640, 1280],
  "class_embed_type": None,
  "cross_attention_dim": 2048,
  "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
  "mid_block_only_cross_attention": None,
  "num_attention_heads": None,
  "projection_class_embeddings_input_dim": 2816,
  "sample_size": 128,
  "transformer_layers_per_block": [1, 2, 10],
  "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
  "upcast_attention": None,
  "use_linear_projection": True,
}


def test_the_published_configs():
  config = unet.UNetConfig.from_dict(SD1_UNET)
  assert config == unet.UNetConfig(cross_attention_dim=768, sample_size=64)
  assert config.heads == (8, 8, 8, 8) and config.depths == (1, 1, 1, 1)
  assert config.pooled_features == 0
  hash(config)
  config = unet.UNetConfig.from_dict(SDXL_UNET)
  assert config.heads == (5, 10, 20) and config.depths == (1, 2, 10)
  assert config.pooled_features == 1280  # 2816 - 6 * 256
  published = architectures.ARCHITECTURES["sdxl-base"].unet
  assert config == dataclasses.replace(published, upcast_attention=None)


@pytest.mark.parametrize(
  "value", [{}, "512", None, 0, -512, 512.0, True, [512], 10**12, float("nan")]
)
def test_a_size_that_is_none_is_refused(value):
  with pytest.raises(UserError, match="^there: hidden_size=.* is not supported"):
    clip.CLIPTextConfig.from_dict({"hidden_size": value}, "there")


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("num_hidden_layers", 1001),
    ("hidden_act", 1),
    ("layer_norm_eps", float("inf")),
    ("layer_norm_eps", float("nan")),
    ("layer_norm_eps", 10**12),
    ("layer_norm_eps", 10**400),
    ("eos_token_id", "2"),
  ],
)
def test_a_value_of_another_type_is_refused(key, value):
  with pytest.raises(UserError, match=f"{key}=.* is not supported"):
    clip.CLIPTextConfig.from_dict({key: value})


@pytest.mark.parametrize("cls", [unet.UNetConfig, vae.VAEConfig, clip.CLIPTextConfig])
def test_what_is_written_is_read(cls):
  written = json.loads(json.dumps(dataclasses.asdict(cls())))
  assert cls.from_dict(written) == cls()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"addition_embed_type": "text_image"}, "addition_embed_type='text_image' is not supported"),
    ({"addition_embed_type": "text_time"}, "projection_class_embeddings_input_dim=None must be"),
    ({"time_cond_proj_dim": 256}, "time_cond_proj_dim=256 is not supported"),
    ({"in_channels": 9}, "in_channels=9, but out_channels=4: a model that changes images"),
    ({"mid_block_scale_factor": 2}, r"mid_block_scale_factor=2 is not supported \(only 1\)"),
    ({"dropout": 0.1}, "dropout=0.1"),
    ({"num_class_embeds": 10}, "num_class_embeds=10"),
    ({"wings": 2}, "unknown option wings=2"),
    ({"transformer_layers_per_block": [1, 2, 10]}, "must be one value or 4"),
    ({"transformer_layers_per_block": [1, 1, 1, [1, 2]]}, "transformer_layers_per_block="),
    ({"layers_per_block": [1, 2, 2, 2]}, "layers_per_block"),
    ({"block_out_channels": [320, 640]}, "down_block_types"),
    ({"down_block_types": ["AttnDownBlock2D"] * 4}, "down_block_types"),
    ({"attention_head_dim": [8, 8]}, "must be one value or 4"),
    ({"attention_head_dim": 7}, "of the heads"),
    ({"norm_num_groups": 48}, "norm_num_groups=48"),
  ],
)
def test_a_unet_that_is_not_implemented_is_refused(change, message):
  with pytest.raises(UserError, match=message) as error:
    unet.UNetConfig.from_dict(SD1_UNET | change, "dir/config.json")
  assert "\n" not in str(error.value)


def test_the_refiner_of_sdxl_is_refused():
  # 2560 = 5 * 256 for an aesthetic score and four sizes, and 1280 of pooled text.
  refiner = {"cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 2560}
  with pytest.raises(UserError, match="the refiner of SDXL.* or SDXL base text-to-image model"):
    unet.UNetConfig.from_dict(SDXL_UNET | refiner)


def test_options_that_switch_something_off_are_accepted():
  off = {"num_class_embeds": None, "mid_block_only_cross_attention": False, "dropout": 0.0}
  off |= {"addition_embed_type_num_heads": 64, "time_embedding_type": "positional"}
  assert unet.UNetConfig.from_dict(SD1_UNET | off) == unet.UNetConfig.from_dict(SD1_UNET)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"use_quant_conv": False}, "use_quant_conv=False is not supported"),
    ({"shift_factor": 0.1}, "shift_factor=0.1"),
    ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "1 times DownEncoderBlock2D"),
    ({"block_out_channels": [48]}, "multiples of norm_num_groups=32"),
  ],
)
def test_a_vae_that_is_not_implemented_is_refused(change, message):
  with pytest.raises(UserError, match=message):
    vae.VAEConfig.from_dict({"block_out_channels": [64]} | change)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model_type": "t5"}, "model_type='t5' is not supported"),
    ({"hidden_act": "relu"}, "must be one of quick_gelu, gelu"),
    ({"num_attention_heads": 7}, "multiple of num_attention_heads=7"),
  ],
)
def test_a_text_encoder_that_is_not_implemented_is_refused(change, message):
  with pytest.raises(UserError, match=message):
    clip.CLIPTextConfig.from_dict({"initializer_factor": 1.0} | change)
