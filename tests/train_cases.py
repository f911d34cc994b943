"""The smallest Stable Diffusion that can be trained, and runs of the trainer on it.

Nearly all of a run's time here is compilation, so runs whose settings give the same programs share
them, XLA optimises little, and most runs use one of the eight devices.
"""

from collections.abc import Callable, Mapping, Sequence
import copy
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from flax import traverse_util
import jax
from jax.sharding import AxisType
import models_cases
import numpy as np
import PIL.Image
import pytest

from rlft import train
from rlft.config import fields
from rlft.config.settings import Config, TaskConfig
from rlft.models import clip, unet, vae
from rlft.models.files import pretrained
from rlft.models.stable_diffusion import StableDiffusion
from rlft.parallel import sharding
from rlft.run import open as open_lib
from rlft.storage.checkpoint import Checkpointer

ROOT = pathlib.Path(__file__).parents[1]
BATCH = 8
GUIDANCE = 2.0
PRETRAIN_WEIGHT = 0.1
PROMPTS = (*models_cases.PROMPTS, "a dog", "a cat", "dogs")

# Rewards as a user writes them. BROKEN=how@call in the environment stands for a version of `green`
# with a mistake: the file itself is read once in a process.
_REWARDS = '''
"""Rewards of the tests."""

import os
import signal
import time

import numpy as np

calls = 0


def red(images):
  return images[..., 0].mean((1, 2))


def green(images, prompts, metadata):
  global calls
  calls += len(images) > 2  # Two are a trial before the run.
  how, _, call = os.environ.get("BROKEN", "").partition("@")
  if how and calls == int(call or calls):
    if how == "raises":
      raise ValueError("no\\nluck")
    if how == "stops":
      os.kill(os.getpid(), signal.SIGTERM)
    if how == "dies":
      os.kill(os.getpid(), signal.SIGKILL)
    if how == "nan":
      return np.full(len(images), np.nan)
  if how == "slow":
    time.sleep(0.15)
  return images[..., 1].mean((1, 2))


def spread(images, prompts, metadata):
  scores = images[..., 2].std((1, 2, 3))
  return np.where(np.array(prompts) == "two cats", np.nan, scores)


spread.is_set = True
'''


def tiny_model(seed: int = 2, channels: int = 16, size: int = 4) -> StableDiffusion:
  """Random weights: images of `size` x `size`, latents as large, one transformer, 16 tokens."""
  words = models_cases.tokenizer()
  modules = {
    "unet": unet.UNet2DCondition(
      unet.UNetConfig(
        sample_size=size,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(channels,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
      )
    ),
    "vae": vae.AutoencoderKL(
      vae.VAEConfig(
        block_out_channels=(8,),
        norm_num_groups=4,
        scaling_factor=0.5,
      )
    ),
    "text_encoder": clip.CLIPTextEncoder(
      clip.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=words.begin_id,
        eos_token_id=words.end_id,
        pad_token_id=words.pad_id,
      )
    ),
  }
  params = {name: models_cases.random_params(m, seed=seed) for name, m in modules.items()}
  # Guidance multiplies what a random network predicts: smaller, so that values stay moderate.
  params["unet"]["conv_out"] = {k: 0.2 * v for k, v in params["unet"]["conv_out"].items()}
  scheduler = {**models_cases.SCHEDULER, "prediction_type": "epsilon"}
  return StableDiffusion(
    unet=modules["unet"],
    vae=modules["vae"],
    text_encoders=(modules["text_encoder"],),
    tokenizers=(words,),
    scheduler=scheduler,
    params=params,
  )


def make_folder(folder: pathlib.Path) -> pathlib.Path:
  """Makes a folder: `model`, `prompts.txt`, `rewards.py`, images in `pairs`."""
  folder.mkdir(parents=True)
  pretrained.save(folder / "model", tiny_model())
  (folder / "prompts.txt").write_text("\n".join(PROMPTS))
  (folder / "rewards.py").write_text(_REWARDS)
  pairs = folder / "pairs"
  pairs.mkdir()
  lines = []
  for i in range(12):
    pixels = np.random.RandomState(i).randint(0, 256, (4, 4, 3)).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(pairs / f"{i}.png")
    lines.append(json.dumps({"file_name": f"{i}.png", "text": PROMPTS[i % len(PROMPTS)]}))
  (pairs / "metadata.jsonl").write_text("\n".join(lines))
  return folder


def task(
  folder: pathlib.Path,
  name: str = "red",
  reward: str = "jax:red",
  rewards: pathlib.Path | None = None,
  **changes: Any,
) -> TaskConfig:
  """A task; `reward` is kind:function in the file `rewards`, else in the folder's."""
  kind, _, function = reward.partition(":")
  settings = {
    "prompts": str(folder / "prompts.txt"),
    "reward": f"{kind}:{rewards or folder / 'rewards.py'}:{function}",
    "batch_size": BATCH,
  }
  return TaskConfig(name=name, **(settings | changes))


def config(folder: pathlib.Path, workdir: pathlib.Path, **changes: Any) -> Config:
  """Two tasks and pretraining, in float32."""
  settings = {
    "pretrained": str(folder / "model"),
    "workdir": str(workdir),
    "task": (task(folder), task(folder, "green", "host:green")),
    "iterations": 2,
    "sampling_steps": 3,
    "guidance_scale": GUIDANCE,
    "train_timesteps": 2,
    "pretrain_data": str(folder / "pairs"),
    "pretrain_batch_size": BATCH,
    "pretrain_weight": PRETRAIN_WEIGHT,
    "clip_range": 0.1,
    "learning_rate": 1e-2,
    # Large, so that an update depends on its gradient smoothly: where Adam only takes the sign, the
    # order of two float32 sums may decide on it.
    "adam_eps": 1e-2,
    "compute_dtype": "float32",
    "remat": False,
    "reward_threads": 1,
    "checkpoint_every": 0,
    "report_images": 2,
  }
  return fields.make(Config, **(settings | changes))


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of `metrics.jsonl`."""
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def reproducible(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """The lines without what depends on the clock."""
  return [
    {k: v for k, v in line.items() if not k.startswith("time/") and k != "images_per_second"}
    for line in lines
  ]


def final_state(workdir: pathlib.Path) -> Any:
  """What the newest checkpoint holds, as numpy arrays."""
  checkpointer = Checkpointer(workdir / "checkpoints", read_only=True)
  state, _ = checkpointer.restore_numpy()
  checkpointer.close()
  return state


def assert_same_run(found: pathlib.Path, expected: pathlib.Path) -> None:
  """Bit for bit: the whole state (optimizer, averages) and every number but times."""
  jax.tree.map(np.testing.assert_array_equal, final_state(found), final_state(expected))
  assert reproducible(metrics(found)) == reproducible(metrics(expected))


# How runs are made cheap.


def folder(factory: pytest.TempPathFactory) -> pathlib.Path:
  """What `make_folder` makes, once for all tests."""
  made = factory.getbasetemp() / "train"
  return made if made.exists() else make_folder(made)


_load, _make_programs = pretrained.load, open_lib.make_programs
_shared: dict[Any, Any] = {}
# Settings that no program depends on.
_ELSEWHERE = ("workdir", "task", "eval", "iterations", "seed", "advantage")
_ELSEWHERE += ("accumulate_timesteps", "prompt_history", "prompt_history_min", "max_nan_share")
_ELSEWHERE += ("checkpoint_every", "keep_checkpoints", "eval_every", "reward_timeout_s")


def _share(what: str, config: Config, make: Callable[[], Any], *key: Any) -> Any:
  """What `make` made for the first run with settings that give the same programs."""
  neutral = {name: fields.flat(Config())[name] for name in _ELSEWHERE}
  # Without pretraining nothing calls the one program that depends on its weight.
  if not config.pretraining.pretrain_weight:
    neutral["pretrain_weight"] = PRETRAIN_WEIGHT
  key = what, fields.replace(config, **neutral), *key
  if key not in _shared:
    _shared[key] = make()
  return _shared[key]


@dataclasses.dataclass(frozen=True)
class Call:
  """One call of a program; arrays are copies, since a later call may be given their memory.

  Attributes:
    name: of the program.
    shards: the first argument, with the shape of a shard in the place of each array.
    args: the others.
    result: what it returned.
  """

  name: str
  shards: Any
  args: tuple[Any, ...]
  result: Any


def run(config: Config, *, devices: int = 1, calls: list[Call] | None = None) -> None:
  """`train`; runs in this process that would compile the same programs share them.

  Args:
    config: the run.
    devices: how many of the eight it uses.
    calls: a list to add each call of a program to.
  """

  def recorded(name, program):
    def call(*args):
      shards = jax.tree.map(lambda x: x.addressable_shards[0].data.shape, args[0])
      result = program(*args)
      calls.append(Call(name, shards, args[1:], jax.tree.map(np.array, result)))
      return result

    return program if calls is None else call

  def make_mesh(fsdp=1, count=0):
    assert count in (0, devices)
    return jax.make_mesh(
      (devices // fsdp, fsdp),
      ("data", "fsdp"),
      axis_types=(AxisType.Auto,) * 2,
      devices=jax.devices()[:devices],
    )

  def load(path, *, place, **settings):
    model = _share("model", Config(), lambda: _load(path, **settings), path, *settings.items())
    leaves = traverse_util.flatten_dict(model.params)
    placed = {name: sharding.put(leaf, place(name, leaf.shape)) for name, leaf in leaves.items()}
    return dataclasses.replace(model, params=traverse_util.unflatten_dict(placed))

  def make_programs(config, algorithm, *args):
    # As `_share` says: who has no pretraining may be the first to make what others share.
    made = config
    if not config.pretraining.pretrain_weight:
      made = fields.replace(config, pretrain_weight=PRETRAIN_WEIGHT)
    programs = _share("programs", config, lambda: _make_programs(made, algorithm, *args), devices)
    # A copy of what is shared, with this run's own settings, which are in no program.
    learning = copy.copy(programs.learning)
    learning._settings = algorithm
    learning.update = recorded("update", learning.update)
    changes = {name: recorded(name, getattr(programs, name)) for name in ("pretrain", "average")}
    return dataclasses.replace(programs, algorithm=algorithm, learning=learning, **changes)

  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(sharding, "make_mesh", make_mesh)
    monkeypatch.setattr(pretrained, "load", load)
    monkeypatch.setattr(open_lib, "make_programs", make_programs)
    train.train(config)


def uninterrupted(folder: pathlib.Path) -> pathlib.Path:
  """The workdir of a run of three iterations in one go, with the settings of `config`."""
  workdir = folder / "uninterrupted"
  if not workdir.exists():
    run(config(folder, workdir, iterations=3))
  return workdir


# Real processes.


def flags(config: Config) -> list[str]:
  """The command line of a run."""

  def entry(value):
    return ",".join(f"{k}={v}" for k, v in dataclasses.asdict(value).items())

  line = []
  values = fields.flat(config)
  for name, field in fields.leaves(Config).items():
    if isinstance(values[name], tuple):
      line += [f"--{name}={entry(each)}" for each in values[name]]
    elif values[name] != field.default:
      line.append(f"--{name}={values[name]}")
  return line


def start(config: Config, arguments: Sequence[str] = (), **environment: str) -> subprocess.Popen:
  """Starts `launch/train.py` on one device.

  Args:
    config: the run.
    arguments: further ones.
    **environment: further variables.
  """
  return subprocess.Popen(
    [sys.executable, ROOT / "launch" / "train.py", *flags(config), *arguments],
    env=environment_of_runs() | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def environment_of_runs(cache: pathlib.Path | None = None) -> dict[str, str]:
  """Variables of processes on one device that are quick to compile.

  Args:
    cache: where they keep programs, if the environment does not say it, as it does in tests.
  """
  kept = {} if cache is None else {"JAX_COMPILATION_CACHE_DIR": str(cache)}
  inherited = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
  own = {
    "PYTHONPATH": str(ROOT),
    "BROKEN": "",
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "true"),
    "JAX_ENABLE_COMPILATION_CACHE": "true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  return kept | inherited | own
