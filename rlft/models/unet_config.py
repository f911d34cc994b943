"""What varies between the UNets of Stable Diffusion 1.x, 2.x and XL, and what is refused."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from rlft.models import config as config_lib

_DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
_UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")

# Options of the PyTorch class that change what is computed, with the value implemented here.
_FIXED = {
  "act_fn": "silu",
  "attention_type": "default",
  "center_input_sample": False,
  "class_embed_type": None,
  "class_embeddings_concat": False,
  "conv_in_kernel": 3,
  "conv_out_kernel": 3,
  "cross_attention_norm": None,
  "downsample_padding": 1,
  "dropout": 0.0,
  "dual_cross_attention": False,
  "encoder_hid_dim": None,
  "encoder_hid_dim_type": None,
  "mid_block_only_cross_attention": None,
  "mid_block_scale_factor": 1,
  "mid_block_type": "UNetMidBlock2DCrossAttn",
  "num_attention_heads": None,
  "num_class_embeds": None,
  "resnet_out_scale_factor": 1.0,
  "resnet_skip_time_act": False,
  "resnet_time_scale_shift": "default",
  "reverse_transformer_layers_per_block": None,
  "time_cond_proj_dim": None,
  "time_embedding_act_fn": None,
  "time_embedding_dim": None,
  "time_embedding_type": "positional",
  "timestep_post_act": None,
}
_IGNORED = ("addition_embed_type_num_heads",)

SIZES = 6  # numbers in `Conditioning.sizes`
_REFINER_SIZES = 5  # SDXL's refiner is told an aesthetic score in the place of the target's size


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """What varies between the UNets of SD 1.x, 2.x and XL; names and defaults are diffusers'.

  Attributes:
    attention_head_dim: number of heads (the name is wrong in diffusers), for all levels or each.
    transformer_layers_per_block: blocks of each transformer, for all levels or each; the middle is
      as the last level.
    addition_embed_type: 'text_time' adds an embedding of pooled text and image sizes to that of the
      timestep (SDXL).
    addition_time_embed_dim: features of each of the sizes.
    projection_class_embeddings_input_dim: features of the pooled text and of all sizes together.
    upcast_attention: kept for saving; attention weights are always computed in float32 here.
    sample_size: latent height and width the model was made for; kept for saving.
    (others: as in diffusers' `UNet2DConditionModel`.)
  """

  sample_size: int | tuple[int, int] | None = None
  in_channels: int = 4
  out_channels: int = 4
  flip_sin_to_cos: bool = True
  freq_shift: int = 0
  down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
  up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
  only_cross_attention: bool | tuple[bool, ...] = False
  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  layers_per_block: int = 2
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  cross_attention_dim: int = 1280
  attention_head_dim: int | tuple[int, ...] = 8
  transformer_layers_per_block: int | tuple[int, ...] = 1
  use_linear_projection: bool = False
  upcast_attention: bool | None = False
  addition_embed_type: str | None = None
  addition_time_embed_dim: int | None = None
  projection_class_embeddings_input_dim: int | None = None

  def __post_init__(self):
    levels = len(self.block_out_channels)
    for name, known in (("down_block_types", _DOWN_BLOCKS), ("up_block_types", _UP_BLOCKS)):
      found = getattr(self, name)
      config_lib.require(
        len(found) == levels and set(found) <= set(known),
        f"UNet config: {name}={found} must be {levels} of {known}, one for each of "
        f"block_out_channels={self.block_out_channels}",
      )
    for name in ("layers_per_block", "cross_attention_dim", "norm_num_groups"):
      found = getattr(self, name)
      config_lib.require(
        isinstance(found, int), f"UNet config: {name}={found} is not supported; only one integer"
      )
    for name in ("attention_head_dim", "only_cross_attention", "transformer_layers_per_block"):
      found = getattr(self, name)
      config_lib.require(
        not isinstance(found, tuple) or len(found) == levels,
        f"UNet config: {name}={found} must be one value or {levels}",
      )
    for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
      config_lib.require(
        channels % self.norm_num_groups == 0 and channels % heads == 0,
        f"UNet config: block_out_channels={self.block_out_channels} must be multiples of "
        f"norm_num_groups={self.norm_num_groups} and of the heads {self.heads}",
      )
    config_lib.require(
      all(isinstance(depth, int) for depth in self.depths),
      f"UNet config: transformer_layers_per_block={self.transformer_layers_per_block} is not "
      "supported; only an integer for each level",
    )
    config_lib.require(
      self.addition_embed_type in (None, "text_time"),
      f"UNet config: addition_embed_type={self.addition_embed_type!r} is not supported (only "
      f"'text_time' or none); {config_lib.USE_SUPPORTED}",
    )
    if self.addition_embed_type is not None:
      each, total = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
      config_lib.require(
        each is not None and total is not None and total > SIZES * each,
        f"UNet config: projection_class_embeddings_input_dim={total} must be more than {SIZES} "
        f"times addition_time_embed_dim={each}: the features of pooled text and sizes",
      )

  @property
  def heads(self) -> tuple[int, ...]:
    """Attention heads of each level, from the largest map to the smallest."""
    return self._per_level(self.attention_head_dim)

  @property
  def depths(self) -> tuple[int, ...]:
    """Blocks of a transformer of each level."""
    return self._per_level(self.transformer_layers_per_block)

  @property
  def pooled_features(self) -> int:
    """F, the size of the embedding of a whole text; 0 without one."""
    if self.addition_embed_type is None:
      return 0
    return self.projection_class_embeddings_input_dim - SIZES * self.addition_time_embed_dim

  @property
  def cross_only(self) -> tuple[bool, ...]:
    """Whether the first attention of a level's transformers also attends to the text."""
    return self._per_level(self.only_cross_attention)

  def _per_level(self, value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

  @classmethod
  def from_dict(cls, data: Mapping[str, Any], what: str = "UNet config") -> "UNetConfig":
    """From a parsed `unet/config.json`; raises `UserError` on anything not implemented."""
    config = config_lib.parse(cls, data, what=what, fixed=_FIXED, ignored=_IGNORED)
    config_lib.require(
      config.in_channels == config.out_channels,
      f"{what}: in_channels={config.in_channels}, but out_channels={config.out_channels}: a model "
      f"that changes images (inpainting, depth); {config_lib.USE_SUPPORTED}",
    )
    if config.addition_embed_type is not None:
      each, total = config.addition_time_embed_dim, config.projection_class_embeddings_input_dim
      config_lib.require(
        total != config.cross_attention_dim + _REFINER_SIZES * each,
        f"{what}: the refiner of SDXL, which only finishes images; {config_lib.USE_SUPPORTED}",
      )
    return config
