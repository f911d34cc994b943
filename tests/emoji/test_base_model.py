"""Pretraining: tokenizer, optimisation loop, resumption, the modules that it builds."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.emoji import base_model, world
from rlft.emoji import prompts as emoji_prompts
from rlft.models import tokens
from rlft.models.shapes import param_shapes


@pytest.fixture(scope="module")
def tokenizer():
  return base_model.train_tokenizer(world.training_pairs(0, 2000)[1])


def test_tokenizer_is_a_clip_tokenizer(tokenizer):
  ids, truncated = tokens.tokenize(tokenizer, ["a dog next to an owl", ""])
  assert ids.shape == (2, base_model.TEXT_LENGTH) and truncated == 0
  begin, end = tokenizer.begin_id, tokenizer.end_id
  assert [tokenizer.core.id_to_token(id) for id in ids[0, :8]] == [
    "<|startoftext|>", "a</w>", "dog</w>", "next</w>", "to</w>", "an</w>", "owl</w>",
    "<|endoftext|>",
  ]  # fmt: skip
  assert list(ids[1]) == [begin] + [end] * (base_model.TEXT_LENGTH - 1)
  # A word that no caption has falls apart into bytes, and comes back whole.
  assert tokenizer.core.decode(tokenizer.encode("zebra é")) == "zebra</w>é</w>"


def test_every_prompt_of_the_world_fits(tokenizer):
  for task in emoji_prompts.TASKS:
    for split in ("development", "test", *(() if task == "gendered" else ("train",))):
      texts = [prompt.text for prompt in emoji_prompts.prompts(task, split)[:500]]
      assert tokens.tokenize(tokenizer, texts)[1] == 0


def test_build(tokenizer):
  model = base_model.build(tokenizer, scaling_factor=0.5)
  shapes = param_shapes(model.unet)
  # Half-precision weights of the UNet must leave room for the rest within 12 MB.
  assert sum(x.size for x in jax.tree.leaves(shapes)) * 2 < 10e6
  assert model.vae.config.downscale == 4


def quadratic(workdir: Path, steps: int, until: int | None = None):
  """Minimises |p - batch mean|^2; stops after `until` steps if it is given."""
  config = base_model.BaseModelConfig(
    workdir=str(workdir), checkpoint_every=10, decay_share=0.5, ema_decay=0.9
  )
  seen = []

  def batch(rng):
    if until is not None and len(seen) == until:
      raise KeyboardInterrupt
    seen.append(rng.normal(3.0, 1.0, (8, 2)).astype(np.float32))
    return seen[-1]

  def loss(params, batch, key):
    return jnp.mean((params["p"] - batch) ** 2) + 0.0 * jax.random.uniform(key)

  return base_model._fit(
    "toy",
    config,
    {"p": jnp.zeros(2)},
    loss,
    batch,
    steps=steps,
    rate=0.1,
    preview=lambda params, step: None,
  )


def test_fit_learns_and_resumes_bit_for_bit(tmp_path):
  whole = quadratic(tmp_path / "whole", 400)
  np.testing.assert_allclose(whole["p"], 3.0, atol=0.3)
  with pytest.raises(KeyboardInterrupt):
    quadratic(tmp_path / "cut", 400, until=37)
  resumed = quadratic(tmp_path / "cut", 400)
  np.testing.assert_array_equal(whole["p"], resumed["p"])
  steps = [json.loads(line)["step"] for line in (tmp_path / "cut/metrics.jsonl").open()]
  assert steps[-1] == 400


def test_vae_loss_punishes_grey():
  """Chroma counts: the same error hurts more in colour than in luma."""

  class Fixed:
    """An autoencoder that always draws the same picture."""

    def __init__(self, picture):
      self.picture = picture

    def apply(self, variables, x, method):
      if method == "encode":
        return jnp.zeros((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1))
      return self.picture

  image = jnp.zeros((1, 4, 4, 3)).at[..., 0].set(0.3)
  perfect = base_model.vae_loss(Fixed(image), {}, image, jax.random.key(0))
  assert perfect == 0
  grey = jnp.full_like(image, 0.3 * 0.299)
  lighter = image + 0.3 * 0.5
  loss = {
    name: base_model.vae_loss(Fixed(picture), {}, image, jax.random.key(0))
    for name, picture in {"grey": grey, "lighter": lighter}.items()
  }
  assert loss["grey"] > loss["lighter"] > 0
