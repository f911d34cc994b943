"""Trains `emoji-sd`, a complete Stable Diffusion in miniature, on scenes of the emoji world.

Three stages, each resumable: a CLIP tokenizer from the captions; the autoencoder; the UNet together
with the text encoder, on latents that are encoded once. The result is a diffusers directory.

It is a *base model with faults*, as web-trained models have: see `rlft.emoji.world`.
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import tokenizers
import tqdm

from rlft.algorithms import losses
from rlft.config.fields import option
from rlft.diffusion import sampler
from rlft.diffusion.policy import make_policy
from rlft.emoji import world
from rlft.models import lora, stable_diffusion, tokens
from rlft.models import text as text_lib
from rlft.models.clip import CLIPTextConfig, CLIPTextEncoder
from rlft.models.files import pretrained
from rlft.models.stable_diffusion import StableDiffusion
from rlft.models.unet import UNet2DCondition, UNetConfig
from rlft.models.vae import AutoencoderKL, VAEConfig
from rlft.parallel import cpu, sharding
from rlft.storage import images as images_lib
from rlft.storage.checkpoint import Checkpointer

TEXT_LENGTH = 16  # tokens; the longest caption of the world has 12

# RGB to luma (Rec. 601), 2 (R - luma), 2 (B - luma), as columns.
_LUMA_CHROMA = np.array(
  [[0.299, 1.402, -0.598], [0.587, -1.174, -1.174], [0.114, -0.228, 1.772]], np.float32
)

SCHEDULER = {
  "_class_name": "DDIMScheduler",
  "_diffusers_version": "0.39.0",
  "num_train_timesteps": 1000,
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "prediction_type": "v_prediction",
  "steps_offset": 1,
  "set_alpha_to_one": False,
  "clip_sample": False,
  "timestep_spacing": "leading",
}


@dataclasses.dataclass(frozen=True)
class BaseModelConfig:
  """What `launch/pretrain.py` takes; each field is a flag of the same name."""

  workdir: str = option("directory for checkpoints and the result", path=True)
  seed: int = option("seed of data, weights and noise", 0, least=0)
  scenes: int = option("rendered scenes to train on", 30_000, least=1)
  vae_steps: int = option("steps of the autoencoder", 1_500, least=1)
  vae_batch_size: int = option("images a VAE step", 16, least=1)
  unet_steps: int = option("steps of the UNet and text encoder", 8_000, least=1)
  unet_batch_size: int = option("latents a UNet step", 64, least=1)
  learning_rate: float = option(
    "peak learning rate of Adam; falls linearly to 0 at the end", 1e-3, above=0
  )
  decay_share: float = option(
    "share of the steps, the last ones, in which the learning rate falls", 0.25, least=0, most=1
  )
  ema_decay: float = option(
    "decay of the averaged weights, which are the result", 0.999, least=0, below=1
  )
  caption_dropout: float = option(
    "share of captions left empty, for guidance", 0.1, least=0, most=1
  )
  cpu_devices: int = option("on CPUs: split the machine into this many devices; 0: one", 0, least=0)
  checkpoint_every: int = option("steps between checkpoints and sample grids", 500, least=1)


def train_tokenizer(captions: Sequence[str], *, max_length: int = TEXT_LENGTH) -> tokens.Tokenizer:
  """A CLIP tokenizer (byte-level BPE with '</w>') whose merges come from `captions`."""
  model = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
  model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=2_000, min_frequency=2, end_of_word_suffix="</w>", show_progress=False
  )
  model.train_from_iterator(captions, trainer)
  merges = json.loads(model.to_str())["model"]["merges"]
  # One letter for each byte: those that can be printed first, as in CLIP's vocabulary.
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  words = alphabet + [c + "</w>" for c in alphabet]
  words += ["".join(pair) for pair in merges]
  words += ["<|startoftext|>", "<|endoftext|>"]
  vocabulary = {word: i for i, word in enumerate(words)}
  return tokens.clip(vocabulary, [tuple(pair) for pair in merges], length=max_length)


def build(tokenizer: tokens.Tokenizer, *, scaling_factor: float = 1.0) -> StableDiffusion:
  """The modules of `emoji-sd`, without parameters."""
  text = CLIPTextConfig(
    vocab_size=len(tokenizer),
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=tokenizer.length,
    bos_token_id=tokenizer.begin_id,
    eos_token_id=tokenizer.end_id,
    pad_token_id=tokenizer.pad_id,
  )
  vae = VAEConfig(
    # Eight channels, not four: an autoencoder that blurs would hide what training changes.
    latent_channels=8,
    block_out_channels=(24, 48, 64),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    norm_num_groups=8,
    sample_size=world.IMAGE_SIZE,
    scaling_factor=scaling_factor,
    force_upcast=False,
  )
  unet = UNetConfig(
    sample_size=world.IMAGE_SIZE // vae.downscale,
    in_channels=vae.latent_channels,
    out_channels=vae.latent_channels,
    block_out_channels=(64, 128),
    layers_per_block=1,
    # Attention at 4x4 only: at 8x8 it would cost a third of the time and adds little.
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=4,
    cross_attention_dim=text.hidden_size,
    norm_num_groups=16,
    use_linear_projection=True,
  )
  return StableDiffusion(
    unet=UNet2DCondition(unet),
    vae=AutoencoderKL(vae),
    text_encoders=(CLIPTextEncoder(text),),
    tokenizers=(tokenizer,),
    scheduler=SCHEDULER,
    params={},
  )


def vae_loss(vae: AutoencoderKL, params: Any, images: jax.Array, key: jax.Array) -> jax.Array:
  """Errors of luma, chroma (weighted up: it is faint in washed-out pictures) and edges; and KL.

  Args:
    vae: the autoencoder.
    params: its parameters.
    images: `[B, H, W, 3]` in [-1, 1].
    key: consumed.
  """
  mean, logvar = vae.apply({"params": params}, images, method="encode")
  noise = jax.random.normal(key, mean.shape)
  decoded = vae.apply({"params": params}, mean + jnp.exp(0.5 * logvar) * noise, method="decode")
  error = (decoded - images) @ jnp.asarray(_LUMA_CHROMA)
  edges = sum(jnp.abs(jnp.diff(error[..., :1], axis=axis)).mean() for axis in (1, 2))
  kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean()
  # Squares as well: absolute errors alone settle for grey, the median of faint colours.
  return jnp.abs(error).mean() + 4.0 * (error**2).mean() + 0.5 * edges + 1e-4 * kl


def _optimizer(config: BaseModelConfig, steps: int, rate: float) -> optax.GradientTransformation:
  decay = max(1, int(steps * config.decay_share))
  schedule = optax.join_schedules(
    [
      optax.linear_schedule(0.0, rate, 100),
      optax.constant_schedule(rate),
      optax.linear_schedule(rate, 0.0, decay),
    ],
    [100, steps - decay],
  )
  return optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-3)
  )


def _fit(
  name: str,
  config: BaseModelConfig,
  params: Any,
  loss_fn: Callable[[Any, Any, jax.Array], jax.Array],
  batch_fn: Callable[[np.random.Generator], Any],
  *,
  steps: int,
  rate: float,
  preview: Callable[[Any, int], None],
) -> Any:
  """Minimises `loss_fn(params, batch, key)` by Adam; returns the averaged parameters.

  Batch and noise of step n depend on (seed, n) alone, so a resumed run equals an uninterrupted one.
  """
  optimizer = _optimizer(config, steps, rate)

  @functools.partial(sharding.jit, donate_argnums=0)
  def update(state, batch, step):
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    loss, gradient = jax.value_and_grad(loss_fn)(state["params"], batch, key)
    updates, opt = optimizer.update(gradient, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    decay = jnp.minimum(config.ema_decay, (1.0 + step) / (10.0 + step))
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state["ema"], params)
    return {"params": params, "opt": opt, "ema": ema}, loss

  # A second copy, since the first is donated.
  state = {"params": params, "opt": optimizer.init(params), "ema": jax.tree.map(jnp.copy, params)}
  mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
  state = jax.device_put(state, NamedSharding(mesh, P()))
  by_row = NamedSharding(mesh, P("data"))
  # An interrupted run still finishes its last save.
  with contextlib.ExitStack() as stack:
    checkpointer = stack.enter_context(
      contextlib.closing(Checkpointer(Path(config.workdir, "checkpoints", name)))
    )
    restored = checkpointer.restore(state)
    first = 0
    if restored is not None:
      first, state, _ = restored
    bar = tqdm.tqdm(range(first, steps), initial=first, total=steps, desc=name, mininterval=5.0)
    losses = []
    for step in bar:
      rng = np.random.default_rng((config.seed, step))
      state, loss = update(state, jax.device_put(batch_fn(rng), by_row), step)
      losses.append(loss)
      done = step + 1
      if done % 50 == 0 or done == steps:
        mean = float(np.mean(jax.device_get(losses)))
        losses = []
        bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        with Path(config.workdir, "metrics.jsonl").open("a") as file:
          file.write(json.dumps({"stage": name, "step": done, "loss": mean}) + "\n")
      if done % config.checkpoint_every == 0 or done == steps:
        checkpointer.save(done, state, {})
        preview(state["ema"], done)
  return state["ema"]


def _encode(model: StableDiffusion, params: Any, images: np.ndarray) -> np.ndarray:
  """`[N, H, W, 3]` uint8 -> `[N, h, w, C]` unscaled latent means."""
  encode = jax.jit(lambda x: model.vae.apply({"params": params}, _to_signed(x), method="encode")[0])
  size = 256
  padded = np.concatenate([images, images[: -len(images) % size]])
  batches = tqdm.tqdm(range(0, len(padded), size), desc="encode", mininterval=5.0)
  return np.concatenate([np.asarray(encode(padded[i : i + size])) for i in batches])[: len(images)]


def _to_signed(images: jax.Array) -> jax.Array:
  return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def run(config: BaseModelConfig) -> StableDiffusion:
  """Trains all stages (or what is left of them) and writes `<workdir>/emoji-sd`."""
  cpu.split_host(config.cpu_devices)
  workdir = Path(config.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  images, captions = world.training_pairs(config.seed, config.scenes)
  tokenizer = train_tokenizer(captions)
  model = build(tokenizer)
  ids, truncated = model.tokenize(captions)
  assert truncated == 0, "TEXT_LENGTH is too small for the captions"
  empty = model.tokenize([""])[0][0]
  key = jax.random.key(config.seed)

  # --- autoencoder ---
  shown = images[:64]

  def preview_vae(params, step):
    mean, _ = model.vae.apply({"params": params}, _to_signed(shown), method="encode")
    decoded = model.vae.apply({"params": params}, mean, method="decode")
    both = np.concatenate([shown / 255.0, np.clip(np.asarray(decoded) / 2 + 0.5, 0, 1)])
    images_lib.save_png(workdir / f"vae_{step:06d}.png", images_lib.grid(both, 16, scale=2))

  vae_params = jax.jit(model.vae.init)(jax.random.fold_in(key, 0), _to_signed(shown[:1]))["params"]
  vae_params = _fit(
    "vae",
    config,
    vae_params,
    lambda params, batch, key: vae_loss(model.vae, params, _to_signed(batch), key),
    lambda rng: images[rng.integers(len(images), size=config.vae_batch_size)],
    steps=config.vae_steps,
    rate=2 * config.learning_rate,
    preview=preview_vae,
  )

  # --- UNet and text encoder, on latents of unit variance ---
  latents = _encode(model, vae_params, images)
  scaling_factor = round(float(1.0 / latents.std()), 5)
  model = build(tokenizer, scaling_factor=scaling_factor)
  latents *= scaling_factor

  def unet_batch(rng):
    rows = rng.integers(len(latents), size=config.unet_batch_size)
    dropped = rng.random(len(rows)) < config.caption_dropout
    return latents[rows], np.where(dropped[:, None, None], empty, ids[rows])

  policy = make_policy(model, sampling_steps=20, guidance_scale=2.0)

  def denoising_loss(params, batch, key):
    latents, ids = batch
    errors = losses.denoising_error(
      policy.denoiser(lora.Weights(params["unet"])),
      policy.process,
      latents,
      text_lib.encode(model, params, ids, stable_diffusion.image_size(model)),
      *losses.denoising_noise(key, latents.shape, policy.process.train_timesteps),
    )
    return errors.mean()

  def zeros(module):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), module.example_inputs())

  rows = [captions.index(c) for c in list(dict.fromkeys(captions))[:64]]

  @sharding.jit
  def preview_sample(params):
    keys, scale = sampler.image_keys(jax.random.key(1), 0, len(rows)), policy.guidance_scale
    text = sampler.condition(model, params, ids[rows], empty, len(rows), guidance_scale=scale)
    weights = lora.Weights(params["unet"])
    return sampler.generate(model, policy, weights, vae_params, text, keys)[1]

  def preview_unet(params, step):
    drawn = np.asarray(preview_sample(params))
    images_lib.save_png(workdir / f"unet_{step:06d}.png", images_lib.grid(drawn, 16, scale=3))

  inits = {
    name: jax.jit(module.init)(jax.random.fold_in(key, stream), *zeros(module))["params"]
    for stream, name, module in (
      (1, "text_encoder", model.text_encoders[0]),
      (2, "unet", model.unet),
    )
  }
  params = _fit(
    "unet",
    config,
    inits,
    denoising_loss,
    unet_batch,
    steps=config.unet_steps,
    rate=config.learning_rate,
    preview=preview_unet,
  )
  model = dataclasses.replace(model, params={**params, "vae": vae_params})
  pretrained.save(workdir / "emoji-sd", model, dtype=np.float16)
  return model
