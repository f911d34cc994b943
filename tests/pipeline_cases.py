"""Text to image with `models_cases.tiny_pipeline`, in Flax and in PyTorch.

Shared by the tests and by `fixtures/make_fixtures.py`: deterministic DDIM with `models_cases.STEPS`
steps and `GUIDANCE` from the same noise, prompts `PROMPTS`, no negative prompts.
"""

import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import models_cases
import numpy as np

from rlft.diffusion import rollout
from rlft.diffusion.policy import make_policy
from rlft.models import lora, stable_diffusion, text, tokens
from rlft.models.files import vocabulary
from rlft.models.stable_diffusion import StableDiffusion
from rlft.types import Guidance

KINDS = ("epsilon", "v_prediction", "sdxl")


def initial_latents() -> np.ndarray:
  """`[2, 8, 8, 4]` float32 standard normal."""
  return np.random.RandomState(11).standard_normal((2, 8, 8, 4)).astype(np.float32)


def flax_outputs(kind: str) -> dict[str, np.ndarray]:
  """What rlft makes of the prompts with a tiny pipeline, see `torch_outputs`."""
  return flax_outputs_of(models_cases.tiny_pipeline(kind))


def flax_outputs_of(model: StableDiffusion) -> dict[str, np.ndarray]:
  """As `flax_outputs`, of any model with 8x8x4 latents."""
  policy = make_policy(
    model, sampling_steps=models_cases.STEPS, guidance_scale=models_cases.GUIDANCE, eta=0.0
  )
  ids, empty_ids = (model.tokenize(texts)[0] for texts in (models_cases.PROMPTS, [""]))

  @jax.jit
  def run(params, noise, ids, empty_ids):
    size = stable_diffusion.image_size(model)
    prompt = text.encode(model, params, ids, size)
    empty = text.empty(model, params, empty_ids, size)
    both = Guidance(prompt, jax.tree.map(lambda x, y: jnp.broadcast_to(x, y.shape), empty, prompt))
    keys = jax.random.split(jax.random.key(0), len(noise))
    path = rollout.sample(policy, lora.Weights(params["unet"]), noise, both, keys)
    latents = path.latents[-1]
    return prompt, empty, latents, stable_diffusion.decode(model, params["vae"], latents)

  prompt, empty, latents, images = run(model.params, initial_latents(), ids, empty_ids)
  outputs = {"text": prompt.text, "empty_text": empty.text, "latents": latents, "images": images}
  if prompt.pooled is not None:
    outputs |= {"pooled": prompt.pooled, "empty_pooled": empty.pooled}
  outputs |= {"ids": ids, "empty_ids": empty_ids, "timesteps": policy.process.timesteps}
  return jax.tree.map(np.asarray, outputs)


def torch_tokenizer(tokenizer: tokens.Tokenizer) -> Any:
  """The same tokenizer of transformers."""
  import transformers

  with tempfile.TemporaryDirectory() as folder:
    vocabulary.write_clip(pathlib.Path(folder), tokenizer)
    return transformers.CLIPTokenizer.from_pretrained(folder)


def torch_pipeline(model: StableDiffusion) -> Any:
  """diffusers' pipeline with the weights of `model`."""
  import diffusers

  parts = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoders[0]}
  parts |= {f"text_encoder_{i}": m for i, m in enumerate(model.text_encoders[1:], start=2)}
  parts = {name: models_cases.torch_model(m, model.params[name]) for name, m in parts.items()}
  parts["tokenizer"] = torch_tokenizer(model.tokenizers[0])
  parts["scheduler"] = diffusers.DDIMScheduler.from_config(dict(model.scheduler))
  if len(model.tokenizers) == 2:
    pipeline = diffusers.StableDiffusionXLPipeline(
      **parts,
      tokenizer_2=torch_tokenizer(model.tokenizers[1]),
      force_zeros_for_empty_prompt=model.zero_empty,
      add_watermarker=False,
    )
  else:
    pipeline = diffusers.StableDiffusionPipeline(
      **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
  pipeline.set_progress_bar_config(disable=True)
  return pipeline


def torch_outputs(kind: str) -> dict[str, np.ndarray]:
  """As `torch_outputs_of`, with a tiny pipeline."""
  return torch_outputs_of(models_cases.tiny_pipeline(kind))


def torch_outputs_of(model: StableDiffusion) -> dict[str, np.ndarray]:
  """What diffusers' pipeline makes of the prompts.

  Returns:
    ids int32 `[2, E, 16]`, empty_ids `[1, E, 16]`: tokens of the prompts and of the empty one
    timesteps int32 `[10]`: in the order in which they are run
    text `[2, 16, D]`, empty_text `[1, 16, D]`, for SDXL pooled `[2, F]`, empty_pooled `[1, F]`
    latents `[2, 8, 8, 4]`: final ones, not divided by the scaling factor
    images `[2, 32, 32, 3]`, in [0, 1]
  """
  import torch

  pipeline = torch_pipeline(model)

  def tokens(texts):
    each = [
      torch_tokenizer(tokenizer)(list(texts), padding="max_length", return_tensors="np").input_ids
      for tokenizer in model.tokenizers
    ]
    return np.stack(each, axis=1).astype(np.int32)

  def run(output_type):
    return pipeline(
      list(models_cases.PROMPTS),
      num_inference_steps=models_cases.STEPS,
      guidance_scale=models_cases.GUIDANCE,
      latents=torch.from_numpy(initial_latents()).permute(0, 3, 1, 2),
      eta=0.0,
      output_type=output_type,
    ).images

  with torch.no_grad():
    encoded = pipeline.encode_prompt(
      list(models_cases.PROMPTS),
      device="cpu",
      num_images_per_prompt=1,
      do_classifier_free_guidance=True,
    )
    names = ("text", "empty_text", "pooled", "empty_pooled")
    outputs = {name: x.numpy() for name, x in zip(names, encoded, strict=False)}
    outputs |= {name: x[:1] for name, x in outputs.items() if name.startswith("empty")}
    latents = run("latent").permute(0, 2, 3, 1).numpy()
    return outputs | {
      "ids": tokens(models_cases.PROMPTS),
      "empty_ids": tokens([""]),
      "timesteps": pipeline.scheduler.timesteps.numpy().astype(np.int32),
      "latents": np.ascontiguousarray(latents),
      "images": run("np").astype(np.float32),
    }
