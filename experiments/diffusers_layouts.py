"""Do rlft and a release of diffusers read each other's models? Small ones, with random weights.

It tries pipelines (Stable Diffusion 1 in one file, in half precision and in shards; 2 with velocity
prediction and linear projections; SDXL) and models of rewards (CLIP, OWL-ViT, OWLv2, BERT's
vocabulary). --save and --read run in an environment with any releases of diffusers and
transformers, --compare in rlft's; both may be the same:

    python experiments/diffusers_layouts.py --save=runs/layouts     # diffusers draws, and saves
    python experiments/diffusers_layouts.py --compare=runs/layouts  # rlft reads, draws, and exports
    python experiments/diffusers_layouts.py --read=runs/layouts     # diffusers reads what it wrote

Each takes about a minute and prints the differences. The last two fail if latents after 8 guided
DDIM steps, or features, differ by more than 1e-4 from those of --save, or if any token differs.
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np

STEPS, GUIDANCE = 8, 5.0
TOLERANCE = 1e-4
LENGTH = 16
PROMPTS = ("a photo of a dog", "two cats")
# No Chinese: CLIPTokenizer of transformers 4.57 put spaces around its characters.
TEXTS = (
  *PROMPTS,
  "",
  "It's 12 DOGS, caf\u00e9!",
  "a cat <|endoftext|> dog",
  "dog " * 40,
)
BERT = "[PAD] [UNK] [CLS] [SEP] [MASK] a c d e g i o s t y , . ! ' 1 2 ##s dog cafe cat two"

# {pipeline: (kind, arguments of save_pretrained)}
PIPELINES = {
  "sd1": ("sd1", {}),
  "sd1-fp16": ("sd1", {"variant": "fp16"}),
  "sd1-shards": ("sd1", {"max_shard_size": "200KB"}),
  "sd2": ("sd2", {}),
  "sdxl": ("sdxl", {}),
  "sdxl-fp16-shards": ("sdxl", {"variant": "fp16", "max_shard_size": "200KB"}),
}
REWARD_MODELS = ("clip", "owlvit", "owlv2")


def clip_tokenizer(folder: pathlib.Path, **options: Any) -> Any:
  """A CLIP tokenizer of transformers that knows letters and the words of `PROMPTS`."""
  import transformers

  folder.mkdir(parents=True, exist_ok=True)
  # All 256 bytes, as CLIP writes them, alone and at a word's end.
  codes = [*range(33, 127), *range(161, 173), *range(174, 256)]
  letters = [*map(chr, codes), *(chr(256 + i) for i in range(256 - len(codes)))]
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
  (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
  (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
  return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH, **options)


def pipeline(kind: str, folder: pathlib.Path) -> Any:
  """A small pipeline of diffusers with random weights; `folder` is for temporary files."""
  import diffusers
  import torch
  import transformers

  torch.manual_seed(0)
  first = clip_tokenizer(folder / "words", **({"pad_token": "!"} if kind == "sd2" else {}))
  text = {
    "vocab_size": len(first),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "bos_token_id": first.bos_token_id,
    "eos_token_id": first.eos_token_id,
    "pad_token_id": first.pad_token_id,
    # The default makes tokens that the UNet hardly tells apart.
    "initializer_factor": 5.0,
  }
  unet = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
  }
  schedule = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
  }
  parts = {
    "vae": diffusers.AutoencoderKL(
      block_out_channels=(16, 16),
      down_block_types=("DownEncoderBlock2D",) * 2,
      up_block_types=("UpDecoderBlock2D",) * 2,
      norm_num_groups=8,
      sample_size=16,
    ),
    "tokenizer": first,
  }
  if kind == "sd2":
    text["hidden_act"] = "gelu"
    unet |= {"use_linear_projection": True, "attention_head_dim": [2, 4]}
    parts["scheduler"] = diffusers.DDIMScheduler(
      **schedule, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False
    )
  elif kind == "sdxl":
    second = clip_tokenizer(folder / "words", pad_token="!")
    text_2 = text | {"hidden_act": "gelu", "projection_dim": 24, "pad_token_id": 0}
    unet |= {
      "use_linear_projection": True,
      "attention_head_dim": [2, 4],
      "transformer_layers_per_block": [1, 2],
      "cross_attention_dim": 64,
      "addition_embed_type": "text_time",
      "addition_time_embed_dim": 8,
      "projection_class_embeddings_input_dim": 24 + 6 * 8,
    }
    parts["tokenizer_2"] = second
    parts["text_encoder_2"] = transformers.CLIPTextModelWithProjection(
      transformers.CLIPTextConfig(**text_2)
    )
    parts["scheduler"] = diffusers.EulerDiscreteScheduler(**schedule, timestep_spacing="leading")
  else:
    parts["scheduler"] = diffusers.PNDMScheduler(**schedule, skip_prk_steps=True)
  parts["text_encoder"] = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text))
  parts["unet"] = diffusers.UNet2DConditionModel(**unet)
  # Guidance multiplies what a random network predicts: smaller, so that values stay moderate.
  parts["unet"].conv_out.weight.data *= 0.2
  if kind == "sdxl":
    return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
  return diffusers.StableDiffusionPipeline(
    **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
  )


def noise() -> np.ndarray:
  """`[2, 8, 8, 4]` float32 standard normal, the latents at the beginning."""
  return np.random.RandomState(1).standard_normal((len(PROMPTS), 8, 8, 4)).astype(np.float32)


def draw_with_diffusers(folder: pathlib.Path) -> np.ndarray:
  """The latents `[2, 8, 8, 4]` that diffusers makes of `PROMPTS` with the pipeline in `folder`."""
  import diffusers
  import torch

  half = any(folder.glob("unet/*.fp16*")) and not any(folder.glob("unet/*model.safetensors"))
  pipe = diffusers.DiffusionPipeline.from_pretrained(folder, variant="fp16" if half else None)
  pipe.to(torch.float32)
  pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
  pipe.set_progress_bar_config(disable=True)
  latents = pipe(
    list(PROMPTS),
    latents=torch.from_numpy(noise()).permute(0, 3, 1, 2),
    height=16,
    width=16,
    num_inference_steps=STEPS,
    guidance_scale=GUIDANCE,
    output_type="latent",
  ).images
  return latents.permute(0, 2, 3, 1).numpy()


def reward_models(folder: pathlib.Path) -> Any:
  """Yields each of `REWARD_MODELS`, of transformers with random weights, and its tokenizer."""
  import torch
  import transformers

  torch.manual_seed(0)
  words = clip_tokenizer(folder / "words")
  text = {
    "vocab_size": len(words),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "bos_token_id": words.bos_token_id,
    "eos_token_id": words.eos_token_id,
    "pad_token_id": words.pad_token_id,
    "initializer_factor": 5.0,
  }
  vision = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "initializer_factor": 5.0,
  }
  classes = (
    (transformers.CLIPConfig, transformers.CLIPModel),
    (transformers.OwlViTConfig, transformers.OwlViTForObjectDetection),
    (transformers.Owlv2Config, transformers.Owlv2ForObjectDetection),
  )
  for name, (config, model) in zip(REWARD_MODELS, classes, strict=True):
    both = config(text_config=text, vision_config=vision, projection_dim=32)
    yield name, model(both).eval(), words


def features(name: str, model: Any, ids: np.ndarray, pixels: np.ndarray) -> dict[str, np.ndarray]:
  """What a reward model of transformers says of `ids` `[2, L]` and `pixels` `[2, 32, 32, 3]`."""
  import torch

  ids, pixels = torch.from_numpy(ids).long(), torch.from_numpy(pixels).permute(0, 3, 1, 2)
  with torch.no_grad():
    if name == "clip":
      found = model(input_ids=ids, pixel_values=pixels)
      return {"image": found.image_embeds.numpy(), "text": found.text_embeds.numpy()}
    found = model(input_ids=ids.repeat(2, 1), pixel_values=pixels)
    return {"confidence": torch.sigmoid(found.logits).numpy()}


def pixels() -> np.ndarray:
  """`[2, 32, 32, 3]` float32 standard normal, what an image tower takes."""
  return np.random.RandomState(2).standard_normal((2, 32, 32, 3)).astype(np.float32)


def padded(words: Any) -> np.ndarray:
  """`[N, L]` int32 token ids of `TEXTS` by a tokenizer of transformers."""
  encoded = words(list(TEXTS), padding="max_length", truncation=True, max_length=LENGTH)
  return np.array(encoded["input_ids"], np.int32)


def save(root: pathlib.Path) -> None:
  """Writes every model, and what diffusers and transformers make of it."""
  import torch
  import transformers

  for name, (kind, options) in PIPELINES.items():
    pipe = pipeline(kind, root)
    if "variant" in options:
      pipe.to(torch.float16)
    pipe.save_pretrained(root / name, **options)
    latents = draw_with_diffusers(root / name)
    second = [pipe.tokenizer_2] if kind == "sdxl" else []
    ids = np.stack([padded(words) for words in (pipe.tokenizer, *second)], axis=1)
    np.savez(root / f"{name}.npz", latents=latents, ids=ids)
    print(f"{name}: saved; the latents' standard deviation is {latents.std():.2f}", flush=True)
  for name, model, words in reward_models(root):
    model.save_pretrained(root / name)
    words.save_pretrained(root / name)
    ids = padded(words)
    np.savez(root / f"{name}.npz", ids=ids, **features(name, model, ids[:2], pixels()))
    print(f"{name}: saved", flush=True)
  (root / "words" / "vocab.txt").write_text("\n".join(BERT.split()) + "\n", encoding="utf-8")
  words = transformers.BertTokenizer.from_pretrained(root / "words")
  words.save_pretrained(root / "bert")
  np.savez(root / "bert.npz", ids=padded(words))
  print("bert: saved", flush=True)


def draw_with_rlft(model: Any) -> np.ndarray:
  """As `draw_with_diffusers`, for a model that rlft has read."""
  import jax

  from rlft.diffusion import policy as policy_lib
  from rlft.diffusion import rollout
  from rlft.models import lora, stable_diffusion, text
  from rlft.types import Guidance

  policy = policy_lib.make_policy(model, sampling_steps=STEPS, guidance_scale=GUIDANCE, eta=0.0)
  size = stable_diffusion.image_size(model)

  @jax.jit
  def run(params, ids, empty_ids, noise):
    texts = Guidance(
      text.encode(model, params, ids, size), text.empty(model, params, empty_ids, size)
    )
    keys = jax.random.split(jax.random.key(0), len(noise))
    return rollout.sample(policy, lora.Weights(params["unet"]), noise, texts, keys).latents[-1]

  ids, empty_ids = (model.tokenize(texts)[0] for texts in (PROMPTS, [""] * len(PROMPTS)))
  return np.asarray(run(model.params, ids, empty_ids, noise()))


def compare(root: pathlib.Path) -> bool:
  """Reads what `save` wrote, and writes it again; whether everything is the same."""
  from rlft.models import tokens
  from rlft.models.files import pretrained, vocabulary

  same = True
  for name in PIPELINES:
    model = pretrained.load(root / name)
    with np.load(root / f"{name}.npz") as expected:
      same &= differ(f"{name}: latents", draw_with_rlft(model), expected["latents"])
      same &= differ(f"{name}: tokens", model.tokenize(TEXTS)[0], expected["ids"])
    pretrained.save(root / f"{name}-rlft", model)
  pretrained.save(root / "sd1-rlft-half", pretrained.load(root / "sd1-fp16"), dtype=np.float16)
  for name in REWARD_MODELS:
    with np.load(root / f"{name}.npz") as expected:
      words, found = reward_features(name, root / name, expected["ids"][:2])
      for key, value in found.items():
        same &= differ(f"{name}: {key}", value, expected[key])
      same &= differ(f"{name}: tokens", words(TEXTS)[0], expected["ids"])
  words = tokens.bert(vocabulary.read_bert(root / "bert")[0], length=LENGTH)
  with np.load(root / "bert.npz") as expected:
    return same & differ("bert: tokens", words(TEXTS)[0], expected["ids"])


def reward_features(name: str, folder: pathlib.Path, ids: np.ndarray) -> Any:
  """The tokenizer of one of `REWARD_MODELS`, and its `features`, as rlft reads it."""
  import jax
  import jax.numpy as jnp

  from rlft.models import owlvit
  from rlft.models.files import clip_weights, sources, torch_layout, vocabulary
  from rlft.rewards import clip as clip_reward

  if name == "clip":
    module, params = clip_weights.load(folder)
    words = vocabulary.open_clip(folder, module.config.text_config)
    variables = {"params": params}
    image = module.apply(variables, pixels(), method="image_features")
    text = module.apply(variables, jnp.asarray(ids), method="text_features")
    return words, {"image": clip_reward.unit(image), "text": clip_reward.unit(text)}
  config = owlvit.OwlViTConfig.from_dict(sources.read_config(folder), what=str(folder))
  module = owlvit.OwlViT(config)
  params = torch_layout.from_torch(module, sources.open_weights(folder), what=str(folder))
  found = module.apply({"params": params}, pixels(), jnp.asarray(ids))
  return vocabulary.open_clip(folder, config.text_config), {
    "confidence": jax.nn.sigmoid(found.logits)
  }


def read(root: pathlib.Path) -> bool:
  """Draws with diffusers what `compare` exported; whether everything is the same."""
  import transformers

  same = True
  exported = {f"{name}-rlft": name for name in PIPELINES} | {"sd1-rlft-half": "sd1-fp16"}
  for name, original in exported.items():
    with np.load(root / f"{original}.npz") as expected:
      same &= differ(f"{name}: latents", draw_with_diffusers(root / name), expected["latents"])
      for i in range(expected["ids"].shape[1]):
        folder = root / name / ("tokenizer_2" if i else "tokenizer")
        for cls in (transformers.CLIPTokenizer, transformers.CLIPTokenizerFast):
          ids = padded(cls.from_pretrained(folder))
          same &= differ(f"{name}: tokens of {cls.__name__}", ids, expected["ids"][:, i])
  return same


def differ(what: str, found: Any, expected: np.ndarray) -> bool:
  """Prints the largest difference; whether it is small enough, or 0 of integers."""
  difference = np.abs(np.asarray(found) - expected).max()
  small = difference <= (TOLERANCE if expected.dtype.kind == "f" else 0)
  print(f"{what}: {difference:.2g}{'' if small else ': TOO MUCH'}", flush=True)
  return bool(small)


def main() -> int:
  """Runs what the command line asks for; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  verbs = parser.add_mutually_exclusive_group(required=True)
  for verb in (save, compare, read):
    verbs.add_argument(f"--{verb.__name__}", metavar="FOLDER", help=verb.__doc__)
  for verb in (save, compare, read):
    if folder := getattr(parser.parse_args(), verb.__name__):
      return 1 if verb(pathlib.Path(folder)) is False else 0
  return 2


if __name__ == "__main__":
  raise SystemExit(main())
