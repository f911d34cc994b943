"""What each lever does to the memory of an update of Stable Diffusion 2.

    python experiments/compile_levers.py --json=runs/compile_levers.json

First what a device of v6e:8x16 keeps of the whole UNet, its optimizer and the frozen parts, which
takes no compiler; then what an update takes at the UNet's widest map.

The whole UNet takes half an hour for each row on two cores. Nearly all of its activations are at
the first of its four resolutions (64 x 64, 320 channels, 5 heads over 4,096 tokens), so this
compiles a UNet of that level alone, the other settings being those of `sd2_preference.flags`: 16
images a device with guidance, on v6e:2x4. 4 to 17 minutes a row on two cores; what has been
compiled is not compiled again. The result is in `compile.md`.
"""

import dataclasses
import json

from absl import flags

from rlft.config import fields
from rlft.config import flags as cli
from rlft.config.settings import Config, TaskConfig
from rlft.models import architectures
from rlft.performance.compile import ahead, targets
from rlft.performance.compile.abstract_run import AbstractRun, device_bytes, open_model
from rlft.performance.compile.chips import GIB

_JSON = flags.DEFINE_string("json", "", "file for the results")
_CACHE = flags.DEFINE_string("cache_dir", "runs/compile_cache", "directory for compiled programs")

_TARGET, _IMAGES = "v6e:2x4", 16
_BASE = fields.make(
  Config,
  task=(TaskConfig("levers", prompts="-", reward="-", batch_size=8 * _IMAGES),),
  guidance_scale=7.0,
  pretrain_weight=0.0,
  fsdp=8,
)
_STATES = {
  "8 shards": {},
  "1 shard": {"fsdp": 1},
  "moments in bfloat16": {"moments_dtype": "bfloat16"},
  "parameters in bfloat16, float32 master": {"param_dtype": "bfloat16"},
  "LoRA of rank 32": {"lora_rank": 32},
  "LoRA of rank 32, 1 shard": {"lora_rank": 32, "fsdp": 1},
}
_VARIANTS = {
  "remat, splash attention": {},
  "no remat": {"remat": False},
  "attention in XLA": {"attention": "xla"},
  "attention in XLA, no remat": {"attention": "xla", "remat": False},
  "4 images at a time": {"microbatch": 4},
  "4 images at a time, no remat": {"microbatch": 4, "remat": False},
  "computed in float32": {"compute_dtype": "float32"},
  "LoRA of rank 32": {"lora_rank": 32},
}


def _first_level(config: Config):
  whole = architectures.get("sd2-base")
  unet = fields.replace(
    whole.unet,
    block_out_channels=whole.unet.block_out_channels[:1],
    attention_head_dim=whole.unet.attention_head_dim[:1],
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
  )
  part = fields.replace(whole, unet=unet)
  model = architectures.build(part, dtype=config.devices.compute_dtype, remat=config.devices.remat)
  return fields.replace(model, unet=model.unet.clone(attention=config.devices.attention))


def _print_states() -> None:
  print("| setting | trained, GiB | optimizer | frozen |\n|---|---|---|---|")
  for name, changes in _STATES.items():
    config = fields.replace(_BASE, **changes)
    mesh = targets.open_target("v6e:8x16", config.devices.fsdp).mesh
    run = AbstractRun.of(config, mesh, open_model(config, "sd2-base"))
    kept = (run.state.params, run.state.opt, run.frozen)
    print("| " + " | ".join([name, *(f"{device_bytes(x) / GIB:.2f}" for x in kept)]) + " |")
  print()


def main() -> None:
  _print_states()
  target = targets.open_target(_TARGET, _BASE.fsdp)
  found = {}
  print("| setting | temporary, GiB | peak, GiB | TFLOP per image |\n|---|---|---|---|")
  for name, changes in _VARIANTS.items():
    config = fields.replace(_BASE, **changes)
    run = AbstractRun.of(config, target.mesh, _first_level(config))
    (call,) = (call for call in run.calls() if call.name == "update")
    with ahead.compilation_cache(_CACHE.value) as cache:
      result = ahead.compile_program(call, target, cache)
    found[name] = dataclasses.asdict(result)
    temporary = f"{result.temporary / GIB:.2f}" if result.fits else "-"
    peak = f"{result.peak / GIB:.2f}" + ("" if result.fits else ", does not fit")
    print(
      f"| {name} | {temporary} | {peak} | {result.flops / call.images / 1e12:.2f} |", flush=True
    )
  if _JSON.value:
    with open(_JSON.value, "w") as file:
      json.dump(found, file, indent=2)


if __name__ == "__main__":
  cli.main(main)
