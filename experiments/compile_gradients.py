"""What the reward's gradient takes at Stable Diffusion 2's size, for ReFL and for DRaFT-LV.

    python experiments/compile_gradients.py

The programs that they have beside those of a policy gradient: the decoder and its gradient, one
image at a time; ImageReward at its published size with the gradient, all images of a device at
once; and with --programs those of the network, which take longer. The images of a device are those
of `sd2_refl.flags` (12) and `sd2_draft.flags` (3). The result is in `compile.md`.
"""

from collections.abc import Iterator

from absl import flags
import jax
import jax.numpy as jnp

from rlft.config import fields
from rlft.config import flags as cli
from rlft.config.settings import Config, TaskConfig
from rlft.parallel import sharding
from rlft.performance.benchmark.ports import PORTS
from rlft.performance.compile import ahead, targets
from rlft.performance.compile.abstract_run import AbstractRun, Call, open_model
from rlft.performance.compile.chips import GIB
from rlft.rewards.scoring import scorer
from rlft.types import JaxReward

_TARGET = flags.DEFINE_string("target", "cpu:1", "devices, as of launch/compile.py")
_PROGRAMS = flags.DEFINE_list(
  "programs", ["decode", "pull", "slope"], "which; also sample, predict and update"
)
_CACHE = flags.DEFINE_string("cache_dir", "runs/compile_cache", "directory for compiled programs")

# Images on a device, as in the paper.
_METHODS = {"refl": 12, "draft": 3}


def _slope(run: AbstractRun, images: jax.ShapeDtypeStruct) -> Call:
  """ImageReward's gradient with respect to images, in float32."""
  port = PORTS["image-reward"]
  made = port.scorer(port.config, jnp.float32, len(images))
  everywhere, rows = sharding.replicated(run.mesh), sharding.batch(run.mesh)

  def placed(tree, where):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

  params, features = placed(made.shapes, everywhere), placed(made.features, rows)
  reward = JaxReward("image-reward", made.score, params=params)
  program = sharding.jit(
    lambda params, images, features: scorer.slope(reward, 1, params, images, features),
    out_shardings=rows,
  )
  return Call("slope", program, (params, images, features), 1, len(images), {})


def _calls(target: targets.Target, method: str) -> Iterator[Call]:
  """The programs of an iteration that were asked for."""
  batch = _METHODS[method] * target.mesh.size
  config = fields.make(
    Config,
    algorithm=method,
    task=(TaskConfig("t", prompts="-", reward="-", batch_size=batch),),
    pretrain_weight=0.0,
    decode_chunk=1,
  )
  run = AbstractRun.of(config, target.mesh, open_model(config, "sd2-base"))
  for call in run.calls():
    if call.name == "pull":
      yield call
      yield _slope(run, call.args[2])
    else:
      yield call


def main() -> None:
  target = targets.open_target(_TARGET.value, fsdp=1)
  print("| method | program | arguments, GiB | temporary, GiB | TFLOP an image |")
  print("|" + "---|" * 5)
  for method, count in _METHODS.items():
    for call in _calls(target, method):
      if call.name not in _PROGRAMS.value:
        continue
      with ahead.compilation_cache(_CACHE.value) as cache:
        found = ahead.compile_program(call, target, cache)
      numbers = (f"{x / GIB:.2f}" for x in (found.arguments, found.temporary))
      line = [
        f"{method}, {count} images",
        call.name,
        *numbers,
        f"{found.flops / call.images / 1e12:.2f}",
      ]
      print("| " + " | ".join(line) + " |", flush=True)


if __name__ == "__main__":
  cli.main(main)
