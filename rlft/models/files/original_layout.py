"""Stable Diffusion's arrays as its authors name them, and the same as diffusers names them.

    model.diffusion_model.*              UNet
    first_stage_model.*                  VAE
    cond_stage_model.transformer.*       text encoder of 1.x, with transformers' names
    cond_stage_model.model.*             text encoder of 2.x, with OpenCLIP's names
    conditioner.embedders.0.*, .1.*      both of SDXL, one with each

Blocks have running numbers there; in diffusers they are counted within each resolution.
"""

from collections.abc import Callable, Collection, Iterable
import dataclasses
import re

from rlft.models.files import clip_weights
from rlft.models.files.arrays import Piece

UNET, VAE = "model.diffusion_model.", "first_stage_model."
_CLIP, _OPEN_CLIP = "transformer.", "model."  # the ends of text encoders' prefixes
_VIT_H_LAYERS = 24

# Not parameters of what is run, or not needed for it.
_IGNORED = re.compile(
  "|".join(
    (
      # The noise schedule: it follows from the scheduler's configuration.
      r"^(betas|logvar|lvlb_weights|posterior_\w+|\w*alphas_cumprod\w*)$",
      r"^denoiser\.(log_)?sigmas$",
      # Averaged weights beside those that the author chose to be used.
      r"^model_ema\.",
      # Marks without numbers, which `single_file` looks for.
      r"^(v_pred|ztsnr)$",
      # The numbers 0, 1, 2, ...
      r"\.position_ids$",
      # Of the loss that CLIP was trained with.
      r"\.logit_scale$",
      # Of text encoders whose states before it are used: all but the second of SDXL.
      r"^(cond_stage_model|conditioner\.embedders\.0)\."
      r"((transformer|model)\.)?text_projection(\.weight)?$",
    )
  )
)

# Applied one after the other to what follows the place of a block.
_UNET_BLOCK = (
  (r"^in_layers\.0\.", "norm1."),
  (r"^in_layers\.2\.", "conv1."),
  (r"^emb_layers\.1\.", "time_emb_proj."),
  (r"^out_layers\.0\.", "norm2."),
  (r"^out_layers\.3\.", "conv2."),
  (r"^skip_connection\.", "conv_shortcut."),
)
_UNET_OTHERS = (
  (r"^time_embed\.0\.", "time_embedding.linear_1."),
  (r"^time_embed\.2\.", "time_embedding.linear_2."),
  (r"^label_emb\.0\.0\.", "add_embedding.linear_1."),
  (r"^label_emb\.0\.2\.", "add_embedding.linear_2."),
  (r"^input_blocks\.0\.0\.", "conv_in."),
  (r"^middle_block\.1\.", "mid_block.attentions.0."),
  (r"^out\.0\.", "conv_norm_out."),
  (r"^out\.2\.", "conv_out."),
)
_VAE = (
  (r"\.down\.(\d+)\.", r".down_blocks.\1."),
  (r"\.block\.(\d+)\.", r".resnets.\1."),
  (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
  (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
  (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
  (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
  (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
  (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
  (r"\.nin_shortcut\.", ".conv_shortcut."),
  (r"\.norm_out\.", ".conv_norm_out."),
)


def pads_with_end(prefix: str) -> bool:
  """Whether the text encoder was trained on texts padded with their end, not with token 0."""
  return prefix.endswith(_CLIP)


def needed(names: Collection[str], towers: tuple[str, ...]) -> list[str]:
  """The names in a file without those that stand for nothing that is run.

  Args:
    names: all.
    towers: what those of the text encoders begin with.
  """
  found = [name for name in names if not _IGNORED.search(name)]
  if len(towers) > 1 or not towers[0].endswith(_OPEN_CLIP):
    return found
  # Stable Diffusion 2 is told the states before the last layer of OpenCLIP's tower, which many
  # files have nevertheless. Files from diffusers end before it, and have no projection either.
  (prefix,) = towers
  begin = f"{prefix}transformer.resblocks."
  block = re.compile(rf"{re.escape(begin)}(\d+)\.")
  layers = 1 + max((int(match[1]) for name in found if (match := block.match(name))), default=0)
  if f"{prefix}text_projection" not in names and layers != _VIT_H_LAYERS:
    return found
  return [name for name in found if not name.startswith(f"{begin}{layers - 1}.")]


def unet(names: Collection[str]) -> dict[str, Piece]:
  """The UNet's arrays by diffusers' names; names that are not known stay."""
  halving = re.compile(rf"{re.escape(UNET)}input_blocks\.(\d+)\.0\.op\.weight")
  # The blocks of a resolution, with the one that halves it, follow the first convolution.
  blocks = min((int(match[1]) for name in names if (match := halving.fullmatch(name))), default=1)

  def rename(name: str) -> str:
    match = re.match(r"(input|middle|output)_blocks?\.(\d+)\.", name)
    if match is None or name.startswith(("input_blocks.0.", "middle_block.1.")):
      return _apply(_UNET_OTHERS, name)
    part, number, rest = match[1], int(match[2]), name[match.end() :]
    if part == "middle":
      return f"mid_block.resnets.{number // 2}.{_apply(_UNET_BLOCK, rest)}"
    level, i = divmod(number - (part == "input"), blocks)
    begin = f"{'down' if part == 'input' else 'up'}_blocks.{level}"
    branch, _, rest = rest.partition(".")
    if rest.startswith("op."):
      return f"{begin}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    if rest.startswith("conv."):
      return f"{begin}.upsamplers.0.{rest}"
    if branch == "0":
      return f"{begin}.resnets.{i}.{_apply(_UNET_BLOCK, rest)}"
    return f"{begin}.attentions.{i}.{rest}"

  return _pieces(names, UNET, rename)


def vae(names: Collection[str]) -> dict[str, Piece]:
  """The VAE's arrays by diffusers' names; names that are not known stay."""
  down = re.compile(rf"{re.escape(VAE)}encoder\.down\.(\d+)\.")
  last = max((int(match[1]) for name in names if (match := down.match(name))), default=0)

  def rename(name: str) -> str:
    # The authors count the decoder's levels from the largest map, diffusers as they are run.
    if match := re.match(r"decoder\.up\.(\d+)\.", name):
      name = f"decoder.up_blocks.{last - int(match[1])}.{name[match.end() :]}"
    return _apply(_VAE, name)

  return _pieces(names, VAE, rename)


def text(names: Iterable[str], prefix: str) -> dict[str, Piece]:
  """The arrays of a text encoder by transformers' names; names that are not known stay."""
  if prefix.endswith(_CLIP):
    # Merges of files that other releases of transformers wrote lack `text_model.`.
    bare = r"^(?=(embeddings|encoder|final_layer_norm)\.)"
    return _pieces(names, prefix, lambda name: re.sub(bare, "text_model.", name))
  own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
  return {
    new: dataclasses.replace(piece, name=prefix + piece.name)
    for new, piece in clip_weights.open_clip_pieces(own).items()
  }


def _pieces(names: Iterable[str], prefix: str, rename: Callable[[str], str]) -> dict[str, Piece]:
  """`{new: old}` of the names with that prefix; the second of two with one new name has none."""
  pieces: dict[str, Piece] = {}
  for name in names:
    if name.startswith(prefix):
      new = rename(name.removeprefix(prefix))
      # In the VAE, the attention's dense layers are 1x1 convolutions.
      pieces.setdefault(new, Piece(name, flat=".attentions.0.to_" in new))
  return pieces


def _apply(rules: Iterable[tuple[str, str]], name: str) -> str:
  for pattern, new in rules:
    name = re.sub(pattern, new, name)
  return name
